"""The VAE's decoder as recorded kernels: latent by latent over fixed buffers, channels last, bf16 products.

A stream's convolution state goes into a fixed place before the first latent of a call, moves on within it, and comes
out in ``VideoVAE.decode_step``'s own form, so that a stream may change between the two at any call. Nearest doubling
and the convolution after it are one: each of the four pixels that come of one sees 2 x 2 of the pixels below, through
weights that are sums of the nine.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from avatar_rt.errors import InputError
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.vae_blocks import FrameAttention, ResidualBlock, State, Upsample, unfold_patch
from avatar_rt.ops.program import ROWS_MULTIPLE, PackedLinear, Program, Table, pack_linear
from avatar_rt.ops.schedule import torch_alone


def refuses_streamed(vae: VideoVAE) -> str | None:
    """None when the decoder can be recorded; else the reason."""
    cfg = vae.cfg
    if any(k != 1 for k in cfg.time_kernels):
        return f"time_kernel {cfg.time_kernels} is not 1 everywhere"
    widths = {cfg.latent_channels, *(cfg.base_dim * m for m in cfg.dim_mult)}
    odd = sorted(w for w in widths if w % ROWS_MULTIPLE)
    return f"widths {odd} are not multiples of {ROWS_MULTIPLE}" if odd else None


def _pack(conv: Any) -> PackedLinear:
    """Weights [O, C, (1,) k, k] -> taps of the kernel in rows and columns."""
    return pack_linear(conv.weight.flatten(2).transpose(1, 2), conv.bias)


def _doubling(conv: Any) -> list[list[PackedLinear]]:
    """Of a 3 x 3 convolution after nearest doubling: weights over 2 x 2 pixels for each (row, column) of the four."""
    sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [parity, tap, kernel position]
    weight = conv.weight.detach().float()
    return [
        [
            pack_linear(torch.einsum("ocyx,uy,vx->ouvc", weight, sums[a], sums[b]).flatten(1, 2), conv.bias)
            for b in (0, 1)
        ]
        for a in (0, 1)
    ]


class StreamedVAE:
    """A VideoVAE whose ``decode_step`` runs recorded kernels; everything else is the model's own. Thread-safe."""

    def __init__(self, vae: VideoVAE) -> None:
        self.vae, d = vae, vae.decoder
        layers: list[Any] = [vae.post_quant_conv, d.stem, d.head.conv]
        for layer in (*d.middle, *d.up):
            if isinstance(layer, ResidualBlock):
                layers += [c for c in (layer.conv1, layer.conv2, layer.shortcut) if c is not None]
            elif isinstance(layer, FrameAttention):
                layers += [layer.qkv, layer.proj]
        self.packed = {id(c): _pack(c) for c in layers}
        ups = [layer for layer in d.up if isinstance(layer, Upsample)]
        self.doubling = {id(u): _doubling(u.conv) for u in ups}
        self.in_time = {id(u): self._in_time(u.time_conv) for u in ups if u.time_conv is not None}
        self._free: dict[tuple[int, int], deque[_Stream]] = {}

    @staticmethod
    def _in_time(conv: Any) -> list[PackedLinear]:
        """The time convolution [2C, C, 3, 1, 1] for the first and the second frame that come of one."""
        half = conv.weight.shape[0] // 2
        weight = conv.weight.flatten(2).transpose(1, 2)
        return [pack_linear(weight[s], conv.bias[s]) for s in (slice(0, half), slice(half, None))]

    def __getattr__(self, name: str) -> Any:
        if name == "vae":  # not set yet
            raise AttributeError(name)
        return getattr(self.vae, name)

    def decode_step(self, z: Tensor, state: State | None) -> tuple[Tensor, State]:
        """As ``VideoVAE.decode_step``, for one stream (B = 1) without gradients."""
        c = self.vae.cfg.latent_channels
        if z.ndim != 5 or z.shape[:2] != (1, c) or z.shape[2] < 1:
            raise InputError(f"z: expected [1, {c}, T >= 1, h, w], got {list(z.shape)}")
        if state is not None and len(state) != self.vae.num_decoder_states:
            raise InputError(f"state: expected {self.vae.num_decoder_states} tensors, got {len(state)}")
        size = (z.shape[3], z.shape[4])
        free = self._free.setdefault(size, deque())
        try:
            stream = free.pop()  # atomic: two sessions never share buffers
        except IndexError:
            stream = _Stream(self, *size)
        with torch_alone() as threads:
            frames = stream.decode(z[0].permute(1, 2, 3, 0), state, threads)
            after = stream.state()
            free.append(stream)
            video = unfold_patch(frames.permute(3, 0, 1, 2)[None], self.vae.cfg.patch)
            return video.clamp(-1.0, 1.0), after


