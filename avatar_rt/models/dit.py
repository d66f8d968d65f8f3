"""VideoRefDiT: Wan 2.1's transformer with sparse reference attention, speech, and a motion stream.

With every addition off it computes Wan 2.1 (arXiv 2503.20314); with TAVR's settings, TAVR (arXiv 2604.27918).
Rows of one frame are its patches, then its motion token if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from avatar_rt.config import DiTConfig
from avatar_rt.errors import InputError
from avatar_rt.models.layers import Block, Head, linear_fp32, rope_table, timestep_embedding
from avatar_rt.models.spread import Share, Span, Spread
from avatar_rt.ops import PackedReference

Cut = tuple[int, int, int, int]
"""A rectangle of a frame's patches: its top and left, and the whole frame's height and width, in patches."""


def _mlp(in_dim: int, dim: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), act, nn.Linear(dim, dim))


def with_masks(latents: Tensor, cfg: DiTConfig, scene: float | Tensor, carried: float | Tensor) -> Tensor:
    """Appends the scene and carried-over mask channels when the model has them.

    latents: [B, 16, T, H, W]; scene, carried: numbers or tensors that expand to [B, 1, T, H, W].
    Returns [B, in_channels, T, H, W]. Video-reference rows carry scene 1, carried 0 (TAVR's convention).
    """
    if not cfg.mask_channels:
        return latents
    shape = (latents.shape[0], 1, *latents.shape[2:])
    masks = [torch.as_tensor(m, dtype=latents.dtype, device=latents.device).expand(shape) for m in (scene, carried)]
    return torch.cat([latents, *masks], dim=1)


def velocity_of(output: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Flow velocity from the output of a preconditioned head, fp32.

    The head predicts what has unit variance at every t when data and noise have: the clean data at t = 1, minus the
    noise at t = 0 (the preconditioning of arXiv 2206.00364 for z = (1 - t) x + t eps). So where there is almost only
    noise, it need not pass through the blocks.
    """
    spread = (1 - t).square() + t.square()
    return (2 * t - 1) / spread * z.float() - output.float() * spread.rsqrt()


class VideoRefDiT(nn.Module):
    """Velocity of the generated latents (and motion), given reference K/V that depend on nothing generated."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        dim = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_channels, dim, cfg.patch, cfg.patch)
        self.text_embedding = _mlp(cfg.text_dim, dim, nn.GELU(approximate="tanh"))
        self.time_embedding = _mlp(cfg.freq_dim, dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.num_layers)])
        self.head = Head(dim, cfg.latent_channels * cfg.patch[1] * cfg.patch[2], cfg.eps)
        if cfg.anchor:
            self.anchor_embedding = nn.Parameter(torch.empty(dim))
        if cfg.anchor_concat:
            self.anchor_patch_embedding = nn.Conv3d(cfg.in_channels, dim, cfg.patch, cfg.patch, bias=False)
        if cfg.audio_dim:
            self.audio_embedding = _mlp(cfg.audio_dim, dim, nn.GELU(approximate="tanh"))
            self.audio_position = nn.Parameter(torch.empty(3 * cfg.audio_per_latent, dim))
            self.null_audio = nn.Parameter(torch.empty(cfg.audio_dim))
        if cfg.reference:
            self.reference_embedding = nn.Parameter(torch.empty(dim))
            self.reference_time = nn.Parameter(torch.empty(dim))
            if cfg.reference_audio_dim:
                self.reference_audio_embedding = _mlp(cfg.reference_audio_dim, dim, nn.GELU(approximate="tanh"))
                self.reference_audio_position = nn.Parameter(torch.empty(cfg.audio_per_latent, dim))
                self.null_reference_audio = nn.Parameter(torch.empty(cfg.reference_audio_dim))
        if cfg.motion_dim:
            self.motion_embedding = nn.Linear(cfg.motion_dim, dim)
            self.motion_injection = nn.Linear(cfg.motion_dim, dim)
            self.motion_head = Head(dim, cfg.motion_dim, cfg.eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Of what is its own: small embeddings, no speech as zeros; motion and the anchor beside do nothing yet."""
        for name, p in self.named_parameters(recurse=False):
            if name.startswith("null_"):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)
        if self.cfg.motion_dim:
            nn.init.zeros_(self.motion_injection.weight)
            nn.init.zeros_(self.motion_injection.bias)
        if self.cfg.anchor_concat:
            nn.init.zeros_(self.anchor_patch_embedding.weight)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _beside(self, anchor: Tensor | None, kept: Tensor | None = None) -> Tensor | None:
        """What the anchor [B, Cin, 1, H, W], or only its ``kept`` patches, [n] int64, adds to every frame's patches at
        their place: [B, C, 1, h, w] fp32. None without ``cfg.anchor_concat``."""
        if anchor is None or not self.cfg.anchor_concat:
            return None
        patches = self.anchor_patch_embedding(anchor.to(self.anchor_patch_embedding.weight.dtype)).float()
        if kept is None:
            return patches
        rows = patches.flatten(3)
        return torch.zeros_like(rows).index_copy(3, kept, rows[..., kept]).unflatten(3, patches.shape[3:])

    def _tokens(
        self, latents: Tensor, motion: Tensor | None, beside: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, Cin, T, H, W] (and [B, T, M]) -> rows [B, T * S, C] fp32 and the patch grid (T, h, w); ``beside``, see
        there, is added to the patches of every frame."""
        if latents.ndim != 5 or latents.shape[1] != self.cfg.in_channels:
            raise InputError(f"latents: expected [B, {self.cfg.in_channels}, T, H, W], got {list(latents.shape)}")
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).float()
        if beside is not None:
            patches = patches + beside
        grid = (patches.shape[2], patches.shape[3], patches.shape[4])
        rows = patches.flatten(3).permute(0, 2, 3, 1)
        if self.cfg.motion_dim:
            if motion is None:
                motion = latents.new_zeros(latents.shape[0], grid[0], self.cfg.motion_dim)
            token = self.motion_embedding(motion.to(self.motion_embedding.weight.dtype)).float()
            rows = torch.cat([rows, token[:, :, None]], dim=2)
        return rows.flatten(1, 2), grid

    def _positions(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        *,
        motion: bool,
        start: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        cut: Cut | None = None,
    ) -> Tensor:
        """[T * S, 3] fp64 time, height, width; a motion token sits at the middle of its (whole) frame."""
        frames, height, width = grid
        top, left, whole_height, whole_width = cut or (0, 0, height, width)
        stride = self.cfg.rope_spatial_stride
        t = start + torch.arange(frames, dtype=torch.float64, device=device)
        h = torch.arange(top, top + height, dtype=torch.float64, device=device) * (stride * scale[0])
        w = torch.arange(left, left + width, dtype=torch.float64, device=device) * (stride * scale[1])
        position = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).flatten(1, 2)
        if motion:
            middle = ((n - 1) * (stride * s) / 2 for n, s in zip((whole_height, whole_width), scale, strict=True))
            there = torch.stack([t, *(torch.full_like(t, m) for m in middle)], dim=-1)
            position = torch.cat([position, there[:, None]], dim=1)
        return position.flatten(0, 1)

    def _rope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(position, self.cfg.rope_dims, self.cfg.rope_theta)

    def _time(self, t_BT: Tensor, offset: Tensor | None, motion: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embedding [B, T, C] and its six-way projection [B, T, 6, C], both fp32."""
        first, _, second = self.time_embedding
        e = linear_fp32(second, nn.functional.silu(linear_fp32(first, timestep_embedding(t_BT, self.cfg.freq_dim))))
        if offset is not None:
            e = e + offset.float()
        if motion is not None:
            injected = linear_fp32(self.motion_injection, motion)
            e = e + nn.functional.pad(injected, (0, 0, 0, e.shape[1] - motion.shape[1]))
        return e, linear_fp32(self.time_projection[1], nn.functional.silu(e)).unflatten(-1, (6, -1))

    def _text(self, text: Tensor) -> Tensor:
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def _audio(self, features: Tensor | None, null: Tensor, embedding: nn.Module, batch: int, frames: int) -> Tensor:
        """[B, 4T or 4T-3, A] or None -> [B, 4T, C]. The first latent holds one frame: its other slots are null."""
        per = self.cfg.audio_per_latent
        if features is None:
            features = null.expand(batch, frames * per, -1)
        elif features.shape[1] == frames * per - (per - 1):
            features = torch.cat([null.to(features.dtype).expand(features.shape[0], per - 1, -1), features], dim=1)
        if features.shape[1:] != (frames * per, null.shape[0]):
            raise InputError(
                f"audio: expected [B, {frames * per} or {frames * per - per + 1}, {null.shape[0]}] for {frames} latent "
                f"frames, got {list(features.shape)}"
            )
        return embedding(features.to(embedding[0].weight.dtype))

    # ---- reference side ------------------------------------------------------------------------------------------

    def encode_reference(
        self,
        latents: Tensor,
        text: Tensor,
        audio: Tensor | None = None,
        motion: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        spread: Spread | None = None,
    ) -> tuple[Tensor, Tensor]:
        """K and V of the reference rows in every block, computed once per (reference, weights).

        Args:
            latents: [B, Cin, T, H, W] clean reference latents with their mask channels.
            text: [B or 1, S, text_dim] the empty caption's embedding.
            audio: [B, 4T or 4T-3, A] features of the reference's own sound; None is the learned null.
            motion: [B, T, M] clean motion tokens, or None.
            rows: [n] int64 kept patches of the flattened (T, h, w) grid, ascending; None keeps all.
            scale: Target grid over reference grid, for height and width positions.
            spread: Over which ranks to spread the rows; all call alike. Each gets its own heads of all rows.

        Returns: two [layers, B, R, N, D] tensors in the weights' dtype, positions already applied.
        """
        cfg = self.cfg
        if not cfg.reference:
            raise InputError("encode_reference: expected a model with cfg.reference=True")
        x, grid = self._tokens(latents, motion)
        frames, patches = grid[0], grid[1] * grid[2]
        has_motion = bool(cfg.motion_dim)
        size = patches + has_motion
        index = torch.arange(frames, device=x.device).repeat_interleave(size)
        position = self._positions(grid, x.device, motion=has_motion, start=cfg.reference_rope_offset, scale=scale)
        full_rows = x.shape[1]
        if rows is not None:
            if cfg.reference_pattern != "full":
                raise InputError(f"rows: expected reference_pattern 'full', got {cfg.reference_pattern!r}")
            keep = torch.zeros(frames, size, dtype=torch.bool, device=x.device)
            keep[:, patches:] = True
            keep[rows // patches, rows % patches] = True
            rows = keep.flatten().nonzero().flatten()
            x, index, position = x[:, rows], index[rows], position[rows]
        share, heard_frames = None, slice(0, frames)
        if spread is not None:
            share = spread.rows(x.shape[1])
            x, index, position = x[:, share.own].contiguous(), index[share.own], position[share.own]
            kept = torch.arange(full_rows, device=x.device) if rows is None else rows
            heard_frames = slice(int(index[0]), int(index[-1]) + 1)
            rows = kept[share.own] - heard_frames.start * size
            full_rows = (heard_frames.stop - heard_frames.start) * size
        rope = self._rope(position)
        _, e = self._time(x.new_zeros(x.shape[0], frames), self.reference_time, motion if has_motion else None)
        text_c = self._text(text)
        heard = where = None
        if cfg.reference_audio_dim:
            heard = self._audio(audio, self.null_reference_audio, self.reference_audio_embedding, x.shape[0], frames)
            heard = heard.unflatten(1, (frames, -1))[:, heard_frames].flatten(1, 2)
            where = self.reference_audio_position
        ks, vs = [], []
        for i, block in enumerate(self.blocks):
            x = x + self.reference_embedding.float()
            qkv = block.reference_kv(x, e, index, rope, share)
            ks.append(qkv[1])
            vs.append(qkv[2])
            if i + 1 < len(self.blocks):  # nobody sees what the last block would make of the rows
                x = block.reference(x, e, index, qkv, text_c, heard, where, frames, rows, full_rows, share)
        return torch.stack(ks), torch.stack(vs)

    # ---- generated side ------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        audio: Tensor | None = None,
        *,
        anchor: Tensor | None = None,
        anchor_t: Tensor | None = None,
        anchor_rows: Tensor | None = None,
        motion: Tensor | None = None,
        ref_k: Tensor | None = None,
        ref_v: Tensor | None = None,
        packed: Sequence[PackedReference] | None = None,
        strength: float = 1.0,
        spread: Spread | None = None,
        cut: Cut | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over the generated side.

        Args:
            latents: [B, Cin, T, H, W] noisy (and carried-over clean) latents with their mask channels.
            t: [B, T] or [B] flow time of each latent frame; 1 is noise, 0 is data.
            text: [B or 1, S, text_dim] text context, zero rows where padded.
            audio: [B, 4T or 4T-3, A] speech features; None is the learned null.
            anchor: [B, Cin, 1, H, W] scene or anchor latent, or None.
            anchor_t: [B] its flow time; None takes ``t``'s first column.
            anchor_rows: [n] int64 kept patches of the anchor, or None for all.
            motion: [B, T, M] noisy motion tokens at the same t, or None.
            ref_k, ref_v: [layers, B, R, N, D] from ``encode_reference``, or None.
            packed: The same rows, one ``ops.pack_reference`` per block; given instead of them.
            strength: Factor on the reference rows' attention weights, 1 as trained, 0 as without a reference.
            spread: Over which ranks to spread the rows; all call alike, with their own heads of the reference.
            cut: Where ``latents`` and ``anchor`` lie in frames of which they are a part (arXiv 2304.12526); None: they
                are the frames. Only training cuts.

        Returns: velocity [B, C, T, H, W] fp32, and motion velocity [B, T, M] fp32 or None.
        Raises: InputError on a shape above.
        """
        cfg = self.cfg
        x, grid = self._tokens(latents, motion, self._beside(anchor, anchor_rows))
        batch, frames, patches = x.shape[0], grid[0], grid[1] * grid[2]
        has_motion = bool(cfg.motion_dim)
        t = t[:, None].expand(batch, frames) if t.ndim == 1 else t
        if t.shape != (batch, frames):
            raise InputError(f"t: expected [{batch}] or [{batch}, {frames}], got {list(t.shape)}")
        span = Span(0, x.shape[1], frames, patches + has_motion)
        index = torch.arange(frames, device=x.device).repeat_interleave(span.size)
        position = self._positions(grid, x.device, motion=has_motion, cut=cut)
        if anchor is not None:
            if not cfg.anchor:
                raise InputError("anchor: expected none, this model was built with cfg.anchor=False")
            a = self.patch_embedding(anchor.to(self.patch_embedding.weight.dtype)).float().flatten(2).transpose(1, 2)
            where = self._positions((1, *grid[1:]), x.device, motion=False, cut=cut)
            if anchor_rows is not None:
                a, where = a[:, anchor_rows], where[anchor_rows]
            x = torch.cat([x, a], dim=1)
            position = torch.cat([position, where])
            index = torch.cat([index, index.new_full((where.shape[0],), frames)])
            t = torch.cat([t, t[:, :1] if anchor_t is None else anchor_t[:, None].to(t.dtype)], dim=1)
        share = None
        if spread is not None:
            share = spread.rows(x.shape[1])
            x, position, index = x[:, share.own].contiguous(), position[share.own], index[share.own]
            span = span.cut(share.own.start, share.own.stop)
        rope = self._rope(position)
        e, e6 = self._time(t, None, motion if has_motion else None)
        text_c = self._text(text)
        heard = None
        if cfg.audio_dim:
            heard = self._audio(audio, self.null_audio, self.audio_embedding, batch, frames)
        for i, block in enumerate(self.blocks):
            if anchor is not None:
                x = torch.cat([x[:, : span.here], x[:, span.here :] + self.anchor_embedding.float()], dim=1)
            x = block(
                x,
                e6,
                index,
                rope,
                text_c,
                heard,
                getattr(self, "audio_position", None),
                span,
                packed[i] if packed is not None else None if ref_k is None else (ref_k[i], ref_v[i]),
                strength,
                share,
            )
        patch_rows, motion_velocity = self._heads(x[:, : span.here], e[:, :frames], span, patches, share)
        velocity = self._unpatch(patch_rows, grid)
        if cfg.prediction == "preconditioned":
            t = t[:, :frames].float()
            velocity = velocity_of(velocity, latents[:, : cfg.latent_channels], t[:, None, :, None, None])
            if motion_velocity is not None and motion is not None:
                motion_velocity = velocity_of(motion_velocity, motion, t[:, :, None])
        return velocity, motion_velocity

    def _heads(
        self, x: Tensor, e: Tensor, span: Span, patches: int, share: Share | None
    ) -> tuple[Tensor, Tensor | None]:
        """Both heads on the rows of ``span`` -> all patches' [B, T * patches, P], and [B, T, M] or None."""
        index = torch.arange(span.start, span.stop, device=x.device) // span.size
        if share is None:
            x, index = x.unflatten(1, (span.frames, -1)), index[:: span.size]
            motion = self.motion_head(x[:, :, patches], e, index) if self.cfg.motion_dim else None
            return self.head(x[:, :, :patches].flatten(1, 2), e, index.repeat_interleave(patches)), motion
        place = torch.arange(span.start, span.stop, device=x.device) % span.size
        own, counts = (place < patches).nonzero().flatten(), _rows_of(share, span, patches, of_patches=True)
        rows, motion = share.gather(self.head(x[:, own], e, index[own]), counts), None
        if self.cfg.motion_dim:
            own, counts = (place == patches).nonzero().flatten(), _rows_of(share, span, patches, of_patches=False)
            motion = share.gather(self.motion_head(x[:, own], e, index[own]), counts)
        return rows, motion

    def _unpatch(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        _, p, q = self.cfg.patch
        channels = self.cfg.latent_channels
        x = x.reshape(x.shape[0], *grid, p, q, channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(x.shape[0], channels, grid[0], grid[1] * p, grid[2] * q)


def _rows_of(share: Share, span: Span, patches: int, of_patches: bool) -> list[int]:
    """How many patches, or motion tokens, each rank holds."""

    def before(row: int) -> int:
        whole, rest = divmod(min(row, span.frames * span.size), span.size)
        return whole * patches + min(rest, patches) if of_patches else whole

    return [before(stop) - before(start) for start, stop in share.bounds]
