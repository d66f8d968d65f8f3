"""The extension itself: a missing or broken one is a clear error, its own checks, its C interface."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import types

import pytest
import torch

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.ops import _load, force, sparse_reference_attention


@pytest.fixture
def reload_native():
    """Forget the extension before and after, so that a test can put another in its place."""
    _load.native.cache_clear()
    yield
    _load.native.cache_clear()


def attend() -> torch.Tensor:
    x = torch.zeros(1, 4, 2, 8)
    return sparse_reference_attention(x, x, x)


def test_extension_is_built():
    module, reason = _load.native()
    assert module is not None, reason
    assert module.isas()[0] == "scalar"


def test_missing_extension_is_an_error_that_says_how_to_build_it(monkeypatch, reload_native):
    monkeypatch.setitem(sys.modules, "avatar_rt._native", None)
    with pytest.raises(UnsupportedError) as caught:
        attend()
    assert str(caught.value).split("\n")[:4] == [
        "sparse_reference_attention: no implementation can run this call",
        "  cuda: q is on cpu",
        "  triton: q is on cpu",
        "  cpu: avatar_rt._native is not built: run `pip install -e .` (or `make setup`)",
    ]
    with force("sparse_reference_attention", "reference"):
        assert attend().shape == (1, 4, 2, 8)


def test_broken_extension_says_why(monkeypatch, reload_native):
    def fail(name):
        raise ImportError("undefined symbol: nothing")

    monkeypatch.setattr(_load.importlib, "import_module", fail)
    with pytest.raises(UnsupportedError, match=r"cpu: avatar_rt._native does not load \(undefined symbol: nothing\)"):
        attend()


def test_extension_of_another_version_is_refused(monkeypatch, reload_native):
    monkeypatch.setitem(sys.modules, "avatar_rt._native", types.SimpleNamespace(abi_version=99))
    with pytest.raises(UnsupportedError, match=r"cpu: avatar_rt\._native is version 99, expected 1"):
        attend()


def call_native(q, k, v, *, num_frames=1, radius=0, scale=1.0, isa=None, num_threads=1, strength=1.0):
    module, _ = _load.native()
    out, lse = torch.empty(q.shape), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    args = [_load.arg(x) for x in (q, k, v)]
    numbers = (scale, num_frames, radius, num_threads, isa, strength)
    module.attention(*args, None, None, out.data_ptr(), lse.data_ptr(), *numbers)
    return out


def zeros(rows=4, heads=2, dim=8, dtype=torch.float32):
    return torch.zeros(1, rows, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: call_native(zeros(), zeros(heads=3), zeros()),
            "k: expected N=2, got 3 (shape [1, 4, 3, 8] for [B, S, N, D])",
        ),
        (
            lambda: call_native(zeros(), zeros()[0], zeros()),
            "k: expected 4 dimensions [B, S, N, D], got shape [4, 2, 8]",
        ),
        (lambda: call_native(zeros(), zeros(5), zeros(6)), "v: expected S=5, got 6"),
        (
            lambda: call_native(zeros(), zeros(dtype=torch.bfloat16), zeros()),
            "k: expected dtype float32 like q, got bfloat16",
        ),
        (lambda: call_native(*[zeros(dtype=torch.float64)] * 3), "q: expected dtype float32 or bfloat16, got float64"),
        (lambda: call_native(*[zeros(dim=300)] * 3), "q: expected D in 1..256, got 300"),
        (lambda: call_native(*[zeros()] * 3, num_frames=3), "num_frames: expected a divisor of L=4, got 3"),
        (lambda: call_native(*[zeros()] * 3, radius=-1), "radius: expected 0 or more frames, got -1"),
        (lambda: call_native(*[zeros()] * 3, scale=float("nan")), "scale: expected a finite number above 0, got nan"),
        (lambda: call_native(*[zeros()] * 3, strength=-2.0), "strength: expected a finite number of 0 or more, got -2"),
        (lambda: call_native(*[zeros()] * 3, num_threads=0), "num_threads: expected 1 or more, got 0"),
        (lambda: call_native(*[zeros()] * 3, isa="mmx"), "isa: expected scalar, avx2, avx512 or avx512bf16, got 'mmx'"),
        (lambda: call_native(zeros(), None, None), "k, ref_k: expected at least one key row, got none"),
        (
            lambda: call_native(zeros().transpose(2, 3), zeros(), zeros()),
            "q: expected a contiguous last dimension, got strides [64, 16, 1, 8]",
        ),
    ],
)
def test_bindings_check_with_the_same_sentences(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)


def call_packed(packed, dtype=torch.float32, isa=None):
    q = zeros(dtype=dtype)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 4)
    tensors = [_load.arg(x) for x in (q, None, None, *packed[:4])]
    _load.module().packed_attention(*tensors, packed[4], out.data_ptr(), lse.data_ptr(), 1.0, 1, isa)


def rows_of(dtype=torch.float32, rows=3, heads=2):
    return torch.zeros(1, heads, rows, 8, dtype=dtype)


NO_SCALE = torch.zeros(0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: call_packed((rows_of(heads=3), rows_of(), NO_SCALE, NO_SCALE, 3)),
            "packed.k: expected shape [1, 2, 3, 8], got [1, 3, 3, 8]",
        ),
        (
            lambda: call_packed((rows_of(), rows_of(torch.bfloat16), NO_SCALE, NO_SCALE, 3)),
            "packed.v: expected dtype float32, got bfloat16",
        ),
        (
            lambda: call_packed((rows_of(rows=6)[:, :, ::2], rows_of(), NO_SCALE, NO_SCALE, 3)),
            "packed.k: expected a contiguous tensor, got strides [96, 48, 16, 1]",
        ),
        (
            lambda: call_packed((rows_of(torch.int8), rows_of(torch.int8), NO_SCALE, NO_SCALE, 3)),
            "packed.k_scale: expected shape [1, 2, 3], got [0]",
        ),
        (
            lambda: call_packed(
                (rows_of(torch.bfloat16), torch.zeros(1, 2, 2, 8, 2, dtype=torch.bfloat16), NO_SCALE, NO_SCALE, 3),
                torch.bfloat16,
                "scalar",
            ),
            "ref_v: expected rows, for pairs are read by avx512bf16 in bf16 only, got pairs for scalar",
        ),
    ],
)
def test_bindings_check_packed_tensors(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_this_machine(dtype):
    """A kernel's two products cannot be faster than multiply-adds on registers; noise of a shared machine aside."""
    assert 1 < _load.module().fma_peak(dtype, 0.01) < 10000
    with pytest.raises(InputError, match="dtype: expected float32 or bfloat16, got float64"):
        _load.module().fma_peak("float64", 0.01)


