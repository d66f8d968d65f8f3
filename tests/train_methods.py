"""Every training method, small, on a corpus of noise in the rendered corpus's format: what the loop's tests train.

Run as a program it trains one of them: ``python tests/train_methods.py METHOD FOLDER OUT UNTIL [resume]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from avatar_rt.config import AvatarConfig, DiTConfig, MotionConfig, SpeechConfig, TextConfig, VAEConfig, preset
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.weights import save_weights
from training.data.corpus import ARRAYS, Corpus
from training.methods.avatar import AvatarMethod, AvatarSettings
from training.methods.encoders import MotionMethod, SpeechMethod
from training.methods.identity import IdentityMethod
from training.methods.sync import SyncMethod
from training.methods.vae import VAEMethod
from training.recipe import Method, Recipe
from training.rewards.identity import IdentityNet
from training.train import train

FRAMES, SIZE = 77, 64
MOTION = MotionConfig(base_dim=8)
CONFIG = AvatarConfig(
    name="small", height=32, width=32, motion=MOTION, text=TextConfig(dim=8, length=4, buckets=16),
    dit=DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4, mask_channels=2,
                  reference=True, anchor=True, audio_dim=6, reference_audio_dim=6, audio_adapter_dim=4, motion_dim=248),
    vae=preset("tiny").vae,
)  # fmt: skip


def write_corpus(folder: Path) -> Path:
    """Two clips each of identities 0 (held out) to 3, the encoded table of the transformer, and two networks."""
    n, rng = 8, np.random.default_rng(0)
    box = np.array([16, 12, 48, 56], np.float32)
    arrays = {
        "frames": rng.integers(0, 255, (n, FRAMES, SIZE, SIZE, 3), np.uint8),
        "audio": rng.integers(-9999, 9999, (n, FRAMES * 640), np.int16),
        "motion": rng.random((n, FRAMES, 62), np.float32),
        "phonemes": rng.integers(0, 40, (n, FRAMES), np.int16),
        "mouth": rng.random((n, FRAMES), np.float32),
        "background": np.zeros((n, SIZE, SIZE, 3), np.uint8),
        "facebox": np.tile(box, (n, FRAMES, 1)),
    }
    shard = folder / "shard-00000"
    shard.mkdir(parents=True)
    for name in ARRAYS:
        np.save(shard / f"{name}.npy", arrays[name])
    metas = [{"identity": i // 2, "voice": "made:up", "style": {"lead": 0.085}} for i in range(n)]
    (shard / "meta.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metas))
    torch.manual_seed(0)
    (folder / "weights").mkdir()
    save_weights(IdentityNet(), folder / "weights" / "identity.safetensors", dtype=torch.bfloat16)
    save_weights(MotionEncoder(MOTION), folder / "weights" / "motion.safetensors", dtype=torch.bfloat16)
    write_table(folder, n)
    return folder


def write_table(folder: Path, n: int, latents: int = 9, side: int = 4) -> None:
    """Random latents, features and motion as training.data.latents writes them."""
    frames = 4 * latents - 3
    table = {
        "latents": torch.randn(n, latents, 16, side, side).half(), "speech": torch.randn(n, frames, 6).half(),
        "scenes": torch.randn(n, 2, 16, side, side).half(), "scene_masks": torch.rand(n, 2, side, side) > 0.5,
        "facebox": torch.tensor([8.0, 6, 24, 28]).repeat(n, frames, 1), "motion": torch.rand(n, frames, 62),
        "identity": torch.arange(n) // 2,
    }  # fmt: skip
    save_file(table, str(folder / "latents.safetensors"))
    (folder / "captions.json").write_text(json.dumps([f"person {i}" for i in range(n)]))


def _clips(folder: Path) -> tuple[Corpus, Corpus]:
    return Corpus(folder, "train"), Corpus(folder, "val")


def _vae(folder: Path, **settings: object) -> Method:
    cfg = VAEConfig(base_dim=8, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), patch=2)
    return VAEMethod(cfg, *_clips(folder), batch=1, dtype=torch.float32, fuse=False, **settings)


def _looks(folder: Path, **settings: object) -> Method:
    return _vae(folder, looks=folder / "weights" / "identity.safetensors", **settings)


def _speech(folder: Path) -> Method:
    return SpeechMethod(SpeechConfig(hidden_dim=16, dim=8), *_clips(folder), [], [], frames=24, batch=2)


def _avatar(folder: Path) -> Method:
    settings = AvatarSettings(buckets=((2, 2, 0.5, 0.5), (4, 1, 0.5, 0.5)), reference_lengths=(2,), drop_reference=0.0)
    return AvatarMethod(CONFIG, folder, folder / "weights", settings, 4)


BUILDS: dict[str, Callable[..., Method]] = {
    "vae": _vae,
    "vae.looks": _looks,
    "vae.decoder": lambda folder: _looks(folder, decoder_only=True, latent_noise=0.1),
    "speech": _speech,
    "motion": lambda folder: MotionMethod(MOTION, *_clips(folder), batch=2),
    "identity": lambda folder: IdentityMethod(*_clips(folder), people=3),
    "sync": lambda folder: SyncMethod(*([c] for c in _clips(folder)), odds=[1.0], batch=2),
    "avatar": _avatar,
}


def recipe(name: str) -> Recipe:
    """Nine steps of a method with a checkpoint at every other; before the end nothing is validated or exported."""
    whole = Recipe(name, BUILDS[name], steps=9, lr=1e-3, warmup=2, ema=0.9, autocast=False, log_every=1,
                   checkpoint_every=2, validate_every=9)  # fmt: skip
    if name.startswith("vae"):
        return replace(whole, conv_muon_lr=1e-3)
    return replace(whole, muon_lr=1e-3) if name == "avatar" else whole


if __name__ == "__main__":
    chosen, folder, out, until = sys.argv[1:5]
    train(recipe(chosen), Path(folder), Path(out), resume="resume" in sys.argv, until=int(until))
