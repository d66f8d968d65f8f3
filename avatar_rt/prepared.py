"""A prepared person, and the ``.avref`` file that keeps one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_rt.errors import ArtifactError, InputError
from avatar_rt.pipeline.denoise import Scene
from avatar_rt.pipeline.reference import ReferenceCache, ReferenceContext
from avatar_rt.runtime.artifact import content_hash, from_storage, read_artifact, to_storage, write_artifact

SUFFIX = ".avref"
KIND, FORMAT = "avref", 1
REMEDY = "prepare it again: avatar-rt prepare REF.mp4 -o"
_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Reference:
    """A prepared person: context (level 1), K/V of every block (level 2), and the clip's own scene.

    Attributes:
        frames: uint8 [F, height, width, 3] the face-centred crops that were encoded.
        fine: uint8 [F, k height, k width, 3] the same in the size that videos have, or None: for the eye.
        weights_hash: The weights that the cache belongs to.
        config_hash: The model that the context belongs to; "" when nobody asked.
        consent: Identifier of the consent record, or None.
        clip: About the clip it was made from: ``name``, ``sha256``, ``frames``, ``seconds``, ``sound``.
        storage: What the K/V were kept as: the dtype they were computed in (exact), or what they went through.
        errors: Relative RMS error of K and of V that this cost.
    """

    context: ReferenceContext
    cache: ReferenceCache
    scene: Scene
    frames: np.ndarray
    weights_hash: str
    config_hash: str = ""
    consent: str | None = None
    clip: Mapping[str, Any] = field(default_factory=dict)
    storage: str = ""
    errors: tuple[float, float] = (0.0, 0.0)
    fine: np.ndarray | None = None

    @property
    def exact(self) -> bool:
        """Whether the K/V are the very bits that were computed."""
        return not any(self.errors)

    @property
    def content(self) -> str:
        """Hash of level 1, of which level 2 is a function, and of how level 2 was kept."""
        return content_hash({"storage": "" if self.exact else self.storage}, self._context())

    def _context(self) -> dict[str, Tensor]:
        """Level 1 by name: every tensor of the context, the scene and the crops."""
        found = {f"context.{f.name}": getattr(self.context, f.name) for f in dataclasses.fields(self.context)}
        found |= {f"scene.{f.name}": getattr(self.scene, f.name) for f in dataclasses.fields(self.scene)}
        crops = {"frames": self.frames, "fine": self.fine}
        found |= {k: None if v is None else torch.from_numpy(v) for k, v in crops.items()}
        return {k: v for k, v in found.items() if v is not None}

    def save(
        self, path: str | os.PathLike[str], *, storage: str | None = None, consent: str | None = None
    ) -> tuple[float, float]:
        """Writes the person to a file that ``AvatarEngine.prepare`` takes instead of the clip.

        Level 1 is kept to the bit, so level 2 can always be computed again. The packed form is made anew on loading.

        Args:
            path: Ends in .avref.
            storage: Of level 2: None keeps its dtype and its bits; ``fp32``, ``bf16``, and with loss ``int8``, ``fp8``.
            consent: Identifier of a consent record; None keeps the reference's own.

        Returns: relative RMS error of K and of V, zero where nothing was lost.
        Raises: InputError on another storage or a file that cannot be written.
        """
        storage = storage or _WORDS[self.cache.k.dtype]
        tensors, errors = self._context(), {}
        for name, x in (("k", self.cache.k), ("v", self.cache.v)):
            stored, errors[name] = to_storage(x, storage)
            for suffix, part in stored.items():  # a tensor per block, so that a block can be read alone
                tensors |= {f"{name}.{i:03d}{suffix}": block for i, block in enumerate(part)}
        header = {
            "weights": self.weights_hash, "config": self.config_hash, "consent": consent or self.consent,
            "clip": dict(self.clip), "computed": _WORDS[self.cache.k.dtype], "storage": storage, "errors": errors,
        }  # fmt: skip
        write_artifact(check_avref(path), KIND, FORMAT, header, tensors)
        return errors["k"], errors["v"]

    @staticmethod
    def load(path: str | os.PathLike[str], *, weights_hash: str, config_hash: str) -> Reference:
        """Reads a person from a file, on the CPU.

        Raises: InputError when there is no such file; ArtifactError on one for another model, of another version, cut
            short or altered.
        """
        file = Path(path)
        facts, tensors = read_artifact(file, KIND, FORMAT, f"{REMEDY} {file}")
        for what, ours in (("config", config_hash), ("weights", weights_hash)):
            if facts[what] != ours:
                raise ArtifactError(
                    f"{file}: it was prepared with {'a model' if what == 'config' else 'weights'} {facts[what][:12]}, "
                    f"and this bundle has {ours[:12]}; {REMEDY} {file}"
                )
        dtype = {word: d for d, word in _WORDS.items()}[facts["computed"]]
        cache = ReferenceCache(_blocks(tensors, "k", dtype), _blocks(tensors, "v", dtype))
        parts: dict[type, dict[str, Any]] = {
            kind: {f.name: tensors.get(f"{prefix}.{f.name}") for f in dataclasses.fields(kind)}
            for kind, prefix in ((ReferenceContext, "context"), (Scene, "scene"))
        }
        return Reference(
            ReferenceContext(**parts[ReferenceContext]), cache, Scene(**parts[Scene]), tensors["frames"].numpy(),
            facts["weights"], facts["config"], facts["consent"], facts["clip"], facts["storage"],
            (facts["errors"]["k"], facts["errors"]["v"]), tensors["fine"].numpy() if "fine" in tensors else None,
        )  # fmt: skip

    def to(self, device: torch.device) -> Reference:
        """The same person with every tensor on a device."""

        def moved(part: Any) -> Any:
            found = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
            return dataclasses.replace(part, **{k: v.to(device) for k, v in found.items() if isinstance(v, Tensor)})

        return dataclasses.replace(self, context=moved(self.context), cache=moved(self.cache), scene=moved(self.scene))


def check_avref(path: str | os.PathLike[str]) -> Path:
    """Raises InputError unless a file of this name can be meant."""
    file = Path(path)
    if file.suffix.lower() != SUFFIX:
        raise InputError(
            f"{file}: expected a prepared reference ending in {SUFFIX}, got {file.suffix or 'no extension'!r}"
        )
    if not file.parent.is_dir():
        raise InputError(f"{file}: expected an output in an existing folder, but there is no folder {file.parent}")
    return file


def _blocks(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    count = sum(key.startswith(f"{name}.") and not key.endswith(".scale") for key in tensors)
    rows = []
    for i in range(count):
        key = f"{name}.{i:03d}"
        stored = {suffix: tensors[key + suffix] for suffix in ("", ".scale") if key + suffix in tensors}
        rows.append(from_storage(stored, dtype))
    return torch.stack(rows)
