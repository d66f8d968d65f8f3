"""A corpus and a model small enough for the stages' tests: noise with a face in it, and a transformer of two blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from avatar_rt.config import (
    AvatarConfig,
    ChunkConfig,
    DiTConfig,
    MotionConfig,
    SamplingConfig,
    SpeechConfig,
    TextConfig,
    VAEConfig,
)  # fmt: skip
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.vae import VideoVAE
from training.losses.suite import Networks
from training.rewards.identity import IdentityNet

CFG = AvatarConfig(
    name="small", height=32, width=32,
    dit=DiTConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=12, text_len=4, latent_channels=4,
                  freq_dim=32, mask_channels=2, reference=True, anchor=True, anchor_concat=True,
                  audio_dim=8, reference_audio_dim=8,
                  audio_adapter_dim=4, motion_dim=248, prediction="preconditioned"),
    vae=VAEConfig(base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), patch=2,
                  latent_channels=4, time_kernel=(1, 1, 1)),
    speech=SpeechConfig(dim=8, hidden_dim=8, num_layers=1), motion=MotionConfig(size=32, base_dim=8),
    text=TextConfig(dim=12, length=4, buckets=32), chunk=ChunkConfig(latents=4, overlap=1),
    sampling=SamplingConfig(steps=4, shift=3.0),
)  # fmt: skip


class SmallTable:
    """Eight clips of four people, two scenes each: what ``training.data.table.Table`` has, of noise."""

    def __init__(self, cfg: AvatarConfig = CFG, latents: int = 12) -> None:
        g = torch.Generator().manual_seed(5)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        d, clips, (h, w) = cfg.dit, 8, cfg.latent_size
        self.latents = noise(clips, latents, d.latent_channels, h, w).half()
        self.speech = noise(clips, 4 * latents - 3, d.audio_dim).half()
        self.scenes = noise(clips, 3, d.latent_channels, h, w).half()
        self.scene_masks = noise(clips, 3, h, w) > 0
        self.motion = noise(clips, latents, d.motion_dim)
        self.captions = [f"person {i // 2} in place {i}" for i in range(clips)]
        self.text = noise(clips, cfg.text.length, cfg.text.dim)
        self.weight = torch.zeros(clips, 2, h, w)
        self.weight[:, 0, 1:, 1:3] = 1
        self.weight[:, 1, 2:3, 1:3] = 1
        self.siblings = [[i ^ 1] for i in range(clips)]
        self.train, self.val = torch.arange(6), torch.arange(6, 8)


def networks(cfg: AvatarConfig = CFG) -> Networks:
    """The losses' frozen networks with random weights."""
    g = torch.random.get_rng_state()
    torch.manual_seed(3)
    nets = Networks(VideoVAE(cfg.vae), IdentityNet(8, 16), MotionEncoder(cfg.motion), SpeechEncoder(cfg.speech))
    torch.random.set_rng_state(g)
    return nets


def build(method: Any, settings: Any, *more: Any, cfg: AvatarConfig = CFG, steps: int = 10, seed: int = 0) -> Any:
    """A stage on the small corpus. Its module is the same for the same seed."""
    torch.manual_seed(seed)
    return method(cfg, SmallTable(cfg), settings, steps, *more)


def with_text_of_the_caller() -> AvatarConfig:
    """The configuration of a model whose captions come as embeddings."""
    return replace(CFG, text=replace(CFG.text, buckets=0))
