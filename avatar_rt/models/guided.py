"""VideoRefDiT's generated side for a solver: all guidance passes of a step as one batch of recorded kernel calls.

What does not depend on the step is computed when a chunk is opened: keys and values of the text and of the sound,
position tables, and what can be written down without attending (a caption whose rows are all equal, silence between its
ends: there, attention returns the one value it sees). A step then embeds its latents, runs the blocks, and adds up the
passes before the last projection, which is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avatar_rt.models.dit import VideoRefDiT, velocity_of
from avatar_rt.models.layers import Block, timestep_embedding
from avatar_rt.ops import PackedReference
from avatar_rt.ops.program import ROWS_MULTIPLE, PackedLinear, Program, Table, pack_linear, refuses_program, rope_lanes
from avatar_rt.ops.schedule import torch_alone

References = tuple[Sequence[PackedReference] | tuple[Tensor, Tensor] | None, ...]  # of each pass, all blocks


class Pass(NamedTuple):
    """One guidance pass: weights of its picture and motion velocity, and what it sees.

    ``text`` [1, S, D]; ``audio`` [1, F, A] or None; ``reference``: whether it sees one; ``resting``:
    whether its motion tokens are those of a mouth at rest.
    """

    weight: float
    motion_weight: float
    text: Tensor
    audio: Tensor | None
    reference: bool
    resting: bool


class PackedBlock(NamedTuple):
    """A block's weights for programs."""

    qkv: PackedLinear
    o: PackedLinear
    text_q: PackedLinear
    text_o: PackedLinear
    audio_q: PackedLinear | None
    audio_o: PackedLinear | None
    widen: PackedLinear
    narrow: PackedLinear


def _pack(linear: Any) -> PackedLinear:
    return pack_linear(linear.weight, linear.bias)


def _pack_block(b: Block) -> PackedBlock:
    s, t = b.self_attn, b.cross_attn
    qkv = pack_linear(torch.cat([c.weight for c in (s.q, s.k, s.v)]), torch.cat([c.bias for c in (s.q, s.k, s.v)]))
    a = getattr(b, "audio_attn", None)
    heard = (None, None) if a is None else (_pack(a.q), _pack(a.o))
    return PackedBlock(qkv, _pack(s.o), _pack(t.q), _pack(t.o), *heard, _pack(b.ffn[0]), _pack(b.ffn[2]))


def _row(x: Tensor) -> Table:
    return Table(x.detach().float().reshape(1, -1).contiguous())


def refuses_guided(dit: VideoRefDiT) -> str | None:
    """None when the model can be recorded; else the reason."""
    weight = dit.patch_embedding.weight
    if dit.cfg.head_dim % ROWS_MULTIPLE:
        return f"head size {dit.cfg.head_dim} is not a multiple of {ROWS_MULTIPLE}"
    return refuses_program(weight.device, weight.dtype)


