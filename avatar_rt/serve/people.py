"""Prepared references by the hash of the video they came from."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

from avatar_rt.engine import AvatarEngine
from avatar_rt.session import Reference


class People:
    """Keeps the ``size`` references asked for last, in memory only: nothing of a person outlives the server."""

    def __init__(self, engine: AvatarEngine, size: int) -> None:
        self.engine, self.size = engine, size
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[str, Reference] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: str) -> Reference | None:
        """A reference by the id that ``add`` gave; None when it is not, or no longer, here."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def add(self, video: Path) -> tuple[str, Reference]:
        """Prepares a video, or finds it prepared. Raises InputError as ``AvatarEngine.prepare`` does."""
        with video.open("rb") as file:
            name = "ref_" + hashlib.file_digest(file, "sha256").hexdigest()[:32]
        with self._preparing:  # one at a time: the same video sent twice is prepared once
            reference = self.get(name)
            if reference is None:
                with self.engine.turns.take():
                    reference = self.engine.prepare(video)
                with self._lock:
                    self._kept[name] = reference
                    while len(self._kept) > self.size:
                        self._kept.popitem(last=False)
        return name, reference

    def forget(self, name: str) -> bool:
        """Whether there was such a reference."""
        with self._lock:
            return self._kept.pop(name, None) is not None
