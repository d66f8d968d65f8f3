"""Stage 3: ``--recipe personality --init RUN_OF_A2V``, its ablations, ``overfit``, ``tavr_14b``.

``personality.together`` trains all conditions at once from given weights, without the losses on decoded faces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.losses.suite import Suite, Term, open_networks
from training.methods.flow import Bucket
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.methods.windows import open_table
from training.recipe import Recipe, configuration
from training.recipes.t2v import OVERFIT, TINY, make, make_large

STEPS = 3000
TERMS = {
    "perceptual": Term(0.1, start=0, warmup=300),
    "identity": Term(0.1, start=200, warmup=300),
    "motion": Term(0.05, start=400, warmup=300),
    "temporal": Term(0.1, start=600, warmup=300),
    "sync": Term(0.05, start=800, warmup=300),
}
"""What the losses on decoded faces weigh and when each comes in, one after another."""


def _make(name: str, steps: int = STEPS, settings: PersonalitySettings | None = None, **changed: Any) -> Recipe:
    settings = settings or PersonalitySettings(**{"terms": TERMS, **changed})

    def build(corpus: Path) -> PersonalityMethod:
        weights = corpus / "weights"
        cfg = configuration(weights)
        suite = None
        if settings.terms:
            suite = Suite(settings.terms, open_networks(cfg, weights), samples=settings.aux_samples,
                          latents=settings.aux_latents)  # fmt: skip
        made = PersonalityMethod(cfg, open_table(corpus, cfg), settings, steps, suite)
        made.show(weights)
        return made

    return Recipe(name, build, steps=steps, **TINY)


def personality() -> Recipe:
    """``tiny``: reference, motion and the losses on decoded faces, on top of stage 2."""
    return _make("personality")


def no_reference() -> Recipe:
    """Ablation: nobody is referred to."""
    return _make("personality.no_reference", drop_reference=1.0)


def no_motion() -> Recipe:
    """Ablation: no motion tokens, neither predicted nor given."""
    return _make("personality.no_motion", adds=("anchor", "audio", "reference"))


def no_auxiliary() -> Recipe:
    """Ablation: flow losses alone."""
    return _make("personality.no_auxiliary", terms={})


def same_scene() -> Recipe:
    """Ablation: the reference is another part of the very clip."""
    return _make("personality.same_scene", same_scene=True)


def together() -> Recipe:
    """All conditions at once, from the weights of an earlier run or from none; no decoded faces, one shift for all."""
    buckets = (
        Bucket(1, people=8, windows=4, first=0.8, last=0.25),
        Bucket(3, people=8, windows=2, first=0.15, last=0.35),
        Bucket(8, people=6, windows=1, first=0.05, last=0.4),
    )
    settings = PersonalitySettings(
        buckets=buckets, token_shift=False, time_mean=0.4, mouth_weight=5.0, reference_lengths=(1, 2, 4),
        drop_all=0.0, drop_motion=0.0, shuffle_motion=0.0
    )  # fmt: skip
    return _make("personality.together", 2600, settings)


def overfit() -> Recipe:
    """One clip by heart, with its motion."""
    settings = PersonalitySettings(
        **OVERFIT, next_rate=0.0, drop_audio=0.0, drop_reference=0.0, drop_motion=0.0, shuffle_motion=0.0,
        reference_lengths=(2,),
    )  # fmt: skip
    return make("personality.overfit", PersonalityMethod, settings, 600, ema=0.9, warmup=20)


def tavr_14b() -> Recipe:
    """A reference of 20 to 48 frames, 3.2 s of speech at 480 x 896, one window a rank; flow losses alone."""
    buckets = (Bucket(5, people=1, windows=2, first=0.4, last=0.1), Bucket(21, people=1, first=0.6, last=0.9))
    settings = PersonalitySettings(buckets=buckets, reference_lengths=(5, 8, 12))
    return make_large("personality.tavr_14b", PersonalityMethod, settings, 30_000)
