"""Every Triton kernel as it ships, compiled for GPUs that are not here: it fits each chip and uses its matrix units."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ahead_of_time import SHARED_BYTES, compile_ahead

from avatar_rt.kernels import attention as forward
from avatar_rt.kernels import attention_backward as backward
from avatar_rt.kernels import conv, flow, norm
from avatar_rt.kernels._launch import Launch

HEADS, ROWS, FRAMES = 12, 1560 * 4, 4  # four latent frames of 480 x 832
MAX_SPILLS = {80: 16, 90: 0, 120: 0}  # bytes per thread
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 120: "mma.sync"}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launch(kernel: str, dim: int, arch: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    q, k, v, ref_k, ref_v, out, grad = (rows(2, ROWS, HEADS, dim, dtype=dtype) for _ in range(7))
    lse = rows(2, HEADS, ROWS, dtype=torch.float32)
    numbers = (FRAMES, 1, dim**-0.5, 0.0, arch)
    if kernel == "forward":
        return forward.forward_launch(q, k, v, ref_k, ref_v, out, lse, *numbers)
    if kernel == "dq":
        return backward.dq_launch(q, k, v, ref_k, ref_v, grad, lse, lse, out, *numbers)
    return backward.dkv_launch(q, k, v, grad, lse, lse, out, out, *numbers)


def small_launch(kernel: str) -> Launch:
    x, modulation, index = rows(1, ROWS, 1536), rows(1, FRAMES, 1536), rows(ROWS, dtype=torch.int64)
    if kernel == "delta":
        out = rows(2, ROWS, HEADS, 128)
        lse = rows(2, HEADS, ROWS, dtype=torch.float32)
        return backward.delta_launch(out, lse, out, lse)
    if kernel == "qk_norm_rope":
        heads, table = x.unflatten(-1, (HEADS, 128)), rows(ROWS, 64, dtype=torch.float32)
        return norm.qk_norm_rope_launch(heads, rows(1536), table, table, 1e-6, heads)
    if kernel == "layernorm_modulate":
        return norm.layernorm_modulate_launch(x, modulation, modulation, index, 1e-6, x)
    if kernel == "gate_residual":
        return norm.gate_residual_launch(x, x, modulation, None, x)
    if kernel == "with_past":
        return conv.with_past_launch(rows(1, 96, 4, 60, 104), None, rows(1, 96, 6, 60, 104), rows(1, 96, 2, 60, 104))
    return flow.flow_step_launch(x, x, -0.1, x)


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_attention(kernel, dim, arch):
    compiled = compile_ahead(attention_launch(kernel, dim, arch), arch)
    print(
        f"{kernel} D={dim} sm_{arch}: {compiled.shared} B shared, {compiled.registers} registers, {compiled.spills} B"
    )
    assert compiled.shared <= SHARED_BYTES[arch]
    assert MATRIX[arch] in compiled.ptx
    assert compiled.spills <= MAX_SPILLS[arch]


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_attention_in_fp32_fits_the_smallest_chip(kernel):
    compiled = compile_ahead(attention_launch(kernel, 128, 120, torch.float32), 120)
    assert compiled.shared <= SHARED_BYTES[120]
    assert "tf32" not in compiled.ptx


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize(
    "kernel", ["delta", "qk_norm_rope", "layernorm_modulate", "gate_residual", "with_past", "flow_step"]
)
def test_memory_bound(kernel, arch):
    compiled = compile_ahead(small_launch(kernel), arch)
    assert compiled.shared <= 4096
    assert compiled.spills == 0
    assert "ld.global.v4" in compiled.ptx  # 16 bytes per thread
