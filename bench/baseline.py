"""What the engine is measured against: the same weights in plain torch, as an expert would write it without our ops.

``PlainDiT`` runs under bf16 autocast, or in fp32 where the processor has no bf16, with
``F.scaled_dot_product_attention`` over concatenated keys and values. Given the reference's context it computes the
reference's rows beside the generated ones in every pass, as TAVR's code does; given their keys and values it reads
those, which is our cache granted to it. ``PlainDecoder`` is the VAE's decoder the
same way. Position tables are made once per shape. Nothing here calls ``avatar_rt.ops`` between noise and frames.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.config import SAMPLES_PER_FRAME
from avatar_rt.engine import AvatarEngine
from avatar_rt.models.dit import VideoRefDiT, velocity_of, with_masks
from avatar_rt.models.layers import Block, Head, linear_fp32
from avatar_rt.models.motion import rest_tokens
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.vae_blocks import FrameAttention, ResidualBlock, Upsample, unfold_patch
from avatar_rt.pipeline.decode import restore, still_of
from avatar_rt.pipeline.denoise import ChunkState, settle
from avatar_rt.pipeline.likeness import Likeness
from avatar_rt.pipeline.reference import ReferenceContext
from avatar_rt.pipeline.schedule import Schedule
from avatar_rt.session import Reference

Rope = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, N, D] x 3 -> [B, L, N * D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Channel pairs (2i, 2i + 1) of [B, L, N, D], in fp32."""
    cos, sin = (a[:, None] for a in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


@dataclass(frozen=True)
class Rows:
    """The reference's part of a pass: modulation [1, T, 6, C], rows, positions and conditions; made per pass."""

    x: Tensor
    e: Tensor
    index: Tensor
    rope: Rope
    text: Tensor
    heard: Tensor | None
    frames: int


class PlainDiT(nn.Module):
    """``VideoRefDiT``'s generated side in plain torch, on the weights of ``dit``; batch 1, pattern ``full``."""

    def __init__(self, dit: VideoRefDiT) -> None:
        super().__init__()
        self.dit, self.cfg = copy.deepcopy(dit), dit.cfg
        for layer in self.dit.modules():
            if isinstance(layer, nn.LayerNorm):  # autocast normalises in fp32, and wants the weights in it
                layer.float()
        self._tables: dict[tuple[Any, ...], Rope] = {}

    def rope(self, grid: tuple[int, int, int], start: float, motion: bool) -> Rope:
        key = (grid, start, motion)
        if key not in self._tables:
            device = self.dit.patch_embedding.weight.device
            self._tables[key] = self.dit._rope(self.dit._positions(grid, device, motion=motion, start=start))
        return self._tables[key]

    def reference_rows(self, ref: ReferenceContext) -> Rows:
        d = self.dit
        x, grid = d._tokens(ref.latents, ref.motion)
        index = torch.arange(grid[0], device=x.device).repeat_interleave(x.shape[1] // grid[0])
        _, e = d._time(x.new_zeros(1, grid[0]), d.reference_time, ref.motion)
        heard = None
        if self.cfg.reference_audio_dim:
            null, embedding = d.null_reference_audio, d.reference_audio_embedding
            heard = d._audio(ref.audio, null, embedding, 1, grid[0])
        rope = self.rope(grid, self.cfg.reference_rope_offset, bool(self.cfg.motion_dim))
        return Rows(x, e, index, rope, d._text(ref.text), heard, grid[0])

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        audio: Tensor | None,
        anchor: Tensor,
        motion: Tensor | None,
        ref: ReferenceContext | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``VideoRefDiT.forward``; ``ref`` is recomputed here, ``kv`` (its keys and values per block) is read."""
        d, cfg = self.dit, self.cfg
        x, grid = d._tokens(latents, motion, d._beside(anchor))
        frames, rows = grid[0], x.shape[1]
        patches = grid[1] * grid[2]
        a = d.patch_embedding(anchor.to(d.patch_embedding.weight.dtype)).float().flatten(2).transpose(1, 2)
        x = torch.cat([x, a], 1)
        own = torch.arange(frames, device=x.device)
        index = torch.cat([own.repeat_interleave(rows // frames), own.new_full((a.shape[1],), frames)])
        e, e6 = d._time(torch.cat([t, t.new_zeros(1, 1)], 1), None, motion)
        tables = [self.rope(grid, 0.0, bool(cfg.motion_dim)), self.rope((1, *grid[1:]), 0.0, False)]
        generated = x.shape[1]
        extra = None if ref is None else self.reference_rows(ref)
        if extra is not None:
            x, index = torch.cat([x, extra.x], 1), torch.cat([index, extra.index + e6.shape[1]])
            e6, tables = torch.cat([e6, extra.e], 1), [*tables, extra.rope]
        rope = tuple(torch.cat(parts) for parts in zip(*tables, strict=True))
        heard = d._audio(audio, d.null_audio, d.audio_embedding, 1, frames) if cfg.audio_dim else None
        text_c = d._text(text)
        mark = torch.zeros(x.shape[1], x.shape[2], device=x.device)
        mark[rows:generated] = d.anchor_embedding.float()
        if extra is not None:
            mark[generated:] = d.reference_embedding.float()
        for i, block in enumerate(d.blocks):
            past = None if kv is None else (kv[0][i], kv[1][i])
            x = self.block(block, x + mark, e6, index, rope, (rows, generated, frames), text_c, heard, extra, past)
        x, e = x[:, :rows].unflatten(1, (frames, -1)), e[:, :frames]
        v = d._unpatch(self.head(d.head, x[:, :, :patches], e[:, :, None]).flatten(1, 2), grid)
        vm = None if motion is None else self.head(d.motion_head, x[:, :, patches], e)
        if cfg.prediction == "preconditioned":
            v = velocity_of(v, latents[:, : cfg.latent_channels], t[:, None, :, None, None])
            vm = None if vm is None or motion is None else velocity_of(vm, motion, t[:, :, None])
        return v, vm

    def head(self, head: Head, x: Tensor, e: Tensor) -> Tensor:
        m = head.modulation.float()
        return linear_fp32(head.head, modulated(x, m[:, 0] + e, m[:, 1] + e, head.eps))

    def block(
        self,
        b: Block,
        x: Tensor,
        e: Tensor,
        index: Tensor,
        rope: Rope,
        sizes: tuple[int, int, int],
        text: Tensor,
        heard: Tensor | None,
        ref: Rows | None,
        kv: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """One block over [generated ; reference] rows."""
        rows, generated, frames = sizes
        m = [row[:, index] for row in b.modulations(e)]
        s = b.self_attn
        h = modulated(x, m[0], m[1], b.eps)
        q, k = (rotate(s.heads(rms(p(h), n.weight, b.eps)), rope) for p, n in ((s.q, s.norm_q), (s.k, s.norm_k)))
        v = s.heads(s.v(h))
        if kv is not None:
            y = attend(q, torch.cat([k, kv[0]], 1), torch.cat([v, kv[1]], 1))
        else:
            y = attend(q[:, :generated], k, v)
            if ref is not None:
                y = torch.cat([y, attend(*(c[:, generated:] for c in (q, k, v)))], 1)
        x = x + s.o(y).float() * m[2]
        c = b.cross_attn
        q = c.heads(rms(c.q(b.norm3(x)), c.norm_q.weight, b.eps))
        y = attend(q[:, :generated], *self.context(c, text))
        if ref is not None:
            y = torch.cat([y, attend(q[:, generated:], *self.context(c, ref.text))], 1)
        x = x + c.o(y)
        if heard is not None:
            parts = [x[:, :rows] + self.driving(b, x[:, :rows], heard, frames), x[:, rows:generated]]
            if ref is not None:
                parts.append(x[:, generated:] + self.overheard(b, x[:, generated:], ref))
            x = torch.cat(parts, 1)
        return x + b.ffn(modulated(x, m[3], m[4], b.eps)).float() * m[5]

    def context(self, c: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        return c.heads(rms(c.k(text), c.norm_k.weight, c.norm_k.eps)), c.heads(c.v(text))

    def driving(self, b: Block, x: Tensor, heard: Tensor, frames: int) -> Tensor:
        a, per = b.audio_attn, self.cfg.audio_per_latent
        q = rms(a.q(b.norm4(x)), a.norm_q.weight, b.eps)
        k, v = rms(a.k(heard), a.norm_k.weight, b.eps), a.v(heard)
        k, v = (F.pad(c, (0, 0, per, per)).unfold(1, 3 * per, per).transpose(2, 3) for c in (k, v))
        return self.framewise(a, q, k + self.dit.audio_position.to(k.dtype), v, frames)

    def overheard(self, b: Block, x: Tensor, ref: Rows) -> Tensor:
        a, h, heard = b.audio_attn, b.norm4(x), ref.heard
        q, k, v = a.q(h), a.k(heard), a.v(heard)
        if hasattr(a, "q_adapter"):
            q, k, v = q + a.q_adapter(h), k + a.k_adapter(heard), v + a.v_adapter(heard)
        q, k = rms(q, a.norm_q.weight, b.eps), rms(k, a.norm_k.weight, b.eps)
        k, v = (c.unflatten(1, (ref.frames, -1)) for c in (k, v))
        return self.framewise(a, q, k + self.dit.reference_audio_position.to(k.dtype), v, ref.frames)

    def framewise(self, a: Any, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        shape = q.shape
        q, k, v = (a.heads(c.flatten(0, 1)) for c in (q.unflatten(1, (frames, -1)), k, v))
        return a.o(attend(q, k, v).reshape(shape))


# --- the decoder -----------------------------------------------------------------------------------------------------


def _conv(c: Any, x: Tensor) -> Tensor:
    weight = c.weight if c.weight.dim() == 5 else c.weight.unsqueeze(2)
    return F.conv3d(x, weight, c.bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))


def _norm(n: Any, x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1) * (x.shape[1] ** 0.5) * n.weight.float().view(-1, 1, 1, 1)


class PlainDecoder(nn.Module):
    """``VideoVAE.decode_step`` in plain torch: latents [1, C, t, h, w] and states in, video and states out."""

    def __init__(self, vae: VideoVAE, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = copy.deepcopy(vae).to(dtype)  # or autocast would round the weights again in every call

    def forward(self, z: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        d = self.vae.decoder
        old, new = iter(state) if state else None, []

        def past(c: Any, x: Tensor) -> Tensor:
            kt = c.weight.shape[2]
            if kt == 1:
                return _conv(c, x)
            x = F.pad(x, (0, 0, 0, 0, kt - 1, 0)) if old is None else torch.cat([next(old), x], 2)
            new.append(x[:, :, x.shape[2] - (kt - 1) :])
            return _conv(c, x)

        x = past(d.stem, _conv(self.vae.post_quant_conv, z))
        for layer in (*d.middle, *d.up):
            if isinstance(layer, ResidualBlock):
                y = past(layer.conv1, F.silu(_norm(layer.norm1, x)))
                y = past(layer.conv2, F.silu(_norm(layer.norm2, y)))
                x = y + (x if layer.shortcut is None else _conv(layer.shortcut, x))
            elif isinstance(layer, FrameAttention):
                x = x + self.frame_attention(layer, x)
            else:
                x = self.upsample(layer, x, old, new)
        x = past(d.head.conv, F.silu(_norm(d.head.norm, x)))
        return unfold_patch(x, self.vae.cfg.patch).float().clamp(-1, 1), tuple(new)

    def frame_attention(self, layer: FrameAttention, x: Tensor) -> Tensor:
        _, c, t, h, w = x.shape
        qkv = _conv(layer.qkv, _norm(layer.norm, x)).permute(0, 2, 3, 4, 1).reshape(t, 1, h * w, 3 * c)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
        return _conv(layer.proj, y.reshape(1, t, h, w, c).permute(0, 4, 1, 2, 3))

    def upsample(self, layer: Upsample, x: Tensor, old: Iterator[Tensor] | None, new: list[Tensor]) -> Tensor:
        if layer.time_conv is not None:
            first, x = (x[:, :, :1], x[:, :, 1:]) if old is None else (None, x)
            before = x.new_zeros(1, x.shape[1], 2, *x.shape[3:]) if old is None else next(old).to(x.dtype)
            b, c, t, h, w = x.shape
            x = torch.cat([before, x], 2)
            new.append(x[:, :, -2:])
            y = _conv(layer.time_conv, x) if t else x.new_zeros(b, 2 * c, 0, h, w)  # there may be the first alone
            y = y.reshape(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
            x = y if first is None else torch.cat([first.to(y.dtype), y], 2)
        return _conv(layer.conv, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


# --- the request -----------------------------------------------------------------------------------------------------


class Plain:
    """A request end to end in plain torch; ``compiled``: ``torch.compile`` on both networks, and our cache granted.

    ``dtype``: bf16 by autocast, or fp32; None is the engine's, for where the processor has no bf16, torch is many times
    slower in it than in fp32.
    """

    def __init__(self, engine: AvatarEngine, *, compiled: bool = False, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or engine.dtype
        self.engine, self.cached, self.dtype = engine, compiled, dtype
        dit, vae = getattr(engine.dit, "dit", engine.dit), getattr(engine.vae, "vae", engine.vae)  # the modules
        self.dit, self.decoder = PlainDiT(dit).eval(), PlainDecoder(vae, dtype).eval()
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda module: module
        self.velocity, self.decode = wrap(self.dit), wrap(self.decoder)

    def frames(
        self, reference: Reference, wave: np.ndarray, schedule: Schedule, total: int, likeness: Likeness | None = None
    ) -> Iterator[np.ndarray]:
        """Frames uint8 [n, H, W, 3] chunk by chunk, as ``Session.frames`` gives them; led by a ``likeness``, None: the
        engine's."""
        likeness = likeness or self.engine.likeness(reference, None, self.engine.config.sampling.likeness)
        late = self.engine.articulation(reference).late
        wave = np.concatenate([np.zeros(late * SAMPLES_PER_FRAME, np.float32), wave])
        carried: ChunkState | None = None
        decoder, index, emitted = None, 0, 0
        autocast = functools.partial(
            torch.autocast, self.engine.device.type, self.dtype, enabled=self.dtype != torch.float32
        )
        while emitted < total:
            with torch.inference_mode(), autocast():
                latents, led, carried = self.chunk(reference, wave, schedule, index, carried, likeness)
                z = self.engine.vae.denormalize(latents)
                if decoder is None and schedule.chunk.lead_in:
                    _, decoder = self.decode(z[:, :, :1], None)
                    video, decoder = self.decode(z, decoder)
                    video = video[:, :, 3:]
                else:
                    video, decoder = self.decode(z, decoder)
                if led is not None:
                    video = restore(video, torch.from_numpy(led[-video.shape[2] :]).to(video.device))
                pictures = self.pictures(video)[: total - emitted]
            emitted, index = emitted + len(pictures), index + 1
            yield pictures

    def pictures(self, video: Tensor) -> np.ndarray:
        frames = video[0].float().transpose(0, 1)
        scale = self.engine.config.height * self.engine.config.output_scale // frames.shape[2]
        if scale != 1:
            frames = F.interpolate(frames, scale_factor=scale, mode="bicubic", align_corners=False)
        frames = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return frames.contiguous().cpu().numpy()

    def sound(self, wave: np.ndarray, heard: range) -> Tensor:
        left, right = self.engine.speech.context
        low, high = heard.start * SAMPLES_PER_FRAME - left, heard.stop * SAMPLES_PER_FRAME + right
        piece = np.zeros(high - low, np.float32)
        part = wave[max(low, 0) : max(high, 0)]
        piece[max(-low, 0) : max(-low, 0) + len(part)] = part
        with torch.autocast("cpu", enabled=False):
            return self.engine.speech(torch.from_numpy(piece)[None].to(self.engine.device), has_context=True)

    def chunk(self, reference: Reference, wave: np.ndarray, schedule: Schedule, index: int, *told: Any) -> Any:
        """Latents of the chunk's new frames, the guide's pictures or None, and what the next chunk needs: anchor, last
        latents, their motion. ``told``: that of the chunk before, and the likeness."""
        cfg, engine, (carried, likeness) = self.engine.config, self.engine, told
        plan, d = schedule.plan(index), cfg.dit
        per, n, device = d.audio_per_latent, plan.overlap, engine.device
        audio = self.sound(wave, schedule.frames_of(plan, per))
        text = engine.embed_text()
        z = schedule.noise(plan, 0, (d.latent_channels, *cfg.latent_size)).to(device).transpose(0, 1)[None]
        motion = schedule.noise(plan, 1, (d.motion_dim,)).to(device)[None] if d.motion_dim else None
        anchor = with_masks(reference.scene.latent, d, reference.scene.kept, 0)
        if carried is not None:
            anchor = with_masks(carried.anchor, d, 1, 0)
            z = torch.cat([carried.latents, z[:, :, n:]], 2)
            motion = None if motion is None else torch.cat([carried.motion, motion[:, n:]], 1)
        mask = torch.zeros(1, 1, plan.latents, 1, 1, device=device)
        mask[:, :, :n] = 1
        kv = (reference.cache.k, reference.cache.v)
        believed, guide = motion, None
        for t, t_next in pairwise(schedule.times):
            frames_t = torch.full((1, plan.latents), t, device=device)
            frames_t[:, :n] = 0
            v, vm = torch.zeros_like(z), None if motion is None else torch.zeros_like(motion)
            resting = None if motion is None or believed is None else rest_tokens(motion, believed, frames_t)
            for p in schedule.passes_of(plan):
                seen: dict[str, Any] = {}
                if p.reference:
                    seen = {"kv": kv} if self.cached else {"ref": reference.context}
                sound = audio if p.audio else None
                told = resting if p.resting else motion
                dv, dm = self.velocity(with_masks(z, d, 0, mask), frames_t, text, sound, anchor, told, **seen)
                v = v + p.weight * dv
                vm = None if vm is None else vm + p.motion_weight * dm
            if motion is not None and vm is not None:
                believed = motion - frames_t[:, :, None] * vm
            after = z[:, :, n:] + (t_next - t) * v[:, :, n:]
            moving = None if motion is None or vm is None else motion[:, n:] + (t_next - t) * vm[:, n:]
            if likeness is not None and motion is not None and believed is not None and vm is not None:
                if likeness.begins(t, t_next):
                    guide = likeness.guide(believed[:, n:], believed[:, :n])
                if guide is not None and likeness.leads(t):
                    after, moving = guide.step(z[:, :, n:], v[:, :, n:], motion[:, n:], vm[:, n:], t, t_next)
            z = torch.cat([z[:, :, :n], after], 2)
            if motion is not None and moving is not None:
                motion = torch.cat([motion[:, :n], moving], 1)
        state, led = ChunkState() if carried is None else carried, likeness is not None
        z, held = settle(z, n, state, cfg.chunk, reference.scene.kept, led)
        keep = z.shape[2] - cfg.chunk.overlap
        anchor = carried.anchor if carried is not None else z[:, :, :1]
        if carried is None and cfg.chunk.lead_in:
            anchor = still_of(engine.vae, anchor)
        state = ChunkState(anchor, z[:, :, keep:], None if motion is None else motion[:, keep:], held)
        return z[:, :, n:], None if guide is None else guide.pictures(), state