def test_threads_survive_a_fork(tmp_path):
    """A forked worker (a data loader's) starts its own threads instead of waiting for its parent's."""
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, torch\n"
        "from avatar_rt.ops.attention import run_native\n"
        "x = torch.randn(1, 400, 2, 64)\n"
        "want = run_native(x, x, x, None, None, 1, 0, 0.1, num_threads=2)[0]\n"
        "child = os.fork()\n"
        "got = run_native(x, x, x, None, None, 1, 0, 0.1, num_threads=2)[0]\n"
        "ok = torch.equal(got, want)\n"
        "os._exit(0 if ok else 1) if child == 0 else None\n"
        "assert ok and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)


# --- the C interface ------------------------------------------------------------------------------------------------

C_PROGRAM = r"""
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "avatar_rt.h"

int main(void) {
    float q[2] = {1, 0}, k[4] = {0, 0, 0, 0}, v[4] = {1, 2, 3, 6}, out[2], lse;
    avatar_rt_attention_args a;
    memset(&a, 0, sizeof a);
    if (avatar_rt_attention(&a) != AVATAR_RT_INPUT_ERROR) return 1;
    if (!strstr(avatar_rt_last_error(), "struct_size: expected")) return 2;
    a.struct_size = sizeof a;
    a.dtype = AVATAR_RT_F32;
    a.batch = a.heads = a.num_frames = a.num_threads = 1;
    a.head_dim = 2;
    a.q.data = q; a.q.rows = 1;
    a.ref_k.data = k; a.ref_k.rows = 2; a.ref_k.row_stride = 2;
    a.ref_v.data = v; a.ref_v.rows = 2; a.ref_v.row_stride = 2;
    a.out = out; a.lse = &lse;
    a.strength = 1;
    if (avatar_rt_attention(&a) != AVATAR_RT_OK || avatar_rt_last_error()[0]) return 3;
    if (fabsf(out[0] - 2) > 1e-6f || fabsf(out[1] - 4) > 1e-6f || fabsf(lse - logf(2)) > 1e-6f) return 4;
    a.k.data = k; a.k.rows = 1; a.k.row_stride = 2;
    a.v.data = v; a.v.rows = 1; a.v.row_stride = 2;
    a.strength = 0;
    if (avatar_rt_attention(&a) != AVATAR_RT_OK || fabsf(out[0] - 1) > 1e-6f || fabsf(lse) > 1e-6f) return 6;
    a.strength = 2;
    if (avatar_rt_attention(&a) != AVATAR_RT_OK || fabsf(lse - logf(5)) > 1e-6f) return 7;
    a.struct_size = offsetof(avatar_rt_attention_args, strength); /* a caller of the first header */
    if (avatar_rt_attention(&a) != AVATAR_RT_OK || fabsf(lse - logf(3)) > 1e-6f) return 8;
    a.head_dim = 500;
    if (avatar_rt_attention(&a) != AVATAR_RT_INPUT_ERROR) return 5;
    printf("%d %s\n", avatar_rt_abi_version(), avatar_rt_last_error());
    return 0;
}
"""


def test_header_and_library_serve_a_c_program(root, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    library = root / "avatar_rt" / "libavatar_rt.so"
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    assert library.is_file(), "libavatar_rt.so is not built: run `pip install -e .`"
    source = tmp_path / "program.c"
    source.write_text(C_PROGRAM)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{root / 'csrc' / 'include'}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-lm"]
    subprocess.run([compiler, *flags, str(source), *link, "-o", str(tmp_path / "program")], check=True)
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert done.returncode == 0, f"check {done.returncode} failed"
    assert done.stdout == "1 q: expected D in 1..256, got 500\n"


def test_library_links_no_framework(root):
    library = ctypes.CDLL(str(root / "avatar_rt" / "libavatar_rt.so"))
    assert library.avatar_rt_abi_version() == _load.ABI_VERSION
    needed = subprocess.run(
        [sys.executable, "-c", "import avatar_rt._native, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert needed.stdout.strip() in ("True", "False")  # importing it works with or without torch
