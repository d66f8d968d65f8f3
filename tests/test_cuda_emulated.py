"""The CUDA attention kernels, lane by lane in software: everything above their instructions, on any machine.

What this runs is the code that nvcc compiles: walking segments and bands, masks, online softmax, fragment and shared
memory layouts, the order of copies, barriers and products. Only the instruction wrappers are other ones.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_accurate, doubled
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.ops import _cuda, _load

NATIVE = _load.native()[0]
KERNELS = ("sm80", "sm90")
DTYPES = (torch.bfloat16, torch.float16)

# (batch, queries, fresh rows, reference rows, heads, head dim): smallest, ragged, one segment, several tiles each way.
SHAPES = [
    (1, 1, 1, None, 1, 64),
    (1, 1, None, 1, 1, 128),
    (2, 70, 97, 5, 3, 64),
    (1, 65, 3, 191, 2, 128),
    (1, 5, None, 96, 2, 128),
    (1, 17, 192, None, 2, 64),
    (1, 128, 128, 128, 1, 64),
    (1, 129, 257, 385, 1, 128),
    (1, 300, 420, 700, 2, 64),
]


def make(batch: int, rows: int | None, heads: int, dim: int, dtype: torch.dtype) -> Tensor | None:
    """A strided [B, L, N, D] at multiples of 16 bytes, inside a larger buffer whose other elements are NaN."""
    if rows is None:
        return None
    buffer = torch.full((batch, heads + 1, rows + 2, dim + 24), float("nan"), dtype=dtype)
    view = buffer[:, :heads, 1 : rows + 1, 8 : dim + 8].transpose(1, 2)
    return view.copy_(torch.randn(view.shape))


def inputs(shape: tuple, dtype: torch.dtype) -> list[Tensor | None]:
    batch, queries, fresh, reference, heads, dim = shape
    return [make(batch, n, heads, dim, dtype) for n in (queries, fresh, fresh, reference, reference)]


def added(q, k, ref_k, num_frames: int, radius: int, strength: float) -> Tensor:
    """What is added to the scores [L, S + R]: nothing, -inf outside the band, log(strength) on the reference."""
    queries, fresh, reference = q.shape[1], 0 if k is None else k.shape[1], 0 if ref_k is None else ref_k.shape[1]
    mask = torch.zeros(queries, fresh + reference, dtype=torch.float64)
    mask[:, fresh:] = math.log(strength) if strength else float("-inf")
    if num_frames > 1:
        frame = torch.arange(queries) // (queries // num_frames)
        mask[:, :fresh].masked_fill_((frame[:, None] - frame).abs() > radius, float("-inf"))
    return mask


def joined(k, v, ref_k, ref_v) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat([x for x in p if x is not None], 1).transpose(1, 2) for p in ((k, ref_k), (v, ref_v)))


def dense(q, k, v, ref_k, ref_v, num_frames, radius, scale, strength=1.0) -> tuple[Tensor, Tensor]:
    keys, values = joined(k, v, ref_k, ref_v)
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) * scale
    scores = scores + added(q, k, ref_k, num_frames, radius, strength).to(q.dtype)
    return (scores.softmax(-1) @ values).transpose(1, 2), scores.logsumexp(-1)


def plain(q, k, v, ref_k, ref_v, num_frames, radius, scale, strength=1.0) -> Tensor:
    """torch's own attention on the same inputs in their dtype."""
    mask = added(q, k, ref_k, num_frames, radius, strength)
    mask = mask.to(q.dtype) if mask.any() else None
    keys, values = joined(k, v, ref_k, ref_v)
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale
    ).transpose(1, 2)


