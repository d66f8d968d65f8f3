"""Runs of the tiny video VAE: ``--recipe vae``, then ``--recipe vae.decoder --init RUN``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from training.methods.vae import VAEMethod
from training.recipe import Recipe, configuration


def _build(corpus: Path, **settings: Any) -> VAEMethod:
    from training.data.corpus import Corpus

    real = corpus / "real"  # optional windows of real video, see VAEMethod
    train, val = Corpus(corpus, split="train"), Corpus(corpus, split="val")
    return VAEMethod(
        configuration(corpus / "weights").vae, train, val, real_frames=real if real.is_dir() else None, **settings
    )


def vae() -> Recipe:
    """Tiny VAE. The loop's autocast is off: the method chooses bf16 itself, losses stay fp32."""
    return Recipe(
        "vae", _build, steps=5000, lr=1.2e-3, conv_muon_lr=2.5e-3, warmup=100, final_lr=0.0, weight_decay=0.01,
        betas=(0.9, 0.98), ema=0.995, clip=0.5, autocast=False, checkpoint_every=100, validate_every=500,
    )  # fmt: skip


def looks() -> Recipe:
    """The VAE again, with faces that must also look alike to the identity network: ``CORPUS/weights/identity``."""

    def build(corpus: Path) -> VAEMethod:
        return _build(corpus, looks=corpus / "weights" / "identity.safetensors")

    return replace(vae(), name="vae.looks", build=build, steps=2500, lr=1e-3, conv_muon_lr=2e-3, warmup=30)


def smooth() -> Recipe:
    """The VAE once more, to latents that a transformer learns sooner: shrunk ones decode too, and noisy ones."""

    def build(corpus: Path) -> VAEMethod:
        looks = corpus / "weights" / "identity.safetensors"
        return _build(corpus, looks=looks, look_weight=0.3, equivariance=0.5, latent_noise=0.2)

    return replace(vae(), name="vae.smooth", build=build, steps=1500, lr=1e-3, conv_muon_lr=2e-3, warmup=30)


def decoder() -> Recipe:
    """Only the decoder, from a trained VAE: the latents stay what the transformer knows, and need not be exact."""

    def build(corpus: Path) -> VAEMethod:
        looks = corpus / "weights" / "identity.safetensors"
        return _build(corpus, decoder_only=True, latent_noise=0.1, looks=looks, look_weight=3.0)

    return replace(vae(), name="vae.decoder", build=build, steps=1500, lr=1e-3, conv_muon_lr=2e-3, warmup=30)