class _Stream:
    """Buffers and kernels of one stream at a time: one program for a stream's first latent, one for each later one."""

    def __init__(self, owner: StreamedVAE, height: int, width: int) -> None:
        self.owner = owner
        self.z = torch.zeros(1, height, width, owner.vae.cfg.latent_channels, dtype=torch.bfloat16)
        self.rings: list[Tensor] = []  # per time convolution: the last two frames, then this step's
        self.steady, self.steady_out = self._record(first=False)
        self.first, self.first_out = self._record(first=True)

    def decode(self, z: Tensor, state: State | None, threads: int) -> Tensor:
        """Raw latents [T, h, w, C] -> frames [F, H, W, 3 * patch^2] fp32."""
        frames = []
        if state is None:
            for ring in self.rings:
                ring[:2] = 0
        else:
            for ring, given in zip(self.rings, state, strict=True):
                ring[:2] = given[0].permute(1, 2, 3, 0)
        for i, latent in enumerate(z):
            self.z[0] = latent
            if i == 0 and state is None:
                self.first.run(threads)
                frames.append(self.first_out.clone())
                continue
            self.steady.run(threads)
            frames.append(self.steady_out.clone())
            for ring in self.rings:
                ring[:2] = ring[-2:].clone()
        return torch.cat(frames)

    def state(self) -> State:
        return tuple(ring[:2].permute(3, 0, 1, 2)[None].float().contiguous() for ring in self.rings)

    # ---- recording -----------------------------------------------------------------------------------------------

    def _record(self, *, first: bool) -> tuple[Program, Tensor]:
        d, program, packed = self.owner.vae.decoder, Program(), self.owner.packed
        _, h, w, _ = self.z.shape
        inner = _padded(1, h, w, self.z.shape[3])
        program.linear(self.z, packed[id(self.owner.vae.post_quant_conv)], _inside(inner))
        x = torch.zeros(1, h, w, d.stem.weight.shape[0])
        _conv(program, inner, packed[id(d.stem)], x)
        for layer in (*d.middle, *d.up):
            if isinstance(layer, ResidualBlock):
                x = self._residual(program, layer, x)
            elif isinstance(layer, FrameAttention):
                self._attention(program, layer, x)
            else:
                x = self._upsample(program, layer, x, first)
        inner = self._normed(program, d.head.norm, x)
        out = torch.zeros(*x.shape[:3], d.head.conv.weight.shape[0])
        _conv(program, inner, packed[id(d.head.conv)], out)
        return program, out

    def _normed(self, program: Program, norm: Any, x: Tensor) -> Tensor:
        """Normalised, through SiLU, in bf16 with a border of zeros."""
        inner = _padded(*x.shape)
        program.norm("length", x, _inside(inner), scale=_scale(norm), silu=True)
        return inner

    def _residual(self, program: Program, layer: ResidualBlock, x: Tensor) -> Tensor:
        packed = self.owner.packed
        inner = self._normed(program, layer.norm1, x)
        middle = torch.zeros(*x.shape[:3], layer.conv1.weight.shape[0])
        _conv(program, inner, packed[id(layer.conv1)], middle)
        if layer.shortcut is not None:
            copy, out = x.new_zeros(x.shape, dtype=torch.bfloat16), torch.zeros_like(middle)
            program.norm("none", x, copy)
            program.linear(copy, packed[id(layer.shortcut)], out)
            x = out
        inner = self._normed(program, layer.norm2, middle)
        _conv(program, inner, packed[id(layer.conv2)], x, finish="residual")
        return x

    def _attention(self, program: Program, layer: FrameAttention, x: Tensor) -> None:
        f, h, w, c = x.shape
        rows = torch.zeros(f, h, w, c, dtype=torch.bfloat16)
        qkv, out = torch.zeros(f, h, w, 3 * c, dtype=torch.bfloat16), torch.zeros_like(rows)
        program.norm("length", x, rows, scale=_scale(layer.norm))
        program.linear(rows, self.owner.packed[id(layer.qkv)], qkv)
        q, k, v = (part[:, :, None] for part in qkv.flatten(1, 2).split(c, -1))
        program.attention(q, k, v, out.flatten(1, 2)[:, :, None])
        program.linear(out, self.owner.packed[id(layer.proj)], x, finish="residual")

    def _upsample(self, program: Program, layer: Upsample, x: Tensor, first: bool) -> Tensor:
        f, h, w, c = x.shape
        if layer.time_conv is None or first:
            inner = _padded(f, h, w, c)
            program.norm("none", x, _inside(inner))
        else:
            ring = torch.zeros(2 + f, h, w, c, dtype=torch.bfloat16)
            self.rings.append(ring)
            program.norm("none", x, ring[2:])
            inner = _padded(2 * f, h, w, c)
            past = [-2 * ring.stride(0), -ring.stride(0), 0]
            for j, weight in enumerate(self.owner.in_time[id(layer)]):
                program.linear(ring[2:], weight, _inside(inner)[j::2], taps=past)
        out = torch.zeros(inner.shape[0], 2 * h, 2 * w, layer.conv.weight.shape[0])
        source = _inside(inner)
        for a in (0, 1):
            for b in (0, 1):
                taps = [(a - 1 + u) * source.stride(1) + (b - 1 + v) * source.stride(2) for u in (0, 1) for v in (0, 1)]
                program.linear(source, self.owner.doubling[id(layer)][a][b], out[:, a::2, b::2], taps=taps)
        return out


def _padded(f: int, h: int, w: int, c: int) -> Tensor:
    return torch.zeros(f, h + 2, w + 2, c, dtype=torch.bfloat16)


def _inside(x: Tensor) -> Tensor:
    return x[:, 1:-1, 1:-1]


def _scale(norm: Any) -> Table:
    return Table(norm.weight.detach().float().reshape(1, -1))


def _conv(program: Program, inner: Tensor, weight: PackedLinear, y: Tensor, finish: str = "store") -> None:
    """Records a 3 x 3 convolution of bordered pictures."""
    x = _inside(inner)
    taps = [(i - 1) * x.stride(1) + (j - 1) * x.stride(2) for i in range(3) for j in range(3)]
    program.linear(x, weight, y, finish=finish, taps=taps)
