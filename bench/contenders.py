"""The attention tasks of ``python -m bench.ops``: shapes of the presets, who competes on them, and the fp64 truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt import ops
from avatar_rt.config import FPS, PRESETS, AvatarConfig
from avatar_rt.errors import UnsupportedError
from bench.harness import Contender, Judge

TRUTH_FLOPS = 1e11  # above it the truth is computed for SAMPLED rows of the result
SAMPLED = 128
FEWEST_ROWS = 256
OURS, PACKED = "ours", "ours, reference packed"
SDPA, DENSE = "torch SDPA, K/V in one piece", "dense over everything"


@dataclass(frozen=True)
class Shape:
    """G generated rows over G + R rows. ``part`` says what share of a preset's call it is, where that is too large."""

    name: str
    rows: int
    reference: int
    heads: int
    head_dim: int
    batch: int = 1
    part: str = ""

    @property
    def flops(self) -> int:
        """Of the target rows, forward."""
        return 4 * self.batch * self.heads * self.head_dim * self.rows * (self.rows + self.reference)

    def words(self) -> str:
        size = f"B{self.batch} H{self.heads} G={self.rows} R={self.reference} d={self.head_dim}"
        return f"{size} ({self.part})" if self.part else size


def preset_shape(cfg: AvatarConfig, seconds: float) -> Shape:
    """The call that one block makes in one pass: a chunk and the anchor over themselves and the reference clip."""
    per_frame = cfg.tokens_per_frame + bool(cfg.dit.motion_dim)
    rows = cfg.chunk.latents * per_frame + cfg.tokens_per_frame * cfg.dit.anchor
    reference = math.ceil(seconds * FPS / cfg.vae.temporal_stride) * per_frame
    return Shape(f"{cfg.name} {seconds:g} s", rows, reference, cfg.dit.num_heads, cfg.dit.head_dim)


def cut_to(shape: Shape, flops: float) -> Shape:
    """A part of a call that costs about ``flops``: fewer heads, then fewer generated rows, never fewer reference rows.

    Heads and generated rows do not know of each other, so a rate measured on a part is a rate of the whole; every
    contender gets the same part. What a kernel does once per call (packing) weighs more in it than in the whole.
    """
    if shape.flops <= flops:
        return shape
    heads = max(1, int(shape.heads * flops / shape.flops))
    small, rows = replace(shape, heads=heads), shape.rows
    while small.flops > flops and rows > 2 * FEWEST_ROWS:
        rows //= 2
        small = replace(small, rows=rows)
    return replace(small, part=f"of {shape.heads} heads, G={shape.rows}")


def preset_shapes(seconds: tuple[float, ...], flops: float) -> list[Shape]:
    return [cut_to(preset_shape(cfg, s), flops) for cfg in PRESETS.values() for s in seconds]


class Inputs(NamedTuple):
    """[B, L, N, D] each: queries and fresh rows, reference rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    ref_k: Tensor
    ref_v: Tensor

    @property
    def moved(self) -> int:
        """Bytes that a call cannot do without moving: every operand once, and the result."""
        return sum(x.numel() * x.element_size() for x in (*self, self.q))


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    sizes = [shape.rows] * 3 + [shape.reference] * 2
    tensors = (torch.randn(shape.batch, n, shape.heads, shape.head_dim, generator=generator) for n in sizes)
    return Inputs(*(x.to(dtype).to(device) for x in tensors))


# --- what users have -------------------------------------------------------------------------------------------------


def joined(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, K, V as torch's SDPA likes them best, [B, N, L, D], contiguous."""
    keys, values = torch.cat([x.k, x.ref_k], 1), torch.cat([x.v, x.ref_v], 1)
    return tuple(t.transpose(1, 2).contiguous() for t in (x.q, keys, values))  # type: ignore[return-value]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[B, N, L, D] in, [B, L, N, D] out."""
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def concatenate_and_sdpa(x: Inputs) -> Tensor:
    keys, values = torch.cat([x.k, x.ref_k], 1), torch.cat([x.v, x.ref_v], 1)
    return sdpa(x.q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))


