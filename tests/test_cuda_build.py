"""The CUDA kernels compile without a GPU, within their registers; a machine without a driver is told so."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch

from avatar_rt.errors import UnsupportedError
from avatar_rt.ops import _cuda, _load, explain, sparse_reference_attention

NATIVE = _load.native()[0]


@pytest.fixture
def report(root):
    spec = importlib.util.spec_from_file_location("cuda_report", root / "csrc" / "cuda" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_compile_without_spills(root, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    for tool in ("cmake", "ninja"):
        pytest.importorskip(tool)
    command = [sys.executable, str(root / "csrc" / "cuda" / "report.py"), "--kernels-only", "--build", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90a") == 4
    assert done.stdout.count("sm_80") == 4


def test_the_report_notices(report):
    entry = "ptxas info : Compiling entry function '_Z21attention_sm80_kernelINS0_4Bf16ELi64EEEv' for 'sm_80'\n"
    clean = entry + "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info : Used 7 registers\n"
    rows = report.parse(clean)
    assert rows == [
        {"kernel": "sm80", "dtype": "bf16", "d": 64, "arch": "sm_80", "stack": 0, "spilled": 0, "registers": 7}
    ]
    assert len(report.faults(clean, rows)) == 11  # the kernels that are missing
    spilled = clean.replace("0 bytes spill loads", "8 bytes spill loads")
    assert report.faults(spilled, report.parse(spilled))[0] == "attention sm80 bf16 d=64 for sm_80 spills 8 bytes"
    serial = (
        clean + "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    )
    assert "serialized" in report.faults(serial, rows)[0]


def test_refusal_names_the_reason():
    reason = NATIVE.cuda_attention_refusal(0)
    if not hasattr(NATIVE, "cuda_attention"):
        assert reason == "avatar_rt._native was built without the CUDA attention kernels: run `make cuda`"
    elif not torch.cuda.is_available():
        assert reason in ("no CUDA driver is loaded", "no CUDA device is visible")
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    assert explain("sparse_reference_attention", q, q, q, None, None, 0.1)["cuda"] == "q is on cpu"


def on_gpu(*shape, dtype=torch.bfloat16):
    """A tensor whose device says cuda, on any machine: refusals read nothing else."""
    with torch.device("meta"):
        x = torch.empty(*shape, dtype=dtype)
    return _Elsewhere(x)


class _Elsewhere:
    def __init__(self, x):
        self._x, self.device = x, torch.device("cuda:0")

    def __getattr__(self, name):
        return getattr(self._x, name)

    def data_ptr(self):
        return 1024


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda: [on_gpu(1, 4, 2, 64, dtype=torch.float32)], "dtype float32 is neither bfloat16 nor float16"),
        (lambda: [on_gpu(1, 4, 2, 32)], "D=32 is neither 64 nor 128"),
        (
            lambda: [on_gpu(1, 4, 2, 64), _Elsewhere(on_gpu(1, 4, 2, 68)._x[..., :64])],
            "k does not lie at multiples of 16 bytes (strides [544, 136, 68, 1])",
        ),
    ],
)
def test_refusals(args, reason):
    given = args()
    assert _cuda.refuses_attention(*given, *[None] * (5 - len(given))) == reason


def test_a_call_without_a_driver_fails_with_a_sentence():
    if not hasattr(NATIVE, "cuda_attention") or torch.cuda.is_available():
        pytest.skip("needs a build with the CUDA kernels and no GPU")
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    arg = _load.arg(q)
    with pytest.raises(UnsupportedError, match="no CUDA driver is loaded"):
        NATIVE.cuda_attention(arg, arg, arg, None, None, q.data_ptr(), 0, 0.1, 1, 0, 1.0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_it_is_what_the_emulation_computes():
    """Not the same bits: tensor cores add in an order of their own."""
    args = [torch.randn(2, n, 3, 64, dtype=torch.bfloat16) for n in (300, 200, 200, 150, 150)]
    reason = _cuda.refuses_attention(*[x.cuda() for x in args])
    if reason is not None:
        pytest.skip(reason)
    got = sparse_reference_attention(*[x.cuda() for x in args], return_lse=True)
    for a, b in zip(got, _cuda.attention_emulated(*args, 1, 0, 0.125)):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2)