def check(args: list[Tensor | None], num_frames: int, radius: int, strength: float, kernel: str) -> None:
    call = (*args, num_frames, radius, args[0].shape[-1] ** -0.5, strength)
    out, lse = _cuda.attention_emulated(*call, kernel=kernel)
    truth, truth_lse = dense(*doubled(*args), *call[5:])
    assert_accurate(out, plain(*call), truth)
    wide = [None if x is None else x.float() for x in args]
    assert_accurate(lse, dense(*wide, *call[5:])[1], truth_lse)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_accuracy(shape, dtype, kernel):
    check(inputs(shape, dtype), 1, 0, 1.0, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_frames", "radius", "reference", "dim"),
    [
        (6, 6, 1, None, 64),
        (85, 5, 1, 130, 128),
        (280, 4, 0, 3, 64),
        (84, 3, 7, 9, 64),
        (390, 3, 0, 200, 128),
        (384, 3, 1, None, 64),
    ],
)
def test_local_accuracy(rows, num_frames, radius, reference, dim, dtype, kernel):
    check(inputs((2, rows, rows, reference, 1, dim), dtype), num_frames, radius, 1.0, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.5, 40.0])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_strength(strength, num_frames, kernel):
    args = inputs((1, 85, 85, 130, 2, 64), torch.bfloat16)
    check(args, num_frames, 1, strength, kernel)
    if strength == 0:
        without = _cuda.attention_emulated(*args[:3], None, None, num_frames, 1, 0.125, kernel=kernel)
        for a, b in zip(_cuda.attention_emulated(*args, num_frames, 1, 0.125, 0.0, kernel=kernel), without):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_scores(dtype, kernel):
    """Scores far apart and a maximum that keeps rising: every tile rescales what came before."""
    q, k, v, ref_k, ref_v = inputs((1, 33, 300, 200, 1, 64), dtype)
    q.copy_(torch.ones(q.shape))
    k.copy_(torch.linspace(-8, 2, 300)[None, :, None, None].expand(k.shape))
    ref_k.copy_(torch.linspace(2, 9, 200)[None, :, None, None].expand(ref_k.shape))
    call = (q, k, v, ref_k, ref_v, 1, 0, 0.5)
    truth, _ = dense(*doubled(*call[:5]), *call[5:])
    assert_accurate(_cuda.attention_emulated(*call, kernel=kernel)[0], plain(*call), truth)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("num_frames", "radius"), [(1, 0), (10, 2)])