def dense(x: Inputs) -> Tensor:
    """Attention of all rows over all rows, as one writes it first; the target's rows of it."""
    rows = [torch.cat([a, b], 1).transpose(1, 2) for a, b in ((x.q, x.ref_k), (x.k, x.ref_k), (x.v, x.ref_v))]
    return sdpa(*rows)[:, : x.q.shape[1]]


def two_calls(x: Inputs, frame: int) -> Tensor:
    """The sparse mask without a cache: target over all, and each reference frame over itself."""
    own = [t.unflatten(1, (-1, frame)).flatten(0, 1).transpose(1, 2) for t in (x.ref_k, x.ref_k, x.ref_v)]
    sdpa(*own)
    return concatenate_and_sdpa(x)


def merged(x: Inputs) -> Tensor:
    """Fresh and reference in a call each, merged by their LSE: nothing is concatenated."""
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if x.q.device.type == "cpu" else "")
    flash = getattr(torch.ops.aten, name)
    q = x.q.transpose(1, 2)
    (a, lse_a, *_), (b, lse_b, *_) = (
        flash(q, k.transpose(1, 2), v.transpose(1, 2)) for k, v in ((x.k, x.v), (x.ref_k, x.ref_v))
    )
    lse = torch.logaddexp(lse_a, lse_b)
    out = a * (lse_a - lse).exp()[..., None] + b * (lse_b - lse).exp()[..., None]
    return out.to(x.q.dtype).transpose(1, 2)


def flex(x: Inputs) -> Callable[[], Tensor]:
    """FlexAttention over concatenated keys; compiling it takes up to a minute per shape on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, (q, k, v) = torch.compile(flex_attention, dynamic=False), joined(x)
    return lambda: compiled(q, k, v).transpose(1, 2)


def backend(name: str, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """SDPA held to one backend of torch's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(*tensors)

    return call


# --- forward ---------------------------------------------------------------------------------------------------------


def implementation(op: str, *args: Any) -> str:
    """Who runs a call of ours: cuda, triton, cpu or reference."""
    arguments = getattr(torch.ops.avatar_rt, op).default._schema.arguments
    args = args + (1.0,) * (len(arguments) - len(args))  # strength, where the schema has it
    return next((name for name, reason in ops.explain(op, *args).items() if reason is None), "none")


def ours(x: Inputs) -> Contender:
    ran = implementation("sparse_reference_attention", *x, x.q.shape[-1] ** -0.5)
    return Contender(OURS, lambda: ops.sparse_reference_attention(*x), kind="ours", notes={"implementation": ran})


def _packed(x: Inputs, storages: tuple[str | None, ...] = (None, "int8")) -> list[Contender]:
    """The reference packed beforehand, as is done once per request; nothing where the backend cannot."""
    if not hasattr(ops, "pack_reference"):
        return []
    found = []
    for storage in storages:
        try:
            packed = ops.pack_reference(x.ref_k, x.ref_v, storage=storage)
        except UnsupportedError:
            continue
        size = sum(t.numel() * t.element_size() for t in packed if isinstance(t, Tensor))
        plain = sum(t.numel() * t.element_size() for t in (x.ref_k, x.ref_v))
        call = lambda p=packed: ops.sparse_reference_attention(x.q, x.k, x.v, packed=p)  # noqa: E731
        name = PACKED + (f" as {storage}" if storage else "")
        notes = {"reference_bytes_over_plain": size / plain}
        found.append(Contender(name, call, kind="ours", coarse=storage is not None, notes=notes))
    return found


def forward(x: Inputs, *, everybody: bool = True, with_flex: bool = False) -> list[Contender]:
    """Target rows over all rows; without ``everybody``, ours and the baseline."""
    whole = joined(x)
    found = [ours(x), *_packed(x), Contender(SDPA, lambda: sdpa(*whole), kind="baseline")]
    if not everybody:
        return found
    found.append(Contender("concatenate, torch SDPA", lambda: concatenate_and_sdpa(x)))
    if x.q.device.type == "cpu" or x.q.dtype != torch.float32:
        found.append(Contender("two SDPA calls, merged by LSE", lambda: merged(x)))
    if x.q.device.type == "cuda" and x.q.dtype != torch.float32:
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            found.append(Contender(f"torch SDPA, {name.split('_')[0].lower()}", backend(name, whole)))
    if with_flex or x.q.device.type == "cuda":
        found.append(Contender("FlexAttention", flex(x)))
    return found


