"""Causal video VAE of the Wan 2.1 lineage: stride (4, 8, 8), 1 + 4k frames, streaming in both directions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from avatar_rt.config import VAEConfig
from avatar_rt.errors import InputError
from avatar_rt.models.stripes import Seams, striped
from avatar_rt.models.vae_blocks import (
    CausalConv3d,
    Downsample,
    FrameAttention,
    OutputHead,
    ResidualBlock,
    State,
    Upsample,
    fold_patch,
    run_chain,
    unfold_patch,
)


class Encoder(nn.Module):
    """Pixels (patches folded) to the two moments, 2 * latent_channels."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        base = cfg.encoder_base_dim or cfg.base_dim
        widths = [base * m for m in cfg.dim_mult]
        kernels = cfg.time_kernels
        self.stem = CausalConv3d(3 * cfg.patch**2, base, (kernels[0], 3, 3))
        down: list[nn.Module] = []
        dim = base
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                down.append(ResidualBlock(dim, width, kernels[level]))
                dim = width
            if level < len(widths) - 1:
                down.append(Downsample(dim, cfg.temporal_downsample[level]))
        self.down = nn.ModuleList(down)
        self.middle = _middle(dim, kernels[-1])
        self.head = OutputHead(dim, 2 * cfg.latent_channels, kernels[-1])

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return run_chain([self.stem, *self.down, *self.middle, self.head], x, state)


