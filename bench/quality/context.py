"""What the measures share: the engine's encoders, the face embedder, the sync scorer, and facts of all references."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from avatar_rt.engine import AvatarEngine
from avatar_rt.models.motion import MotionEncoder
from bench.quality.clip import Case, Faces
from bench.quality.embedders import Embedder, open_embedder
from bench.quality.faces import find_faces

if TYPE_CHECKING:
    from bench.quality.sync import SyncScorer


@dataclass(frozen=True)
class ReferenceFacts:
    """What was measured of one case's reference, once for all systems.

    Attributes:
        name, identity: The case's.
        faces: Of the reference's frames.
        facts: By measure module, what its ``prepare`` gave.
    """

    name: str
    identity: str
    faces: Faces
    facts: dict[str, dict[str, np.ndarray]]


@dataclass
class Context:
    """Everything is made when it is first asked for; one context per process.

    Attributes:
        bundle: Of the engine whose encoders read the videos; None is the shipped one.
        embedder_path: An ArcFace-class ONNX model; None is dlib's embedder.
        references: Facts of all cases of the set, by name: what retrieval chooses among.
        series: Of the video that is being scored, what earlier modules measured frame by frame, float64 [F] with NaN
            where nothing is known: ``drift`` reads it.
    """

    bundle: Path | None = None
    embedder_path: Path | None = None
    references: dict[str, ReferenceFacts] = field(default_factory=dict)
    series: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def engine(self) -> AvatarEngine:
        return AvatarEngine(self.bundle)

    @cached_property
    def motion(self) -> MotionEncoder:
        return self.engine.motion

    @cached_property
    def embedder(self) -> Embedder:
        return open_embedder(self.embedder_path)

    @cached_property
    def sync(self) -> SyncScorer:
        from bench.quality.sync import SyncScorer

        return SyncScorer()

    def reference(self, case: Case) -> ReferenceFacts:
        """Facts of the case's own reference; its faces are looked for now if nobody did."""
        if case.name not in self.references:
            self.references[case.name] = ReferenceFacts(case.name, case.identity, find_faces(case.reference.frames), {})
        return self.references[case.name]

    def facts(self, case: Case, module: str) -> dict[str, np.ndarray]:
        """What a measure module's ``prepare`` gives of the case's reference."""
        known = self.reference(case)
        if module not in known.facts:
            part: ModuleType = importlib.import_module(f"bench.quality.{module}")
            known.facts[module] = part.prepare(case, known.faces, self)
        return known.facts[module]

    def others(self, case: Case) -> list[ReferenceFacts]:
        """Facts of the references of other people."""
        return [r for r in self.references.values() if r.identity != case.identity]
