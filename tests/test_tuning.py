"""Tuning files: what was saved is read; another machine's or a damaged one is refused or left aside with a word."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from avatar_rt.errors import ArtifactError
from avatar_rt.runtime.tuning import (
    NAME,
    Settings,
    Tuning,
    device_name,
    read_tuning,
    save_tuning,
    tuning_for,
    versions,
)  # fmt: skip
from bench.tune import candidates

CPU = torch.device("cpu")
CHOSEN = Settings(threads=1, linear_rows=96, spins=0, attention_tiles=(64, 64, 4, 2))


def _save(path: Path, **changes) -> Path:
    tuning = Tuning(CHOSEN, device_name(CPU), versions(), "abc")
    save_tuning(path, dataclasses.replace(tuning, **changes))
    return path


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = _save(tmp_path / "t.json")
    assert read_tuning(path).settings == CHOSEN and read_tuning(path).commit == "abc"
    assert tuning_for(path, tmp_path, CPU) == CHOSEN
    assert tuning_for(None, tmp_path, CPU) == Settings()
    _save(tmp_path / NAME)
    assert tuning_for(None, tmp_path, CPU) == CHOSEN


@pytest.mark.parametrize("changes", [{"device": "abacus"}, {"versions": {"torch": "1.0"}}])
def test_another_machines_is_refused_or_left_aside(tmp_path: Path, changes) -> None:
    path = _save(tmp_path / NAME, **changes)
    with pytest.raises(ArtifactError, match=r"it is for .*run python -m bench\.tune"):
        tuning_for(path, tmp_path, CPU)
    with pytest.warns(UserWarning, match="is not used: it is for"):
        assert tuning_for(None, tmp_path, CPU) == Settings()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9}, {"settings": {}}, {"settings": "fast"}, {"device": None, "settings": None},
        {"settings": dataclasses.asdict(CHOSEN) | {"linear_rows": 20}},
        {"settings": dataclasses.asdict(CHOSEN) | {"threads": "two"}},
        {"settings": dataclasses.asdict(CHOSEN) | {"spins": -1}},
        {"settings": dataclasses.asdict(CHOSEN) | {"attention_tiles": [1]}},
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_or_left_aside(tmp_path: Path, change) -> None:
    path = _save(tmp_path / NAME)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match="expected"):
        tuning_for(path, tmp_path, CPU)
    with pytest.warns(UserWarning, match="is not used"):
        assert tuning_for(None, tmp_path, CPU) == Settings()


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a tuning file"):
        tuning_for(tmp_path / "none.json", tmp_path, CPU)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ArtifactError, match="expected a tuning file"):
        tuning_for(tmp_path / "t.json", tmp_path, CPU)


def test_every_searched_setting_exists_and_begins_with_its_default() -> None:
    names = {f.name: f.default for f in dataclasses.fields(Settings)}
    for device in (CPU, torch.device("cuda")):
        for name, values in candidates(device, 2):
            assert name in names and (names[name] in values or name == "threads")
            assert len(values) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_for(None, Path("nowhere"), CPU) == Settings()
