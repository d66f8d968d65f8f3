"""Parts of VideoRefDiT: attention modules, the block, the heads, positions. Wan 2.1 lineage (arXiv 2503.20314)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt import ops
from avatar_rt.config import DiTConfig
from avatar_rt.models.spread import ReferenceRows, Share, Span
from avatar_rt.ops import PackedReference


def linear_fp32(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` in fp32 whatever the weights' dtype: timestep arithmetic is never rounded to bf16."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of ``1000 t``, cosines first. t: any shape, 1 is noise, 0 is data. Returns [..., dim] fp32."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = 1000.0 * t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rope_table(position: Tensor, dims: tuple[int, int, int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [L, D/2] fp32 of 3-D rotary positions [L, 3] (time, height, width)."""
    angles = []
    for axis, dim in enumerate(dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
        angles.append(position[:, axis, None].double() * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32; dtype of the input out."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSWeight(nn.Module):
    """The weight of an RMSNorm over all heads; the norm itself is in ``ops.qk_norm_rope`` or ``forward``."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections shared by all three attentions: q, k, v, o and the norms of q and k over the whole row."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSWeight(dim, eps), RMSWeight(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Sparse reference self-attention. Generated and reference rows share the projections, never a softmax row."""

    def qkv(self, x_BLC: Tensor, rope: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """q, k, v [B, L, N, D], each computed when it is asked for: a rank sends one while it computes the next."""
        x_BLC = x_BLC.to(self.q.weight.dtype)
        eps = self.norm_q.eps
        yield ops.qk_norm_rope(self.heads(self.q(x_BLC)), self.norm_q.weight, *rope, eps=eps)
        yield ops.qk_norm_rope(self.heads(self.k(x_BLC)), self.norm_k.weight, *rope, eps=eps)
        yield self.heads(self.v(x_BLC))

    def generated(
        self, x_BGC: Tensor, rope: tuple[Tensor, Tensor], ref: ReferenceRows, strength: float, share: Share | None
    ) -> Tensor:
        if share is not None:
            return self.o(share.attend(self.qkv(x_BGC, rope), ref, strength).flatten(2))
        q, k, v = self.qkv(x_BGC, rope)
        if isinstance(ref, PackedReference):
            return self.o(ops.sparse_reference_attention(q, k, v, packed=ref, strength=strength).flatten(2))
        ref_k, ref_v = ref or (None, None)
        return self.o(ops.sparse_reference_attention(q, k, v, ref_k, ref_v, strength=strength).flatten(2))

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: str, window: int, num_frames: int, share: Share | None
    ) -> Tensor:
        """What reference rows see of each other. q, k, v: [B, R, N, D], R frame-major; of own heads with a share."""
        if pattern == "full":
            out = ops.sparse_reference_attention(q, k, v)
        else:
            radius = 0 if pattern == "frame" else window
            out = ops.local_temporal_attention(q, k, v, num_frames=num_frames, radius=radius)
        if share is not None:
            out = share.to_rows(out, whole=pattern != "full")
        return self.o(out.flatten(2))


class TextAttention(Attention):
    """Cross-attention to the text context (zero rows of the padding included, as Wan does)."""

    def context(self, context_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, N, D] of the text."""
        context_BSC = context_BSC.to(self.q.weight.dtype)
        return self.heads(self.norm_k(self.k(context_BSC))), self.heads(self.v(context_BSC))

    def forward(self, x_BLC: Tensor, context_BSC: Tensor) -> Tensor:
        q = self.heads(self.norm_q(self.q(x_BLC.to(self.q.weight.dtype))))
        k, v = (c.expand(q.shape[0], -1, -1, -1) for c in self.context(context_BSC))  # one may serve the whole batch
        return self.o(ops.sparse_reference_attention(q, k, v).flatten(2))


def _adapter(dim: int, bottleneck: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, bottleneck), nn.GELU(), nn.Linear(bottleneck, dim))


class AudioAttention(Attention):
    """Cross-attention of each latent frame's rows to a window of speech features around that frame.

    Driving side: previous, own and next latent frame (zero keys and values beyond the ends), with a learned position
    of the window's slots added to the keys. Reference side: own latent frame only, through bottleneck adapters on
    q, k and v that share the base projections (TAVR, arXiv 2604.27918).
    """

    def __init__(self, dim: int, num_heads: int, eps: float, adapter_dim: int) -> None:
        super().__init__(dim, num_heads, eps)
        if adapter_dim:
            self.q_adapter, self.k_adapter, self.v_adapter = (_adapter(dim, adapter_dim) for _ in range(3))

    def window(self, audio_BSC: Tensor, position: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, 3 * S / T, C] that the rows of each frame see of the driving sound."""
        audio_BSC = audio_BSC.to(self.q.weight.dtype)
        per = audio_BSC.shape[1] // num_frames
        k, v = self.norm_k(self.k(audio_BSC)), self.v(audio_BSC)
        k, v = (F.pad(c, (0, 0, per, per)).unfold(1, 3 * per, per).transpose(2, 3) for c in (k, v))
        return k + position.to(k.dtype), v

    def driving(self, x_BLC: Tensor, audio_BSC: Tensor, position: Tensor, span: Span) -> Tensor:
        """x: the rows of ``span``; audio: the features of all its frames."""
        q = self.norm_q(self.q(x_BLC.to(self.q.weight.dtype)))
        k, v = self.window(audio_BSC, position, span.frames)
        if span.here == span.frames * span.size:
            return self._attend(q, k, v, span.frames)
        first, last = span.touched  # a rank may hold parts of its first and last frame: the rest is not looked at
        before = span.start - first * span.size
        q = F.pad(q, (0, 0, before, last * span.size - span.stop))
        return self._attend(q, k[:, first:last], v[:, first:last], last - first)[:, before : before + span.here]

    def reference(self, x_BLC: Tensor, audio_BSC: Tensor, position: Tensor, num_frames: int) -> Tensor:
        x_BLC, audio_BSC = x_BLC.to(self.q.weight.dtype), audio_BSC.to(self.q.weight.dtype)
        q, k, v = self.q(x_BLC), self.k(audio_BSC), self.v(audio_BSC)
        if hasattr(self, "q_adapter"):
            q = q + self.q_adapter(x_BLC)
            k, v = k + self.k_adapter(audio_BSC), v + self.v_adapter(audio_BSC)
        k, v = (c.unflatten(1, (num_frames, -1)) for c in (self.norm_k(k), v))
        return self._attend(self.norm_q(q), k + position.to(k.dtype), v, num_frames)

    def _attend(self, q_BLC: Tensor, k_BTSC: Tensor, v_BTSC: Tensor, num_frames: int) -> Tensor:
        q = self.heads(q_BLC.unflatten(1, (num_frames, -1)).flatten(0, 1))
        k, v = self.heads(k_BTSC.flatten(0, 1)), self.heads(v_BTSC.flatten(0, 1))
        return self.o(ops.sparse_reference_attention(q, k, v).reshape(q_BLC.shape))


class Block(nn.Module):
    """One transformer block: self-attention, text, speech, feed-forward; six-way modulation from time plus a table."""

    ENTRIES = ("reference_kv", "reference")  # called from outside besides forward: who wraps a block wraps these too

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        dim, eps = cfg.dim, cfg.eps
        self.eps = eps
        self.pattern, self.window = cfg.reference_pattern, cfg.reference_window
        self.self_attn = SelfAttention(dim, cfg.num_heads, eps)
        self.norm3 = FP32LayerNorm(dim, eps)
        self.cross_attn = TextAttention(dim, cfg.num_heads, eps)
        if cfg.audio_dim:
            self.norm4 = FP32LayerNorm(dim, eps)
            self.audio_attn = AudioAttention(dim, cfg.num_heads, eps, cfg.audio_adapter_dim)
        self.ffn = nn.Sequential(nn.Linear(dim, cfg.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)

    def modulations(self, e_BT6C: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention and of the feed-forward, each [B, T, C] fp32."""
        return (self.modulation.float()[:, None] + e_BT6C).unbind(2)

    def feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, index: Tensor) -> Tensor:
        h = ops.layernorm_modulate(x, shift, scale, index, eps=self.eps).to(self.ffn[0].weight.dtype)
        return ops.gate_residual(x, self.ffn(h), gate, index)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        index: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor,
        audio: Tensor | None,
        position: Tensor | None,
        span: Span,
        ref: ReferenceRows,
        strength: float,
        share: Share | None = None,
    ) -> Tensor:
        """Generated rows x [B, G, C] fp32: first those of ``span``, then the anchor's; with a share, this rank's."""
        m = self.modulations(e)
        h = ops.layernorm_modulate(x, m[0], m[1], index, eps=self.eps)
        x = ops.gate_residual(x, self.self_attn.generated(h, rope, ref, strength, share), m[2], index)
        x = x + self.cross_attn(self.norm3(x), text)
        rows = span.here
        if audio is not None and rows:
            heard = self.audio_attn.driving(self.norm4(x[:, :rows]), audio, position, span)
            x = torch.cat([x[:, :rows] + heard, x[:, rows:]], dim=1)
        return self.feed_forward(x, *m[3:], index)

    def reference_kv(
        self, x: Tensor, e: Tensor, index: Tensor, rope: tuple[Tensor, Tensor], share: Share | None = None
    ) -> tuple[Tensor, ...]:
        """q, k, v of the reference rows: all that generated rows will ever see of a block; own heads with a share."""
        m = self.modulations(e)
        q, k, v = self.self_attn.qkv(ops.layernorm_modulate(x, m[0], m[1], index, eps=self.eps), rope)
        return (q, k, v) if share is None else share.to_heads(q, k, v, whole=self.pattern != "full")

    def reference(
        self,
        x: Tensor,
        e: Tensor,
        index: Tensor,
        qkv: tuple[Tensor, ...],
        text: Tensor,
        audio: Tensor | None,
        position: Tensor | None,
        num_frames: int,
        rows: Tensor | None,
        full_rows: int,
        share: Share | None = None,
    ) -> Tensor:
        """Reference rows, which see neither the generated rows nor the step nor the driving speech.

        rows: where x's rows are among the ``full_rows`` of the frames that ``audio`` is of, unless they are all.
        """
        m = self.modulations(e)
        y = self.self_attn.reference(*qkv, self.pattern, self.window, num_frames, share)
        x = ops.gate_residual(x, y, m[2], index)
        x = x + self.cross_attn(self.norm3(x), text)
        if audio is not None:
            h = self.norm4(x)
            if rows is not None:  # frames keep different numbers of rows: attend on the full grid, keep ours
                h = h.new_zeros(h.shape[0], full_rows, h.shape[2]).index_copy(1, rows, h)
            heard = self.audio_attn.reference(h, audio, position, audio.shape[1] // position.shape[0])
            x = x + (heard if rows is None else heard[:, rows])
        return self.feed_forward(x, *m[3:], index)


class Head(nn.Module):
    """Final modulated LayerNorm and projection."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)

    def forward(self, x: Tensor, e_BTC: Tensor, index: Tensor) -> Tensor:
        shift, scale = (self.modulation.float()[:, None] + e_BTC[:, :, None]).unbind(2)
        return linear_fp32(self.head, ops.layernorm_modulate(x, shift, scale, index, eps=self.eps))
