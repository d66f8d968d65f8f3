"""The command line: what it writes, and how it refuses: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from avatar_rt.__main__ import SAMPLES, main

REFERENCE, SPEECH = str(SAMPLES / "reference.mp4"), str(SAMPLES / "speech.wav")


def test_generate_writes_video_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "out.mp4", tmp_path / "sheet.png"
    given = ["generate", REFERENCE, SPEECH, "-o", str(out), "--seconds", "1", "--steps", "2", "--sheet", str(sheet)]
    assert main(given) == 0
    assert out.stat().st_size > 1000 and sheet.stat().st_size > 1000
    told = capsys.readouterr()
    assert "25/25 frames" in told.err and "fps" in told.err and str(out) in told.out
    again = tmp_path / "again.mp4"
    assert main([*given[:4], str(again), *given[5:9]]) == 0
    assert out.read_bytes() == again.read_bytes()


def _wav(path: Path, samples: np.ndarray) -> str:
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(16_000)
        f.writeframes((samples * 32767).astype(np.int16).tobytes())
    return str(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reference": "nowhere.mp4"}, "nowhere.mp4"),
        ({"reference": SPEECH}, "speech.wav"),
        ({"speech": "nowhere.wav"}, "nowhere.wav"),
        ({"output": "nowhere/out.mp4"}, "nowhere"),
        ({"output": "out.txt"}, "out.txt"),
        ({"more": ["--scene", "nowhere.png"]}, "nowhere.png"),
        ({"more": ["--sheet", "sheet.doc"]}, "sheet.doc"),
        ({"more": ["--sheet", "nowhere/sheet.png"]}, "nowhere"),
        ({"more": ["--device", "abacus"]}, "abacus"),
        ({"more": ["--bundle", "nowhere"]}, "nowhere"),
    ],
)
def test_refuses_with_one_sentence(
    change: dict, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [change.get("reference", REFERENCE), change.get("speech", SPEECH), "-o", change.get("output", "out.mp4")]
    assert main(["generate", *given, "--steps", "1", "--seconds", "1", *change.get("more", [])]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ") and sentence in told and "\n" not in told
    assert list(tmp_path.iterdir()) == []


def test_demo_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_too_short_speech(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = _wav(tmp_path / "empty.wav", np.zeros(0, np.float32))
    assert main(["generate", REFERENCE, empty, "-o", str(tmp_path / "out.mp4")]) == 2
    assert "empty.wav" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("given", [["generate"], ["generate", REFERENCE, SPEECH], ["dance"],
                                   ["generate", REFERENCE, SPEECH, "-o", "o.mp4", "--steps", "0"],
                                   ["generate", REFERENCE, SPEECH, "-o", "o.mp4", "--seconds", "-1"]])  # fmt: skip
def test_wrong_use_exits_with_two(given: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