def test_result_depends_on_its_own_row_only(num_frames, radius, kernel):
    """Bit for bit: not on a repeat, on batch neighbours, on other heads, on other queries or on strides."""
    args = inputs((2, 150, 150, 99, 2, 64), torch.bfloat16)
    rest = (num_frames, radius, 0.125, 1.5)
    out, lse = _cuda.attention_emulated(*args, *rest, kernel=kernel)
    again, again_lse = _cuda.attention_emulated(*[x.contiguous() for x in args], *rest, kernel=kernel)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    alone, _ = _cuda.attention_emulated(*[x[1:, :, 1:] for x in args], *rest, kernel=kernel)
    assert torch.equal(out[1:, :, 1:], alone)
    args[0][0, 3] = float("nan")
    poisoned, _ = _cuda.attention_emulated(*args, *rest, kernel=kernel)
    assert poisoned[0, 3].isnan().all()
    poisoned[0, 3] = out[0, 3]
    assert torch.equal(out, poisoned)
    if num_frames == 1:
        few, few_lse = _cuda.attention_emulated(args[0][:, 77:80], *args[1:], *rest, kernel=kernel)
        assert torch.equal(out[:, 77:80], few)
        assert torch.equal(lse[:, :, 77:80], few_lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_band_is_the_same_whatever_its_neighbours_see(kernel):
    """Rows of one frame, among frames of the same tile of queries or as the only rows that matter."""
    q, k, v, ref_k, ref_v = inputs((1, 150, 150, 70, 1, 64), torch.bfloat16)
    banded, banded_lse = _cuda.attention_emulated(q, k, v, ref_k, ref_v, 15, 0, 0.125, kernel=kernel)
    own = slice(0, 10)
    alone, alone_lse = _cuda.attention_emulated(
        q[:, own], k[:, own], v[:, own], ref_k, ref_v, 1, 0, 0.125, kernel=kernel
    )
    assert torch.equal(banded[:, own], alone)
    assert torch.equal(banded_lse[..., own], alone_lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_in_a_visible_key_is_not_lost(kernel):
    """Whichever way its exponential is computed."""
    for key in range(16):
        q, k, v, _, _ = inputs((1, 3, 16, None, 1, 64), torch.bfloat16)
        k[0, key] = float("nan")
        assert _cuda.attention_emulated(q, k, v, None, None, 1, 0, 0.125, kernel=kernel)[0].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_repeated_operands(kernel):
    """A reference shared by the batch and the heads has strides of 0 there."""
    q, k, v, ref_k, ref_v = inputs((2, 40, 20, 33, 2, 64), torch.bfloat16)
    ref_k, ref_v = (x[:1, :, :1].expand(2, -1, 2, -1) for x in (ref_k, ref_v))
    repeated = _cuda.attention_emulated(q, k, v, ref_k, ref_v, 1, 0, 0.125, kernel=kernel)
    copied = _cuda.attention_emulated(q, k, v, ref_k.clone(), ref_v.clone(), 1, 0, 0.125, kernel=kernel)
    assert torch.equal(repeated[0], copied[0])
    assert torch.equal(repeated[1], copied[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_queries_and_empty_segments(kernel):
    q, k, v, ref_k, ref_v = inputs((2, 9, 4, 3, 2, 64), torch.bfloat16)
    rest = (1, 0, 0.125)
    assert _cuda.attention_emulated(q[:, :0], k, v, None, None, *rest, kernel=kernel)[0].shape == (2, 0, 2, 64)
    without = _cuda.attention_emulated(q, k, v, None, None, *rest, kernel=kernel)[0]
    assert torch.equal(_cuda.attention_emulated(q, k, v, ref_k[:, :0], ref_v[:, :0], *rest, kernel=kernel)[0], without)
    assert torch.equal(_cuda.attention_emulated(q, None, None, k, v, *rest, kernel=kernel)[0], without)


def row(rows=4, heads=2, dim=64, dtype=torch.bfloat16):
    return torch.zeros(1, rows, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("args", "rest", "sentence"),
    [
        ([row(dim=32)] * 3, (1, 0, 0.1), "q: expected D of 64 or 128, got 32"),
        ([row(dtype=torch.float32)] * 3, (1, 0, 0.1), "q: expected dtype bfloat16 or float16, got float32"),
        ([row(), row(heads=3), row()], (1, 0, 0.1), "k: expected N=2, got 3 (shape [1, 4, 3, 64] for [B, S, N, D])"),
        ([row(), row(5), row(6)], (1, 0, 0.1), "v: expected S=5, got 6"),
        ([row(), None, None], (1, 0, 0.1), "k, ref_k: expected at least one key row, got none"),
        ([row()] * 3, (3, 0, 0.1), "num_frames: expected a divisor of L=4, got 3"),
        ([row()] * 3, (2, -1, 0.1), "radius: expected 0 or more frames, got -1"),
        ([row()] * 3, (1, 0, 0.0), "scale: expected a finite number above 0, got 0.0"),
        ([row()] * 3, (1, 0, 0.1, -1.0), "strength: expected a finite number of 0 or more, got -1.0"),
        ([row(dim=65)[..., 1:]] * 3, (1, 0, 0.1), "q: expected an address of a multiple of 16 bytes"),
        ([row(dim=68)[..., :64]] * 3, (1, 0, 0.1), "q: expected a head stride of a multiple of 16 bytes, got 136"),
        (
            [row(), row(1).expand(1, 4, 2, 64), row()],
            (1, 0, 0.1),
            "k: expected a row stride of a multiple of 16 bytes, got 0",
        ),
    ],
)
def test_faults(args, rest, sentence):
    with pytest.raises(InputError) as caught:
        _cuda.attention_emulated(*args, None, None, *rest)
    assert sentence in str(caught.value)


def test_blocks_fit_their_chips():
    """Dynamic shared memory: two blocks of sm_80 beside each other, one of sm_90."""
    for kernel in NATIVE.cuda_attention_kernels():
        bytes_ = kernel["shared_bytes"] + 1024  # that the system takes per block
        assert bytes_ <= (164 * 1024 // 2 if kernel["kernel"] == "sm80" else 228 * 1024)
