"""The sheets that validation draws: made windows follow the velocity, see what they are told, lie beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from small_stages import CFG, build, networks

from avatar_rt.errors import ArtifactError
from avatar_rt.models.weights import save_weights
from training.methods.a2v import A2VMethod, A2VSettings
from training.methods.flow import Bucket
from training.methods.personality import PersonalityMethod, PersonalitySettings
from training.methods.sheet import FRAMES, sample
from training.methods.t2v import T2VMethod, T2VSettings

STAGES = {"t2v": (T2VMethod, T2VSettings), "a2v": (A2VMethod, A2VSettings),
          "personality": (PersonalityMethod, PersonalitySettings)}  # fmt: skip
BUCKETS = (Bucket(3, people=2),)


def _built(name: str, **settings: Any) -> Any:
    method, kind = STAGES[name]
    return build(method, kind(buckets=BUCKETS, **settings))


class Oracle(torch.nn.Module):
    """A transformer that knows the way to one answer, and keeps what it was told."""

    def __init__(self, x: torch.Tensor, motion: torch.Tensor, inner: Any) -> None:
        super().__init__()
        self.x, self.motion, self.told, self.encode_reference = x, motion, [], inner.encode_reference
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.null_audio = getattr(inner, "null_audio", None)

    def forward(self, rows: torch.Tensor, t: torch.Tensor, text: torch.Tensor, **told: Any) -> tuple[Any, Any]:
        self.told.append({**told, "t": t})
        v = (rows[:, : self.x.shape[1]] - self.x) / t[:, None, :, None, None]
        return v, (told["motion"] - self.motion) / t[:, :, None] if "motion" in told else None


@pytest.mark.parametrize("name", STAGES)
def test_samples_follow_the_velocity_to_its_end(name: str) -> None:
    method = _built(name)
    b = method.draw(method.pool("val"), torch.Generator().manual_seed(0), BUCKETS[0], "first")
    oracle = Oracle(b.x, b.motion, method.module["dit"])
    method.module["dit"] = oracle
    assert torch.allclose(sample(method, b, torch.Generator().manual_seed(1)), b.x, atol=1e-5)
    times = [float(told["t"][0, 0]) for told in oracle.told]
    assert len(times) == CFG.sampling.steps and times[0] == 1 and times == sorted(times, reverse=True)
    wanted = {"t2v": set(), "a2v": {"audio", "anchor"}, "personality": {"audio", "anchor", "motion", "ref_k", "ref_v"}}
    assert wanted[name] <= {k for k, v in oracle.told[0].items() if v is not None}
    if name == "personality":  # its own motion, not the truth's
        assert not torch.equal(oracle.told[0]["motion"], oracle.told[-1]["motion"])
        assert not torch.allclose(oracle.told[0]["motion"], b.motion, atol=0.1)


def test_what_is_never_there_is_not_there_in_samples() -> None:
    method = _built("a2v", drop_audio=1.0)
    b = method.draw(method.pool("val"), torch.Generator().manual_seed(0), BUCKETS[0], "first")
    oracle = Oracle(b.x, b.motion, method.module["dit"])
    method.module["dit"] = oracle
    sample(method, b, torch.Generator())
    assert torch.equal(oracle.told[0]["audio"], oracle.null_audio.expand_as(b.audio))


@pytest.mark.parametrize("name", STAGES)
def test_validation_draws_a_sheet(name: str, tmp_path: Path) -> None:
    method = _built(name)
    measured = method.validate(7, tmp_path)
    assert {"flow", "seen", *method.wrong()} <= measured.keys() and not list(
        tmp_path.iterdir()
    )  # nothing to decode with
    assert measured["seen"] != measured["flow"]  # other people
    save_weights(networks().vae, tmp_path / "vae.safetensors", dtype=torch.float32)
    method.show(tmp_path)
    first = method.validate(7, tmp_path)
    picture = cv2.imread(str(tmp_path / "video-000007.png"))
    rows, columns = 4, 2 * FRAMES + (name == "personality")
    assert picture.shape == (2 * rows * CFG.height, 2 * columns * CFG.width, 3)
    truth = picture[:, 2 * CFG.width * (name == "personality") :][:, : 2 * FRAMES * CFG.width]
    made = picture[:, -2 * FRAMES * CFG.width :]
    assert truth.std() > 1 and made.std() > 1 and not np.array_equal(truth, made)
    assert method.validate(7, tmp_path) == first  # and again the same
    assert np.array_equal(cv2.imread(str(tmp_path / "video-000007.png")), picture)
    assert not any(key.startswith("vae") for key in method.module.state_dict())


def test_a_missing_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"vae\.safetensors"):
        _built("t2v").show(tmp_path)
