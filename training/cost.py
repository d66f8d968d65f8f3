"""What one training step of VideoRefDiT costs, written down: multiplications, bytes kept for the backward, parameters.

The formulas follow models/dit.py and models/layers.py line by line; tests/test_estimate.py holds them against torch's
own counter, against the tensors that autograd saves, and against the optimisers' states. Letters as in models: T latent
frames, G generated rows, R reference rows, C width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from avatar_rt.config import AvatarConfig, DiTConfig, latents_of_frames
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT


@dataclass(frozen=True)
class Load:
    """The batch of one step, on the GPUs that share it by sequence.

    Attributes:
        batch: clips; frames: generated latent frames; patches: rows of a frame, its motion token aside.
        anchor_rows: rows of the scene or anchor latent; reference_frames, reference_patches: of the reference.
    """

    batch: int
    frames: int
    patches: int
    anchor_rows: int = 0
    reference_frames: int = 0
    reference_patches: int = 0

    def frame_rows(self, cfg: DiTConfig) -> int:
        return self.frames * (self.patches + bool(cfg.motion_dim))

    def generated(self, cfg: DiTConfig) -> int:
        return self.frame_rows(cfg) + self.anchor_rows

    def reference(self, cfg: DiTConfig) -> int:
        return self.reference_frames * (self.reference_patches + bool(cfg.motion_dim))


def load_of(cfg: AvatarConfig, batch: int, frames: int | None = None, reference_latents: int | None = None,
            height: int | None = None, width: int | None = None) -> Load:  # fmt: skip
    """The batch that a preset trains on: video ``frames`` (by default a chunk) at its size, and its reference."""
    step = cfg.vae.spatial_stride * cfg.dit.patch[1]
    h, w = height or cfg.height, width or cfg.width
    if h % step or w % step:
        raise InputError(f"height, width: expected multiples of {step}, got {h} and {w}")
    if frames is not None and frames < 1:
        raise InputError(f"frames: expected 1 or more, got {frames}")
    patches = (h // step) * (w // step)
    latents = cfg.chunk.latents if frames is None else latents_of_frames(frames)
    length = cfg.reference_latents if reference_latents is None else reference_latents
    return Load(batch, latents, patches, patches * cfg.dit.anchor, length * cfg.dit.reference, patches)


# ---- multiplications and additions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Additions and multiplications of one step, each counted; attention apart, because it runs at another rate."""

    linear_forward: float
    linear_backward: float
    attention_forward: float

    @property
    def model(self) -> float:
        """What the mathematics needs: MFU counts these. An attention's backward is twice its forward."""
        return self.linear_forward + self.linear_backward + 3 * self.attention_forward

    def executed(self, recompute: bool) -> float:
        linear, attention = self.parts(recompute)
        return linear + attention

    def parts(self, recompute: bool) -> tuple[float, float]:
        """What a machine runs: a fused attention's backward computes its scores again (5 products, not 4), and
        checkpointed blocks their forward."""
        again = 1 if recompute else 0
        return ((1 + again) * self.linear_forward + self.linear_backward, (3.5 + again) * self.attention_forward)


class _Sum:
    def __init__(self) -> None:
        self.forward = self.backward = self.attention = 0.0

    def linear(self, rows: float, width_in: float, width_out: float, *, grads: int = 2) -> None:
        """A product with a weight; ``grads`` 1 where its input is data, 0 where nothing comes back."""
        self.forward += 2 * rows * width_in * width_out
        self.backward += 2 * rows * width_in * width_out * grads

    def attend(self, queries: float, keys: float, width: float) -> None:
        self.attention += 4 * queries * keys * width


