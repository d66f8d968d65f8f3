"""Training of the causal video VAE: reconstruct short windows of clips, the mouth and the eyes above all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar_rt.config import VAEConfig
from avatar_rt.models import vae_blocks
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.vae_blocks import CausalConv3d, FrameAttention, FrameConv2d, ResidualBlock
from avatar_rt.models.weights import load_weights, save_weights
from training.methods.augment import draw
from training.methods.sheet import save_sheet
from training.recipe import device_of, to_device
from training.rewards.identity import IdentityNet, crop_faces, perceptual_distance

KL_WEIGHT = 1e-5  # of the mean over latent elements
EDGE_WEIGHT = 0.5
MSE_WEIGHT = 2.0
SHRUNK = (0.5, 0.625, 0.75, 0.875)  # sizes at which shrunk latents must decode


class VAEMethod:
    """L1, MSE, edges at three scales and a trace of KL.

    Args:
        cfg: Sizes of the VAE.
        train, val: Corpus objects; ``val`` has other identities.
        batch: Clips of 9 frames per step; a quarter of the steps take half as many clips of 17.
        real_frames: Optional directory of ``*.npy`` files, uint8 [n, F >= 17, H, W, 3] windows of real video; a share
            ``real_share`` of every batch is drawn from them, so that faces of people who are not rendered survive too.
        dtype: What the convolutions compute in; the weights stay fp32.
        fuse: Compile norm and SiLU into one loop: a minute at the start, a quarter off every step.
        decoder_only: Leave the encoder as it is: what was trained on its latents stays valid.
        looks: Weights of the identity network: faces must also look alike to it, not only match pixel by pixel.
        look_weight: Weight of that perceptual distance.
        latent_noise: Largest deviation, in units of the latents' own, of noise added to half of the clips' latents:
            what a diffusion model predicts is never exact.
        equivariance: Share of the steps in which the latents are made smaller and must decode to the smaller video
            (EQ-VAE, arXiv 2502.09509): what is coarse in the picture is then coarse in the latents, which a diffusion
            model learns several times sooner.
    """

    def __init__(
        self, cfg: VAEConfig, train: Any, val: Any, *, batch: int = 4,
        real_frames: Path | None = None, real_share: float = 0.12, dtype: torch.dtype = torch.bfloat16,
        fuse: bool = True, decoder_only: bool = False, latent_noise: float = 0.0,
        equivariance: float = 0.0, looks: Path | None = None, look_weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.module = VideoVAE(cfg)
        start_near_linear(self.module)
        if decoder_only:
            for name, p in self.module.named_parameters():
                p.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
        self.latent_noise, self.equivariance = latent_noise, equivariance
        if fuse:
            vae_blocks.channel_norm_silu = torch.compile(vae_blocks.channel_norm_silu, dynamic=True)
        self.cfg, self.train, self.val = cfg, train, val
        self.batch, self.dtype, self.real_share = batch, dtype, real_share
        self.looks, self.look_weight = None, look_weight
        if looks is not None:
            self.looks = IdentityNet().requires_grad_(False)
            load_weights(self.looks, looks, dtype=torch.float32)
        files = sorted(real_frames.glob("*.npy")) if real_frames else []
        self.real = [np.load(f, mmap_mode="r") for f in files]

    def to(self, device: torch.device) -> None:
        for part in (self.module, self.looks):
            if part is not None:
                part.to(device)

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        num_frames, clips = (17, max(self.batch // 2, 1)) if step % 4 == 3 else (9, self.batch)
        windows = torch.stack([self._draw(num_frames, generator) for _ in range(clips)])
        device = device_of(self.module)
        windows = to_device(augment_windows(windows, generator), device)
        video, weight = windows[:, :3], windows[:, 3:]
        with torch.autocast(device.type, enabled=False):
            mean, logvar = (m.float() for m in self.module.encode(video.to(self.dtype)))
            logvar = logvar.clamp(-20, 10)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(device)
            if self.equivariance and torch.rand((), generator=generator) < self.equivariance:
                z, video, weight = shrink(SHRUNK[draw(len(SHRUNK), generator)], z, video, weight)
            if self.latent_noise:
                strength = (2 * torch.rand((clips, 1, 1, 1, 1), generator=generator) - 1).clamp_min(0).to(device)
                spread = self.latent_noise * mean.std((0, 2, 3, 4), keepdim=True)
                z = z + strength * spread * torch.randn(z.shape, generator=generator).to(device)
            out = self.module.decode_unclamped(z.to(self.dtype), None)[0].float()
        l1, mse, edges = reconstruction_losses(out, video, weight)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = l1 + MSE_WEIGHT * mse + EDGE_WEIGHT * edges + KL_WEIGHT * kl
        values = {"l1": l1, "edges": edges, "kl": kl}
        if self.looks is not None:
            values["looks"] = look_loss(self.looks, out, video, weight, generator)
            loss = loss + self.look_weight * values["looks"]
        plain = F.mse_loss(out.detach().clamp(-1, 1), video)
        noise = (0.5 * logvar.detach()).exp().mean() / mean.detach().std()
        return {"loss": loss, **values, "psnr": -10 * (plain / 4).log10(), "noise": noise, "samples": clips}

    def _draw(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """[4, F, H, W]: colours in -1..1 and the weight of each pixel."""
        if self.real and torch.rand((), generator=generator) < self.real_share:
            pool = self.real[draw(len(self.real), generator)]
            window = pool[draw(len(pool), generator)]
            start = draw(len(window) - num_frames + 1, generator)
            frames = np.asarray(window[start : start + num_frames])
            boxes = None
        else:
            clip = draw(len(self.train), generator)
            start = draw(self.train.num_frames - num_frames + 1, generator)
            frames = np.asarray(self.train.frames(clip, start, num_frames))
            boxes = np.asarray(self.train.facebox(clip, start, num_frames))
        video = to_video(frames)
        return torch.cat([video, face_weight(boxes, video.shape[1:])])

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def validate(self, step: int, out: Path, *, clips: int = 24, num_frames: int = 33) -> dict[str, float]:
        """PSNR in dB over whole frames, mouths and eyes of held-out identities, and a contact sheet."""
        whole, mouth, eyes, sheet, device = [], [], [], [], device_of(self.module)
        for clip in np.linspace(0, len(self.val) - 1, min(clips, len(self.val))).astype(int).tolist():
            n = min(num_frames, (self.val.num_frames - 1) // 4 * 4 + 1)
            video = to_video(np.asarray(self.val.frames(clip, 0, n)))[None]
            boxes = np.asarray(self.val.facebox(clip, 0, n))
            decoded = self.module.decode(self.module.encode(to_device(video, device))[0]).cpu()
            error = (decoded - video)[0].square().mean(0)
            whole.append(psnr(error))
            mouth.append(psnr(error[region(boxes, error.shape, *MOUTH)]))
            eyes.append(psnr(error[region(boxes, error.shape, *EYES)]))
            sheet.append(torch.cat([video[0, :, [0, n // 2, n - 1]], decoded[0, :, [0, n // 2, n - 1]]], 1))
        save_sheet(sheet[:12], out / f"vae-{step:06d}.png", across=2)
        return {
            "psnr": float(np.mean(whole)), "psnr_min": float(np.min(whole)),
            "mouth_psnr": float(np.mean(mouth)), "eyes_psnr": float(np.mean(eyes)),
        }  # fmt: skip

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def export(self, out: Path) -> None:
        """``vae.safetensors`` in bf16 and ``vae_stats.json`` with the statistics of the latents over the corpus."""
        save_weights(self.module, out / "vae.safetensors", dtype=torch.bfloat16)
        mean, std = latent_statistics(self.module, self.train)
        (out / "vae_stats.json").write_text(json.dumps({"latent_mean": mean, "latent_std": std}, indent=1) + "\n")


@torch.no_grad()
def start_near_linear(vae: VideoVAE) -> None:
    """Orthogonal convolutions, quiet residual branches, latents almost free of noise.

    The VAE then begins as an all but linear map and back, and needs half the steps of the usual random start.
    """
    for layer in vae.modules():
        if isinstance(layer, CausalConv3d | FrameConv2d):
            nn.init.orthogonal_(layer.weight)
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.conv2.weight.mul_(0.3)
        elif isinstance(layer, FrameAttention):
            layer.proj.weight.mul_(0.3)
    vae.decoder.head.conv.weight.mul_(0.3)
    vae.quant_conv.weight[vae.cfg.latent_channels :] *= 0.1
    vae.quant_conv.bias[vae.cfg.latent_channels :] = -6.0


FACE = (0.0, 0.0, 1.0, 1.0)
MOUTH = (0.2, 0.58, 0.8, 0.98)  # x0, y0, x1, y1 in fractions of the face box
EYES = (0.08, 0.22, 0.92, 0.5)


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> fp32 [3, F, H, W] in -1..1."""
    return torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2).contiguous()