class Decoder(nn.Module):
    """Latents to pixels (patches folded)."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        widths = [cfg.base_dim * m for m in cfg.dim_mult]
        kernels = cfg.time_kernels
        self.stem = CausalConv3d(cfg.latent_channels, widths[-1], (kernels[-1], 3, 3))
        self.middle = _middle(widths[-1], kernels[-1])
        up: list[nn.Module] = []
        dim = widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(cfg.num_res_blocks + 1):
                up.append(ResidualBlock(dim, widths[level], kernels[level]))
                dim = widths[level]
            if level:
                up.append(Upsample(dim, cfg.temporal_downsample[level - 1]))
                dim //= 2
        self.up = nn.ModuleList(up)
        self.head = OutputHead(dim, 3 * cfg.patch**2, kernels[0])

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return run_chain([self.stem, *self.middle, *self.up, self.head], x, state)


class VideoVAE(nn.Module):
    """Video to latents and back. Weights are shared by all streams; a stream's state is an argument and a result.

    Video is [B, 3, F, H, W] in -1..1 with F = 1 + 4k; latents are [B, latent_channels, T, H/8, W/8] with T = 1 + k.
    Latent 0 holds frame 0, latent k frames 4k-3..4k. Computes in the dtype of its input.
    """

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        moments = 2 * cfg.latent_channels
        self.encoder = Encoder(cfg)
        self.quant_conv = CausalConv3d(moments, moments, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(cfg.latent_channels, cfg.latent_channels, (1, 1, 1))
        self.decoder = Decoder(cfg)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole clips.

        Args:
            video: [B, 3, F, H, W] in -1..1, F = 1 + 4k.

        Returns: mean and log-variance of the raw latents, each [B, latent_channels, T, H/8, W/8].
        Raises: InputError on another shape.
        """
        mean, logvar, _ = self.encode_step(video, None)
        return mean, logvar

    def encode_step(self, video: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Encode the next frames of a stream: 1 + 4k at its start (state None), 4k later. Returns also the state."""
        self._check_video(video, first=state is None)
        x, state = self.encoder(fold_patch(video, self.cfg.patch), state)
        mean, logvar = self.quant_conv(x)[0].chunk(2, dim=1)
        return mean, logvar, state

    def decode(self, z: Tensor) -> Tensor:
        """Decode whole clips: raw latents [B, latent_channels, T, h, w] -> [B, 3, 1 + 4(T-1), 8h, 8w] in -1..1.

        Equal to ``decode_step`` latent by latent, at the memory cost of the whole clip. Raises InputError.
        """
        return self.decode_step(z, None)[0]

    def decode_step(self, z: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Decode the next latents of a stream.

        Args:
            z: [B, latent_channels, t, h, w] raw latents, any t >= 1.
            state: None at the start of the stream, then what the last call returned.

        Returns: video [B, 3, F, 8h, 8w] in -1..1 (1 frame for the stream's first latent, 4 for each later one), state.
        Raises: InputError on a shape above or a state of another decoder.
        """
        video, state = self.decode_unclamped(z, state)
        return video.clamp(-1.0, 1.0), state

    def decode_unclamped(self, z: Tensor, state: State | None) -> tuple[Tensor, State]:
        """``decode_step`` without the final clamp, which would stop the gradient of training."""
        c = self.cfg.latent_channels
        if z.ndim != 5 or z.shape[1] != c or z.shape[2] < 1:
            raise InputError(f"z: expected [B, {c}, T >= 1, h, w], got {list(z.shape)}")
        if state is not None and len(state) != self.num_decoder_states:
            raise InputError(f"state: expected {self.num_decoder_states} tensors, got {len(state)}")
        x, state = self.decoder(self.post_quant_conv(z)[0], state)
        return unfold_patch(x, self.cfg.patch), state

    def striped(self, seams: Seams) -> VideoVAE:
        """This VAE, its weights shared, whose decoder works on one horizontal stripe of the picture: latents, states
        and video are then the stripe's rows, and every rank calls alike."""
        return striped(self, seams)

    @property
    def num_decoder_states(self) -> int:
        d = self.decoder
        return sum(layer.num_states for layer in (d.stem, *d.middle, *d.up, d.head))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents to the diffusion model's space: (z - mean) / std per channel; identity without statistics."""
        return (z - self._stat(z, "latent_mean")) / self._stat(z, "latent_std") if self.cfg.latent_std else z

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of ``normalize``."""
        return z * self._stat(z, "latent_std") + self._stat(z, "latent_mean") if self.cfg.latent_std else z

    def _stat(self, z: Tensor, name: str) -> Tensor:
        return torch.tensor(getattr(self.cfg, name), dtype=z.dtype, device=z.device).view(1, -1, 1, 1, 1)

    def _check_video(self, video: Tensor, first: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise InputError(f"video: expected [B, 3, F, H, W], got {list(video.shape)}")
        frames, time, space = video.shape[2], self.cfg.temporal_stride, self.cfg.spatial_stride
        if frames < 1 or (frames - first) % time:
            expected = f"1 + {time}k frames" if first else f"a multiple of {time} frames after the start of a stream"
            raise InputError(f"video: expected {expected}, got {frames}")
        if video.shape[3] % space or video.shape[4] % space or 0 in video.shape[3:]:
            got = f"{video.shape[3]} x {video.shape[4]}"
            raise InputError(f"video: expected height and width in multiples of {space}, got {got}")


def vae_names(cfg: VAEConfig) -> dict[str, str]:
    """Every name of VideoVAE's state dict -> the name in diffusers' AutoencoderKLWan (Wan 2.1 class). Shapes agree."""
    with torch.device("meta"):
        ours = VideoVAE(cfg).state_dict()
    prefixes = dict(_layer_names(cfg))
    names = {}
    for name in ours:
        prefix = max((p for p in prefixes if f"{name}.".startswith(p + ".")), key=len)
        rest = name[len(prefix) :]
        for mine, theirs in _INNER_NAMES:
            rest = rest.replace(mine, theirs)
        names[name] = prefixes[prefix] + rest
    return names


_INNER_NAMES = (
    (".norm1.weight", ".norm1.gamma"),
    (".norm2.weight", ".norm2.gamma"),
    (".norm.weight", ".norm.gamma"),
    (".shortcut.", ".conv_shortcut."),
    (".qkv.", ".to_qkv."),
)


def _layer_names(cfg: VAEConfig) -> Iterator[tuple[str, str]]:
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for part in ("encoder", "decoder"):
        yield f"{part}.stem", f"{part}.conv_in"
        yield f"{part}.head.norm.weight", f"{part}.norm_out.gamma"
        yield f"{part}.head.conv", f"{part}.conv_out"
        for i, theirs in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            yield f"{part}.middle.{i}", f"{part}.mid_block.{theirs}"
    levels, per_level = len(cfg.dim_mult), cfg.num_res_blocks + 1
    for i in range(levels * per_level - 1):
        yield f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        if i % per_level == cfg.num_res_blocks:
            yield f"encoder.down.{i}.conv", f"encoder.down_blocks.{i}.resample.1"
    for level in range(levels):
        first = level * (per_level + 1)
        for j in range(per_level):
            yield f"decoder.up.{first + j}", f"decoder.up_blocks.{level}.resnets.{j}"
        if level < levels - 1:
            last = f"decoder.up_blocks.{level}.upsamplers.0"
            yield f"decoder.up.{first + per_level}", last
            yield f"decoder.up.{first + per_level}.conv", f"{last}.resample.1"


def _middle(dim: int, time_kernel: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(dim, dim, time_kernel), FrameAttention(dim), ResidualBlock(dim, dim, time_kernel)]
    )