def step_flops(cfg: DiTConfig, load: Load) -> Flops:
    """Forward and backward of one step."""
    s, b, c, per = _Sum(), load.batch, cfg.dim, cfg.audio_per_latent
    g, rows, t = load.generated(cfg), load.frame_rows(cfg), load.frames
    r, t_ref = load.reference(cfg), load.reference_frames
    patch_in, layers = cfg.in_channels * cfg.patch[1] * cfg.patch[2], cfg.num_layers
    s.linear(b * (t * load.patches + load.anchor_rows + t_ref * load.reference_patches), patch_in, c, grads=1)
    if cfg.anchor_concat and load.anchor_rows:
        s.linear(b * load.patches, patch_in, c, grads=1)
    for frames, anchor in ((t, int(load.anchor_rows > 0)), (t_ref, 0)):
        s.linear(b * (frames + anchor), cfg.freq_dim, c, grads=1)
        s.linear(b * (frames + anchor), c, c)
        s.linear(b * (frames + anchor), c, 6 * c)
        if cfg.motion_dim:  # tokens, and their injection into the frame's modulation
            s.linear(2 * b * frames, cfg.motion_dim, c, grads=1)
    text = b * cfg.text_len + (cfg.text_len if r else 0)
    s.linear(text, cfg.text_dim, c, grads=1)
    s.linear(text, c, c)
    for frames, width in ((t, cfg.audio_dim), (t_ref, cfg.reference_audio_dim)):
        if width:
            s.linear(b * per * frames, width, c, grads=1)
            s.linear(b * per * frames, c, c)
    for _ in range(layers):
        s.linear(4 * b * g, c, c)
        s.attend(b * g, g + r, c)
        _cross_and_feed(s, cfg, b * g, b * cfg.text_len)
        if cfg.audio_dim:
            s.linear(2 * b * rows, c, c)
            s.linear(2 * b * per * t, c, c)
            s.attend(b * rows, 3 * per, c)
    if r:
        _reference(s, cfg, load)
    s.linear(b * t * load.patches, c, cfg.latent_channels * cfg.patch[1] * cfg.patch[2])
    if cfg.motion_dim:
        s.linear(b * t, c, cfg.motion_dim)
    return Flops(s.forward, s.backward, s.attention)


def _cross_and_feed(s: _Sum, cfg: DiTConfig, rows: float, context: float) -> None:
    """Cross-attention to the text (a context of ``context`` rows in all) and the feed-forward."""
    c = cfg.dim
    s.linear(2 * rows, c, c)
    s.linear(2 * context, c, c)
    s.attend(rows, cfg.text_len, c)
    s.linear(rows, c, cfg.ffn_dim)
    s.linear(rows, cfg.ffn_dim, c)


def _reference(s: _Sum, cfg: DiTConfig, load: Load) -> None:
    """Reference rows: q, k, v in every block, the rest in all but the last, whose q nobody uses."""
    b, c, per = load.batch, cfg.dim, cfg.audio_per_latent
    r, t, a = load.reference(cfg), load.reference_frames, cfg.audio_adapter_dim
    s.linear(2 * b * r, c, c)
    s.linear(b * r, c, c, grads=0)
    radius = {"frame": 0, "window": cfg.reference_window}.get(cfg.reference_pattern, t)
    seen = sum(min(f + radius, t - 1) - max(f - radius, 0) + 1 for f in range(t)) / t * (r / t)
    for _ in range(cfg.num_layers - 1):
        s.linear(4 * b * r, c, c)
        s.attend(b * r, seen, c)
        _cross_and_feed(s, cfg, b * r, cfg.text_len)
        if cfg.reference_audio_dim:
            s.linear(2 * b * r, c, c)
            s.linear(2 * b * per * t, c, c)
            s.attend(b * r, per, c)
            if a:
                s.linear(b * r + 2 * b * per * t, c, a)
                s.linear(b * r + 2 * b * per * t, a, c)


# ---- bytes kept for the backward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps: of a generated and of a reference block each, of their inputs alone (what a
    checkpointed block keeps), of the stacked reference K and V of all blocks, and outside of the blocks."""

    block: float
    reference_block: float
    block_input: float
    reference_input: float
    reference_kv: float
    outside: float

    def total(self, layers: int, recompute: bool) -> float:
        """At its peak, over ``layers`` blocks; with recomputation one block's share is there besides all inputs."""
        shared = self.reference_kv + self.outside
        if recompute:
            inputs = layers * self.block_input + (layers - 1) * self.reference_input
            return shared + inputs + max(self.block, self.reference_block)
        return shared + layers * self.block + (layers - 1) * self.reference_block


