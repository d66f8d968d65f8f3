"""Q-Align (Wu et al., arXiv 2312.17090) for a user who has the model; without it nothing goes by its name.

The folder holds OneAlign as published: ``config.json``, its weights and its own Python files, which transformers runs,
so only a folder that one trusts should be given.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

from avatar_rt.config import FPS
from avatar_rt.errors import ArtifactError, UnsupportedError
from bench.quality.measure import Measure

MEASURES = (Measure("q_align", "Q-Align, quality of the video", "1-5", "higher", "visual"),)

_MODEL_TYPE = "mplug_owl2"  # of OneAlign's config.json
_PICTURES_A_SECOND = 1


class QAlign:
    """OneAlign from a local folder; ``score`` gives 1 (bad) to 5 (excellent).

    Raises: ArtifactError where the folder is not that model; UnsupportedError where transformers is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        check(Path(folder))
        if importlib.util.find_spec("transformers") is None:
            raise UnsupportedError("Q-Align: transformers is not installed; its model card names the version it needs")
        from transformers import AutoModelForCausalLM

        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                str(folder), trust_remote_code=True, local_files_only=True, torch_dtype="auto"
            )
        except (OSError, ValueError, ImportError, RuntimeError) as e:
            raise ArtifactError(f"{folder}: Q-Align does not load ({str(e).splitlines()[0]})") from None

    def score(self, frames: np.ndarray) -> dict[str, float]:
        """MEASURES of uint8 [F, H, W, 3] at 25 fps: one picture a second goes in, as published for videos."""
        import torch
        from PIL import Image

        pictures = [Image.fromarray(f) for f in frames[:: FPS // _PICTURES_A_SECOND]]
        with torch.inference_mode():
            score = self.model.score([pictures], task_="quality", input_="video")
        return {"q_align": float(score[0])}


def check(folder: Path) -> None:
    """Raises ArtifactError, one sentence, unless the folder says that it holds OneAlign."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ArtifactError(f"{folder}: expected the Q-Align model (OneAlign) with its config.json") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != _MODEL_TYPE:
        raise ArtifactError(
            f"{path}: expected model_type {_MODEL_TYPE!r} (OneAlign), got {kind!r}; nothing else is Q-Align"
        )
    code = "".join(p.read_text(encoding="utf-8", errors="replace") for p in sorted(folder.glob("*.py")))
    if "def score(" not in code or "excellent" not in code:
        raise ArtifactError(f"{folder}: expected OneAlign's own Python files with its scoring from bad to excellent")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ArtifactError(f"{folder}: expected the weights of Q-Align beside its config.json, found none")
