"""Every training method, small, on a corpus of noise in the rendered corpus's format: what the loop's tests train.

Run as a program it trains one of them: ``python tests/train_methods.py METHOD FOLDER OUT UNTIL [resume]``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_stages import build

from avatar_rt.config import MotionConfig, SpeechConfig, VAEConfig
from avatar_rt.models.motion import MotionEncoder
from avatar_rt.models.weights import save_weights
from training.data.corpus import ARRAYS, Corpus
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.encoders import MotionMethod, SpeechMethod
from training.methods.flow import Bucket
from training.methods.identity import IdentityMethod
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.methods.sync import SyncMethod
from training.methods.t2v import T2VMethod, T2VSettings
from training.methods.vae import VAEMethod
from training.recipe import Method, Recipe
from training.rewards.identity import IdentityNet
from training.train import train

FRAMES, SIZE = 77, 64
MOTION = MotionConfig(base_dim=8)


def write_corpus(folder: Path) -> Path:
    """Two clips each of identities 0 (held out) to 3, and two networks."""
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
    return folder


def _clips(folder: Path) -> tuple[Corpus, Corpus]:
    return Corpus(folder, "train"), Corpus(folder, "val")


def _vae(folder: Path, **settings: object) -> Method:
    cfg = VAEConfig(base_dim=8, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), patch=2)
    return VAEMethod(cfg, *_clips(folder), batch=1, dtype=torch.float32, fuse=False, **settings)


def _looks(folder: Path, **settings: object) -> Method:
    return _vae(folder, looks=folder / "weights" / "identity.safetensors", **settings)


def _speech(folder: Path) -> Method:
    return SpeechMethod(SpeechConfig(hidden_dim=16, dim=8), *_clips(folder), [], [], frames=24, batch=2)


def _stage(method: Any, settings: Any) -> Callable[[Path], Method]:
    buckets = (Bucket(2, people=2, windows=2, first=0.5, last=0.5), Bucket(4, people=2, first=0.5, last=0.5))
    return lambda folder: build(method, replace(settings, buckets=buckets), steps=9)


BUILDS: dict[str, Callable[..., Method]] = {
    "vae": _vae,
    "vae.looks": _looks,
    "vae.decoder": lambda folder: _looks(folder, decoder_only=True, latent_noise=0.1),
    "vae.smooth": lambda folder: _looks(folder, equivariance=0.5, latent_noise=0.2),
    "speech": _speech,
    "motion": lambda folder: MotionMethod(MOTION, *_clips(folder), batch=2),
    "identity": lambda folder: IdentityMethod(*_clips(folder), people=3),
    "sync": lambda folder: SyncMethod(*([c] for c in _clips(folder)), odds=[1.0], batch=2),
    "t2v": _stage(T2VMethod, T2VSettings()),
    "a2v": _stage(A2VMethod, A2VSettings()),
    "personality": _stage(PersonalityMethod, PersonalitySettings()),
}


def recipe(name: str) -> Recipe:
    """Nine steps of a method with a checkpoint at every other; before the end nothing is validated or exported."""
    whole = Recipe(name, BUILDS[name], steps=9, lr=1e-3, warmup=2, ema=0.9, autocast=False, log_every=1,
                   checkpoint_every=2, validate_every=9)  # fmt: skip
    if name.startswith("vae"):
        return replace(whole, conv_muon_lr=1e-3)
    return replace(whole, muon_lr=1e-3) if name in ("t2v", "a2v", "personality") else whole


if __name__ == "__main__":
    chosen, folder, out, until = sys.argv[1:5]
    train(recipe(chosen), Path(folder), Path(out), resume="resume" in sys.argv, until=int(until))