def saved_bytes(cfg: DiTConfig, load: Load, itemsize: int) -> Saved:
    """What the backward of a step needs, with weights of ``itemsize`` bytes.

    In widths C of a row, fp32 (the residual stream and what norms keep) + the weights' dtype: a generated row 5 + 13
    (inputs of both modulations, of norm3, of the text query's norm twice; q and k before and after norm and rotation,
    v, the attention's output and the inputs of its two products, the same of the text, both gates), a row that hears
    3 + 3 more, a reference row 8 + 17 with its speech and adapters.
    """
    b, c, n, per = load.batch, cfg.dim, cfg.num_heads, cfg.audio_per_latent
    g, rows, t = load.generated(cfg), load.frame_rows(cfg), load.frames
    r, t_ref, a = load.reference(cfg), load.reference_frames, cfg.audio_adapter_dim
    p = itemsize
    block = b * g * (c * (5 * 4 + 13 * p) + 2 * p * cfg.ffn_dim + 4 * (3 + 2 * n))
    block += b * cfg.text_len * c * (2 * 4 + 2 * p) + b * (t + 1) * 6 * c * 4
    if cfg.audio_dim:
        block += b * rows * (c * (3 * 4 + 3 * p) + 4 * (3 + n)) + b * t * per * c * (2 * 4 + 3 * 2 * p)
    reference = 0.0
    if r:
        heard = bool(cfg.reference_audio_dim)
        wide, narrow = (8, 15 + 2 * bool(a)) if heard else (5, 13)
        reference = b * r * (c * (wide * 4 + narrow * p) + 2 * p * cfg.ffn_dim + 4 * (8 + 2 * n))
        reference += cfg.text_len * c * (2 * 4 + b * 2 * p) + b * t_ref * 6 * c * 4
        if heard:
            reference += b * per * t_ref * (c * (2 * 4 + 4 * p) + 4 * p * a) + b * r * (2 * p * a + 4 * n)
    outside = b * (t * load.patches * c * 2 * 4 + (t + t_ref) * 10 * c * 4)
    outside += b * (cfg.text_len + per * (t + t_ref)) * c * 3 * p
    if itemsize < 4:  # timestep arithmetic and heads run in fp32: autograd keeps the weights' fp32 copies, of each side
        outside += (1 + bool(r)) * 4 * (7 * c * c + cfg.freq_dim * c) + 4 * c * (
            cfg.latent_channels * 4 + cfg.motion_dim
        )
    kv = 2 * cfg.num_layers * b * r * c * p
    return Saved(block, reference, b * g * c * 4.0, b * r * c * 4.0, float(kv), float(outside))


# ---- parameters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: ``muon`` are the matrices of the blocks, ``adamw`` all others; ``block``: of one block.
    ``orthogonalise``: FLOPs of one Muon step over all matrices (five Newton-Schulz iterations, arXiv 2502.16982)."""

    muon: int
    adamw: int
    block: int
    orthogonalise: float

    @property
    def total(self) -> int:
        return self.muon + self.adamw


def uses_muon(name: str, parameter: torch.Tensor) -> bool:
    """The rule of training/train.py: matrices of hidden layers."""
    return parameter.ndim == 2 and "blocks." in name


@lru_cache(maxsize=16)
def count_parameters(cfg: DiTConfig) -> Parameters:
    with torch.device("meta"):
        module: nn.Module = VideoRefDiT(cfg)
    named = list(module.named_parameters())
    muon = [p for n, p in named if uses_muon(n, p)]
    block = sum(p.numel() for n, p in named if n.startswith("blocks.0."))
    return Parameters(_size(muon), _size(p for n, p in named if not uses_muon(n, p)), block,
                      sum(_newton_schulz(*p.shape) for p in muon))  # fmt: skip


def _size(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _newton_schulz(rows: int, columns: int) -> float:
    """Five times X X^T, its square, and their product with X, for the smaller side m: 4 m^2 n + 2 m^3."""
    m, n = sorted((rows, columns))
    return 5.0 * (4 * m * m * n + 2 * m**3)