class GuidedDiT:
    """A VideoRefDiT with its weights packed once; calling it is calling the model, ``open`` starts a chunk."""

    def __init__(self, dit: VideoRefDiT) -> None:
        self.dit, self.cfg = dit, dit.cfg
        self.blocks = [_pack_block(b) for b in dit.blocks]
        fp32 = [(m.weight.float(), m.bias.float()) for m in (dit.time_embedding[0], dit.time_embedding[2])]
        self.time_in, self.time_mid = fp32
        self.time_out = (dit.time_projection[1].weight.float(), dit.time_projection[1].bias.float())
        table = torch.cat([b.modulation.detach().float() for b in dit.blocks])  # [layers, 6, C]
        table[:, (1, 4)] += 1  # kernels multiply by 1 + scale
        self.table = table
        self.heads = [
            (h.head.weight.float(), h.head.bias.float(), h.modulation.detach().float()[0], h.eps)
            for h in ([dit.head, dit.motion_head] if self.cfg.motion_dim else [dit.head])
        ]
        if self.cfg.motion_dim:
            self.injection = (dit.motion_injection.weight.float(), dit.motion_injection.bias.float())

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.dit(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "dit":  # not set yet
            raise AttributeError(name)
        return getattr(self.dit, name)

    def time(self, t: Tensor, motion: Tensor | None, frames: int) -> tuple[Tensor, Tensor]:
        """Of [1, T] times and motion tokens: embedding [T, C] and projection [T, 6, C], as ``VideoRefDiT._time``."""
        e = F.linear(F.silu(F.linear(timestep_embedding(t[0], self.cfg.freq_dim), *self.time_in)), *self.time_mid)
        if motion is not None:
            e = torch.cat([e[:frames] + F.linear(motion[0].float(), *self.injection), e[frames:]])
        return e, F.linear(F.silu(e), *self.time_out).unflatten(-1, (6, -1))

    def open(
        self,
        passes: Sequence[Pass],
        anchor: Tensor | None,
        frames: int,
        references: Callable[[], References],
        strength: float,
    ) -> GuidedChunk:
        """The steps of one chunk of ``frames`` latent frames beside the anchor [1, Cin, 1, H, W] (its time is 0).

        ``references`` is asked before each step for the reference of each pass, in the order of ``passes``.
        """
        return GuidedChunk(self, tuple(passes), anchor, frames, references, strength)


class GuidedChunk:
    """Velocity of one chunk's latents and motion, the passes already added up. Not shared between threads."""

    def __init__(
        self,
        guided: GuidedDiT,
        passes: tuple[Pass, ...],
        anchor: Tensor | None,
        frames: int,
        references: Callable[[], References],
        strength: float,
    ) -> None:
        self.guided, self.passes, self.frames = guided, passes, frames
        self.references, self.strength = references, strength
        self.groups = sorted({p.resting for p in passes})  # passes that share their modulation
        d = guided.dit
        self.anchor, self.beside = None, d._beside(anchor)
        if anchor is not None:
            a = d.patch_embedding(anchor.to(d.patch_embedding.weight.dtype)).float().flatten(2).transpose(1, 2)[0]
            self.anchor = a + d.anchor_embedding.float()
        self._seen: References | None = None
        self._program: Program | None = None

    # ---- recording -----------------------------------------------------------------------------------------------

    def _record(self, grid: tuple[int, int, int], references: References) -> None:
        """Allocates the step's rows and records its kernels over them."""
        g = self.guided
        cfg, num = g.cfg, len(self.passes)
        self.grid, self.size = grid, grid[1] * grid[2] + bool(cfg.motion_dim)  # rows of a frame
        self.own = self.frames * self.size
        self.rows = self.own + (0 if self.anchor is None else self.anchor.shape[0])
        times = self.frames + (self.anchor is not None)
        frame = torch.arange(self.frames).repeat_interleave(self.size)
        frame = torch.cat([frame, torch.full((self.rows - self.own,), self.frames)])
        self._index = torch.cat([frame + times * self.groups.index(p.resting) for p in self.passes]).int()
        middle = (frame > 0) & (frame < self.frames - 1)
        self._kind = torch.cat([2 * i + (middle & (p.audio is None)) for i, p in enumerate(self.passes)]).int()
        position = [g.dit._positions(grid, g.table.device, motion=bool(cfg.motion_dim))]
        if self.anchor is not None:
            position.append(g.dit._positions((1, *grid[1:]), g.table.device, motion=False))
        rope = rope_lanes(*g.dit._rope(torch.cat(position)))
        self.x = torch.zeros(num, self.rows, cfg.dim)
        self.modulation = torch.zeros(len(g.blocks), len(self.groups) * times, 6, cfg.dim)
        widths = (cfg.dim, 3 * cfg.dim, cfg.dim, cfg.ffn_dim)  # normalised, projected, attended, widened rows
        buffers = tuple(torch.zeros(num, self.rows, width, dtype=torch.bfloat16) for width in widths)
        texts = {id(p.text): g.dit._text(p.text) for p in self.passes}
        self._texts = [texts[id(p.text)] for p in self.passes]
        self._heard = None
        if cfg.audio_dim:
            null, embedding = g.dit.null_audio, g.dit.audio_embedding
            self._heard = [g.dit._audio(p.audio, null, embedding, 1, self.frames) for p in self.passes]
        program = Program()
        for i in range(len(g.blocks)):
            self._record_block(program, i, buffers, rope, references)
        self._program, self._seen = program, references

    def _record_block(
        self, program: Program, i: int, buffers: tuple[Tensor, ...], rope: tuple[Tensor, Tensor], references: References
    ) -> None:
        block, packed, x = self.guided.dit.blocks[i], self.guided.blocks[i], self.x
        h, qkv, out, wide = buffers
        rows, c, last = x.flatten(0, 1), x.shape[2], i + 1 == len(self.guided.blocks)
        flat_h, flat_qkv = h.flatten(0, 1), qkv.flatten(0, 1)
        m = [Table(self.modulation[i, :, j], self._index) for j in range(6)]
        program.norm("layer", rows, flat_h, eps=block.eps, shift=m[0], scale=m[1])
        program.linear(flat_h, packed.qkv, flat_qkv)
        for at, norm in ((0, block.self_attn.norm_q), (c, block.self_attn.norm_k)):
            part = flat_qkv[:, at : at + c]
            program.norm("rms", part, part, eps=norm.eps, scale=_row(norm.weight), rope=rope)
        q, k, v = (self._heads(part) for part in qkv.split(c, -1))
        for p, ref in enumerate(references):
            seen = None if ref is None else (ref[0][i], ref[1][i]) if isinstance(ref[0], Tensor) else ref[i]
            one = slice(p, p + 1)
            program.attention(
                q[one], k[one], v[one], self._heads(out[one]), reference=seen, strength=self.strength
            )  # fmt: skip
        constants = [self._constant(block, p) for p in range(len(self.passes))]
        early = torch.stack([text if self._has_text(p) else text + quiet for p, (text, quiet) in enumerate(constants)])
        program.linear(
            out.flatten(0, 1), packed.o, rows, finish="residual", gate=m[2], plus=Table(early.flatten(0, 1), self._kind)
        )
        for p, (_, silence) in enumerate(constants):
            if self._has_text(p):
                late = Table(silence, self._kind[p * self.rows : (p + 1) * self.rows] - 2 * p)
                context = block.cross_attn.context(self._texts[p])
                at = tuple(b[p] for b in (x, h, qkv, out))
                self._attend(program, at, block.norm3, block.cross_attn, (packed.text_q, packed.text_o), context, late)
        if packed.audio_q is not None:
            self._record_sound(program, block, packed, (x, h, qkv, out))
        program.norm("layer", rows, flat_h, eps=block.eps, shift=m[3], scale=m[4])
        program.linear(flat_h, packed.widen, wide.flatten(0, 1), finish="gelu")
        mark = None if self.anchor is None or last else self._mark()
        program.linear(wide.flatten(0, 1), packed.narrow, rows, finish="residual", gate=m[5], plus=mark)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.guided.cfg.num_heads, -1))

    def _has_text(self, p: int) -> bool:
        """Whether the rows of a pass's caption differ; the empty caption's do not."""
        text = self.passes[p].text
        return not bool((text == text[:, :1]).all())

    def _constant(self, block: Block, p: int) -> tuple[Tensor, Tensor]:
        """[2, C] each: what the text and what silence add to the rows of pass ``p``; row 1 is for frames that see
        nothing but silence. Attention to equal values is that value."""
        text = torch.zeros(2, self.x.shape[2])
        silence = torch.zeros_like(text)
        if not self._has_text(p):
            c = block.cross_attn
            text[:] = c.o(c.v(self._texts[p][:, :1].to(c.v.weight.dtype)))[0, 0].float()
        if self._heard is not None and self.passes[p].audio is None:
            a = block.audio_attn
            silence[1] = a.o(a.v(self._heard[p][:, :1]))[0, 0].float()
        return text, silence

    def _mark(self) -> Table:
        """What the next block's anchor rows start with."""
        marks = torch.stack([torch.zeros(self.x.shape[2]), self.guided.dit.anchor_embedding.detach().float()])
        index = (torch.arange(self.rows) >= self.own).int()
        return Table(marks, index.repeat(len(self.passes)))

    def _record_sound(self, program: Program, block: Block, packed: PackedBlock, buffers: tuple[Tensor, ...]) -> None:
        """The frames that hear something; those between the ends of silence have had their constant."""
        a, frames = block.audio_attn, self.frames
        for p, given in enumerate(self.passes):
            keys = a.window(self._heard[p], self.guided.dit.audio_position, frames)
            parts = [(0, frames)] if given.audio is not None else [(0, 1), (frames - 1, frames)][: min(frames, 2)]
            for first, stop in parts:
                rows = slice(first * self.size, stop * self.size)
                context = tuple(self._heads(key[0, first:stop]) for key in keys)
                at = tuple(b[p, rows] for b in buffers)
                self._attend(program, at, block.norm4, a, (packed.audio_q, packed.audio_o), context, None)

    def _attend(
        self,
        program: Program,
        buffers: tuple[Tensor, ...],
        norm: Any,
        attention: Any,
        weights: tuple[PackedLinear | None, ...],
        context: tuple[Tensor, ...],
        plus: Table | None,
    ) -> None:
        """Cross-attention of rows [L, C] to keys and values [T, S, N, D], L rows in T parts, added to them."""
        x, h, qkv, out = buffers
        q, parts = qkv[:, : x.shape[1]], context[0].shape[0]
        program.norm("layer", x, h, eps=norm.eps, scale=_row(norm.weight), shift=_row(norm.bias))
        program.linear(h, weights[0], q)
        program.norm("rms", q, q, eps=attention.norm_q.eps, scale=_row(attention.norm_q.weight))
        split = [self._heads(rows.unflatten(0, (parts, -1))) for rows in (q, out)]
        program.attention(split[0], *context, split[1])
        program.linear(out, weights[1], x, finish="residual", plus=plus)

    # ---- a step --------------------------------------------------------------------------------------------------

    def __call__(
        self, latents: Tensor, t: Tensor, motion: Tensor | None, resting: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Guided velocities.

        Args:
            latents: [1, Cin, T, H, W] with their mask channels.
            t: [1, T] flow time of each latent frame.
            motion: [1, T, M], or None without a motion stream; resting: the same with the mouth at rest.

        Returns: the passes' weighted sums of velocity [1, C, T, H, W] and of motion velocity [1, T, M], fp32.
        """
        with torch_alone() as threads:
            return self._step(latents, t, (motion, resting), threads)

    def _step(
        self, latents: Tensor, t: Tensor, motions: tuple[Tensor | None, Tensor | None], threads: int
    ) -> tuple[Tensor, Tensor | None]:
        g = self.guided
        rows, grid = g.dit._tokens(latents, motions[0], self.beside)
        references = self.references()
        if self._seen is None or any(a is not b for a, b in zip(references, self._seen, strict=True)):
            self._record(grid, references)
        framed = rows[0].unflatten(0, (self.frames, -1))
        times = self.frames + (self.anchor is not None)
        at = torch.cat([t, t.new_zeros(1, 1)], 1) if self.anchor is not None else t
        embeddings = {}
        for n, resting in enumerate(self.groups):
            e, e6 = g.time(at, motions[resting], self.frames)
            embeddings[resting] = e[: self.frames]
            torch.add(g.table[:, None], e6, out=self.modulation[:, n * times : (n + 1) * times])
        for p, given in enumerate(self.passes):
            self.x[p, : self.own] = rows[0]
            if given.resting and motions[1] is not None:
                token = g.dit.motion_embedding(motions[1].to(g.dit.motion_embedding.weight.dtype))
                self.x[p, : self.own].unflatten(0, (self.frames, self.size))[:, -1] = token[0].float()
            if self.anchor is not None:
                self.x[p, self.own :] = self.anchor
        assert self._program is not None and framed.shape[1] == self.size
        self._program.run(threads)
        return self._heads_of(latents, t, motions[0], embeddings)

    def _heads_of(
        self, latents: Tensor, t: Tensor, motion: Tensor | None, embeddings: dict[bool, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Adds up the passes, then projects: the projection is linear and the weights sum to 1."""
        g, cfg, patches = self.guided, self.guided.cfg, self.grid[1] * self.grid[2]
        own = self.x[:, : self.own].unflatten(1, (self.frames, self.size))
        rows = self._head(0, own[:, :, :patches], [p.weight for p in self.passes], embeddings)
        v = g.dit._unpatch(rows.flatten(0, 1)[None], self.grid)
        vm = None
        if cfg.motion_dim:
            weights = [p.motion_weight for p in self.passes]
            vm = self._head(1, own[:, :, patches:], weights, embeddings).flatten(1)[None]
        if cfg.prediction == "preconditioned":
            v = velocity_of(v, latents[:, : cfg.latent_channels], t[:, None, :, None, None])
            vm = None if vm is None or motion is None else velocity_of(vm, motion, t[:, :, None])
        return v, vm

    def _head(self, which: int, x: Tensor, weights: list[float], embeddings: dict[bool, Tensor]) -> Tensor:
        """x [P, T, S, C] -> [T, S, out]."""
        weight, bias, table, eps = self.guided.heads[which]
        total = None
        for resting in self.groups:
            mine = [p for p, given in enumerate(self.passes) if given.resting == resting and weights[p]]
            if not mine:
                continue
            share = sum(weights[p] for p in mine)
            normed = F.layer_norm(x[mine], x.shape[-1:], eps=eps)
            mixed = torch.einsum("ptsc,p->tsc", normed, torch.tensor([weights[p] for p in mine]))
            e = embeddings[resting][:, None]
            part = torch.addcmul(share * (table[0] + e), mixed, 1 + table[1] + e)
            total = part if total is None else total + part
        assert total is not None
        return F.linear(total, weight, bias)