def region(boxes: np.ndarray, shape: tuple[int, ...], x0: float, y0: float, x1: float, y1: float) -> Tensor:
    """bool [F, H, W]: the part of each frame's face box [F, 4] given in fractions of it."""
    _, h, w = shape
    boxes = torch.from_numpy(np.array(boxes, dtype=np.float32))[:, :, None]
    left, top = boxes[:, 0], boxes[:, 1]
    width, height = boxes[:, 2] - left, boxes[:, 3] - top
    x, y = torch.arange(w)[None] + 0.5, torch.arange(h)[None] + 0.5
    across = (x >= left + x0 * width) & (x <= left + x1 * width)
    down = (y >= top + y0 * height) & (y <= top + y1 * height)
    return down[:, :, None] & across[:, None, :]


def face_weight(boxes: np.ndarray | None, shape: tuple[int, ...]) -> Tensor:
    """[1, F, H, W]: 1, the face 2.5, eyes 5, mouth 5; all 2 where there is no box."""
    if boxes is None:
        return torch.full((1, *shape), 2.0)
    face, eyes, mouth = (region(boxes, shape, *part).float() for part in (FACE, EYES, MOUTH))
    return (1 + 1.5 * face + 2.5 * (eyes + mouth))[None]


def augment_windows(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, zoom, recolour and cover [B, 4, F, H, W]; one choice per clip, the same for all its frames."""
    b, _, f, h, w = windows.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((b, *shape), generator=generator)

    windows = torch.where((uniform(0, 1) < 0.5).view(b, 1, 1, 1, 1), windows.flip(-1), windows)
    zoomed = (uniform(0, 1) < 0.25).nonzero()[:, 0].tolist()
    scale, shift = uniform(0.45, 1.0), uniform(-1, 1, 2)
    for i in zoomed:
        theta = torch.zeros(1, 2, 3)
        theta[0, 0, 0] = theta[0, 1, 1] = scale[i]
        theta[0, :, 2] = shift[i] * (1 - scale[i])
        flat = windows[i].reshape(1, -1, h, w)
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        windows[i] = F.grid_sample(flat, grid, align_corners=False, padding_mode="border").reshape(-1, f, h, w)
    colour, weight = windows[:, :3], windows[:, 3:]
    jitter = (uniform(0, 1) < 0.5).view(b, 1, 1, 1, 1).float()
    gain = 1 + jitter * (uniform(0.6, 1.25, 1, 1, 1, 1) * uniform(0.85, 1.15, 3, 1, 1, 1) - 1)
    offset = jitter * (uniform(-0.25, 0.25, 1, 1, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1, 1))
    saturation = 1 + jitter * (uniform(0.3, 1.3, 1, 1, 1, 1) - 1)
    colour = torch.lerp(colour.mean(1, keepdim=True), colour, saturation) * gain + offset
    return torch.cat([_cover(colour.clamp(-1, 1), uniform), weight], dim=1)


def _cover(colour: Tensor, uniform: Any) -> Tensor:
    """Paint a flat rectangle over a tenth of the clips: scene images come with the head blanked."""
    h, w = colour.shape[-2:]
    size, start = uniform(0.2, 0.8, 2), uniform(0, 0.7, 2)
    size = size * (uniform(0, 1, 1) < 0.1)
    rows, columns = torch.arange(h)[None] / h, torch.arange(w)[None] / w
    tall = (rows >= start[:, :1]) & (rows < start[:, :1] + size[:, :1])
    wide = (columns >= start[:, 1:]) & (columns < start[:, 1:] + size[:, 1:])
    covered = (tall[:, :, None] & wide[:, None])[:, None, None]
    return torch.where(covered, uniform(-0.2, 0.2, 1, 1, 1, 1), colour)


def reconstruction_losses(out: Tensor, video: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted L1 and MSE of [B, 3, F, H, W], and L1 of spatial differences at full, half and quarter size."""
    weight = weight / weight.mean()
    error = out - video
    l1, mse = (weight * error.abs()).mean(), (weight * error.square()).mean()
    b, c, f, h, w = error.shape
    flat, area = error.transpose(1, 2).reshape(b * f, c, h, w), weight.transpose(1, 2).reshape(b * f, 1, h, w)
    edges = error.new_zeros(())
    for scale in range(3):
        if scale:
            flat, area = F.avg_pool2d(flat, 2), F.avg_pool2d(area, 2)
        across, down = flat[..., 1:] - flat[..., :-1], flat[..., 1:, :] - flat[..., :-1, :]
        edges = edges + (area[..., 1:] * across.abs()).mean() + (area[..., 1:, :] * down.abs()).mean()
    return l1, mse, edges / 3


def shrink(by: float, *videos: Tensor) -> list[Tensor]:
    """Each [B, C, F, H, W] at ``by`` of its height and width, without aliasing."""
    small = []
    for video in videos:
        b, _, f, h, w = video.shape
        pictures = video.transpose(1, 2).flatten(0, 1)
        size = [round(h * by), round(w * by)]
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
        small.append(pictures.unflatten(0, (b, f)).transpose(1, 2))
    return small


def look_loss(net: IdentityNet, out: Tensor, video: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Perceptual distance of the faces in every fourth frame of [B, 3, F, H, W]; a face is where ``weight`` says so."""
    at = slice(draw(4, generator), None, 4)
    made, true, where = (x[:, :, at].transpose(1, 2).flatten(0, 1) for x in (out, video, weight))
    boxes, seen = boxes_of(where[:, 0] > 2.25)
    if not seen.any():
        return out.new_zeros(())
    crops = (crop_faces(x[seen], boxes[seen]) for x in (made, true))
    with torch.autocast(out.device.type, dtype=torch.bfloat16):
        return perceptual_distance(net, *crops)


def boxes_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bounding boxes [N, 4] of bool [N, H, W] in pixels, and bool [N]: whether there is one of any size."""
    rows, columns = mask.any(2).float(), mask.any(1).float()
    first = torch.stack([columns.argmax(1), rows.argmax(1)], 1).float()
    last = torch.stack([mask.shape[2] - columns.flip(1).argmax(1), mask.shape[1] - rows.flip(1).argmax(1)], 1).float()
    return torch.cat([first, last], 1), mask.flatten(1).sum(1) > 100


@torch.no_grad()
def latent_statistics(vae: VideoVAE, corpus: Any, clips: int = 200) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over whole clips spread across the corpus."""
    moments = []
    for clip in np.linspace(0, len(corpus) - 1, min(clips, len(corpus))).astype(int).tolist():
        n = (corpus.num_frames - 1) // 4 * 4 + 1
        z = vae.encode(to_video(np.asarray(corpus.frames(clip, 0, n)))[None].to(device_of(vae)))[0].double()
        moments.append(torch.stack([z.mean((0, 2, 3, 4)), z.square().mean((0, 2, 3, 4))]))
    mean, square = torch.stack(moments).mean(0)
    std = (square - mean.square()).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def psnr(squared_error: Tensor) -> float:
    """dB from squared errors of values in -1..1."""
    return float(-10 * (squared_error.mean() / 4).clamp_min(1e-10).log10())