def cached_step(x: Inputs, frame: int, dense_repeats: int) -> list[Contender]:
    """A step that reads the reference from a cache, against what one writes without the idea of a cache."""
    g, r = x.q.shape[1], x.ref_k.shape[1]
    task = g * (g + r)
    return [
        ours(x),
        *_packed(x, (None,)),
        Contender(DENSE, lambda: dense(x), "baseline", dense_repeats, (g + r) ** 2 / task),
        Contender("two SDPA calls, no cache", lambda: two_calls(x, frame), pairs=(task + r * frame) / task),
    ]


def reference_judge(x: Inputs) -> Judge:
    """fp64 truth from the op's definition: all rows or, of a large call, SAMPLED ones; always over all keys."""
    index = None
    if 4 * x.q.numel() * (x.k.shape[1] + x.ref_k.shape[1]) > TRUTH_FLOPS and x.q.shape[1] > SAMPLED:
        index = torch.linspace(0, x.q.shape[1] - 1, SAMPLED).round().long().to(x.q.device)

    def pick(t: Tensor) -> Tensor:
        return t if index is None else t[:, index]

    q, wide = pick(x.q), [t.double() for t in (x.k, x.v, x.ref_k, x.ref_v)]
    rows = max(1, int(2**26 / (q.shape[0] * q.shape[2] * (wide[0].shape[1] + wide[2].shape[1]))))
    with ops.force("sparse_reference_attention", "reference"):
        truth = torch.cat([ops.sparse_reference_attention(part.double(), *wide) for part in q.split(rows, 1)], 1)
    return Judge([truth], [concatenate_and_sdpa(x._replace(q=q))], pick)


def int8_judge(judge: Judge, x: Inputs) -> Judge:
    """The same truth; plain torch gets the reference as symmetric int8 with a scale per row and head keeps it."""

    def rounded(t: Tensor) -> Tensor:
        scale = t.float().abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
        return ((t.float() / scale).round() * scale).to(t.dtype)

    shown = x._replace(q=judge.pick(x.q), ref_k=rounded(x.ref_k), ref_v=rounded(x.ref_v))
    return replace(judge, plain=[concatenate_and_sdpa(shown)])


# --- backward --------------------------------------------------------------------------------------------------------


def backward(x: Inputs) -> list[Contender]:
    """Gradients of q, k, v, ref_k, ref_v from a saved forward pass."""
    grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(2)).to(x.q)
    leaves = [t.detach().clone().requires_grad_() for t in x]
    out = ops.sparse_reference_attention(*leaves)
    whole = [t.detach().requires_grad_() for t in joined(x)]
    out_torch, fresh = sdpa(*whole), x.k.shape[1]

    def by_torch() -> tuple[Tensor, ...]:
        dq, dk, dv = (t.transpose(1, 2) for t in torch.autograd.grad(out_torch, whole, grad, retain_graph=True))
        return dq, dk[:, :fresh], dv[:, :fresh], dk[:, fresh:], dv[:, fresh:]

    return [
        Contender(OURS, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), kind="ours"),
        Contender(SDPA, by_torch, kind="baseline"),
    ]


def backward_judge(x: Inputs, plain: tuple[Tensor, ...]) -> Judge:
    """fp64 gradients of plain attention, one head at a time; ``plain`` are torch SDPA's."""
    grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(2)).to(x.q)
    parts: list[tuple[Tensor, ...]] = []
    for n in range(x.q.shape[2]):
        leaves = [t[:, :, n].double().requires_grad_() for t in x]
        q, k, v, ref_k, ref_v = leaves
        scores = q @ torch.cat([k, ref_k], 1).transpose(1, 2) * q.shape[-1] ** -0.5
        out = scores.softmax(-1) @ torch.cat([v, ref_v], 1)
        parts.append(torch.autograd.grad(out, leaves, grad[:, :, n].double()))
    return Judge([torch.stack(p, 2) for p in zip(*parts, strict=True)], list(plain))
