"""avatar_rt: a reference video and speech in, a talking video out.

The public names load on first use, so that ``import avatar_rt`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avatar_rt.config import PRESETS, AvatarConfig, preset
from avatar_rt.errors import ArtifactError, AvatarError, InputError, RankError, UnsupportedError

if TYPE_CHECKING:
    from avatar_rt.engine import AvatarEngine
    from avatar_rt.prepared import Reference
    from avatar_rt.session import Session

__version__ = "0.1.0"
__all__ = [
    "AvatarEngine", "Reference", "Session", "AvatarConfig", "PRESETS", "preset",
    "AvatarError", "InputError", "UnsupportedError", "ArtifactError", "RankError", "__version__",
]  # fmt: skip

_LAZY = {"AvatarEngine": "engine", "Reference": "prepared", "Session": "session"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"avatar_rt.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'avatar_rt' has no attribute {name!r}")
