"""A bundle of random weights that generates in milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from avatar_rt.config import (
    MOTION_CHANNELS,
    AvatarConfig,
    ChunkConfig,
    DiTConfig,
    MotionConfig,
    SamplingConfig,
    SpeechConfig,
    TextConfig,
    VAEConfig,
)
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.speech import SpeechEncoder
from avatar_rt.models.text import TextEncoder
from avatar_rt.models.vae import VideoVAE
from avatar_rt.models.weights import save_weights
from avatar_rt.runtime.manifest import write_manifest

CONFIG = AvatarConfig(
    name="small", height=32, width=32, reference_latents=3, output_scale=1,
    dit=DiTConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4, mask_channels=2, freq_dim=16,
                  reference=True, anchor=True, anchor_concat=True, audio_dim=16,
                  reference_audio_dim=16, motion_dim=4 * MOTION_CHANNELS),
    vae=VAEConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), patch=2,
                  time_kernel=(1, 1, 1)),
    speech=SpeechConfig(dim=16, hidden_dim=16, num_layers=2), motion=MotionConfig(size=32, base_dim=8),
    text=TextConfig(dim=8, length=4, buckets=16), chunk=ChunkConfig(latents=8, overlap=2, lead_in=True),
    sampling=SamplingConfig(steps=2, shift=3.0, audio_scale=1.5),
)  # fmt: skip


def write_bundle(path: Path, *, seed: int = 0, spread: float | None = None, **changes) -> Path:
    """Writes the bundle into a new folder; ``changes`` are of its configuration, ``spread`` of the transformer's
    weights, for pictures that have structure."""
    torch.manual_seed(seed)
    cfg = dataclasses.replace(CONFIG, **changes)
    path.mkdir(parents=True)
    modules = {
        "dit": VideoRefDiT(cfg.dit), "vae": VideoVAE(cfg.vae), "speech": SpeechEncoder(cfg.speech),
        "motion": MotionEncoder(cfg.motion), "text": TextEncoder(cfg.text),
    }  # fmt: skip
    for p in modules["dit"].parameters() if spread is not None else ():
        torch.nn.init.normal_(p, std=spread)
    for name, module in modules.items():
        save_weights(module, path / f"{name}.safetensors")
    (path / "config.json").write_text(cfg.to_json())
    write_manifest(path)
    return path
