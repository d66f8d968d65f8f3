"""Runs of any length: killed and gone on with they give the same bits, and their memory does not grow."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from media_files import write_wav
from small_bundle import write_bundle

from avatar_rt import AvatarEngine, InputError
from avatar_rt.__main__ import SAMPLES, main
from avatar_rt.errors import ArtifactError
from avatar_rt.job import discard, kept_frames, part_of, resume_of
from avatar_rt.media.reader import read_video


def _speech(path: Path, seconds: float, rate: int = 16_000) -> Path:
    rng = np.random.default_rng(0)
    level = np.repeat(rng.uniform(0, 0.2, int(seconds * 5) + 1), rate // 5)[: int(seconds * rate)]
    return write_wav(path, (rng.standard_normal(len(level)) * level).clip(-1, 1)[:, None], rate)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small bundle, a prepared person and 24 s of speech, and the video of them made in one go."""
    folder = tmp_path_factory.mktemp("job")
    engine = AvatarEngine(write_bundle(folder / "bundle"))
    engine.prepare(SAMPLES / "reference.mp4").save(folder / "p.avref")
    _speech(folder / "s.wav", 24.3, 22_050)
    engine.generate(folder / "p.avref", folder / "s.wav", folder / "whole.mp4")
    return folder


def _args(made: Path, out: Path, *more: str) -> list[str]:
    given = [str(made / "p.avref"), str(made / "s.wav"), "-o", str(out), "--bundle", str(made / "bundle")]
    return ["generate", *given, *more]


def _start(args: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "avatar_rt", *args], env=environment, stderr=subprocess.PIPE)


def _kill_after(process: subprocess.Popen, output: Path, frames: int, wait: float) -> bool:
    """Kills a run that has made so many frames, a moment later. Returns False where it was done before."""
    deadline = time.monotonic() + 120
    while kept_frames(output) < frames and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    told = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), told
    return not output.exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "o.mp4", random.Random()  # any moment, another one each time
    for least, more in ((1, ()), (200, ("--resume",))):
        for _ in range(5):
            killed = _kill_after(_start(_args(made, out, *more)), out, least, chance.uniform(0, 0.05))
            if killed and kept_frames(out) < 608:
                break
            discard(out)  # all frames were made before the signal came: again, from the start
            out.unlink(missing_ok=True)
        else:
            pytest.fail("expected a run that can be killed before it is done, five were too fast")
        kept = kept_frames(out)
        assert least <= kept < 608
        assert len(read_video(part_of(out)).frames) >= kept  # what is there can be played
    assert main(_args(made, out, "--resume")) == 0
    assert out.read_bytes() == (made / "whole.mp4").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mp4"]
    video = read_video(out)
    assert len(video.frames) == 608 and video.audio is not None


def test_interrupted_says_how_to_go_on(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from avatar_rt.media.growing import GrowingVideo

    out, real = tmp_path / "o.mp4", GrowingVideo.write

    def stop(self, frames):
        if self.mark.fragments == 3:
            raise KeyboardInterrupt
        real(self, frames)

    monkeypatch.setattr(GrowingVideo, "write", stop)
    assert main(_args(made, out)) == 130
    assert "77 frames are kept" in (told := capsys.readouterr().err) and "--resume" in told
    monkeypatch.undo()
    assert main(_args(made, out)) == 2 and "unfinished run" in capsys.readouterr().err
    for more in (("--seed", "1"), ("--seconds", "3"), ("--steps", "1")):
        assert main(_args(made, out, "--resume", *more)) == 2
        assert f"other {more[0][2:]}" in capsys.readouterr().err
    engine = AvatarEngine(write_bundle(tmp_path / "other", seed=1))
    with pytest.raises(ArtifactError, match="other reference, weights"):
        engine.generate(SAMPLES / "reference.mp4", made / "s.wav", out, resume=True, seed=0)
    assert kept_frames(out) == 77
    assert main(_args(made, out, "--resume")) == 0
    assert out.read_bytes() == (made / "whole.mp4").read_bytes()


def test_a_damaged_record_is_refused(made: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "o.mp4"
    resume_of(out).write_bytes(b"half")
    assert main(_args(made, out, "--resume")) == 2 and "cut short" in capsys.readouterr().err
    assert kept_frames(out) == 0


def test_a_wrong_input_leaves_nothing(made: Path, tmp_path: Path, monkeypatch) -> None:
    from avatar_rt.media import stream

    real = stream.SpeechFile.pieces

    def broken(self):
        yield next(real(self))
        yield next(real(self))
        raise InputError("the file is damaged")

    monkeypatch.setattr(stream.SpeechFile, "pieces", broken)
    assert main(_args(made, tmp_path / "o.mp4")) == 2
    assert list(tmp_path.iterdir()) == []


def test_fragmented(made: Path, tmp_path: Path, capsys) -> None:
    assert main(_args(made, tmp_path / "o.mp4", "--fragmented", "--seconds", "2")) == 0
    assert b"moof" in (tmp_path / "o.mp4").read_bytes() and len(read_video(tmp_path / "o.mp4").frames) == 50
    assert main(_args(made, tmp_path / "o.mkv", "--fragmented", "--seconds", "2")) == 2
    assert "expected an output ending in .mp4, .mov" in capsys.readouterr().err


_PEAK = """
import json, resource, sys
from avatar_rt.__main__ import main
assert main(sys.argv[1:]) == 0
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


def peak_kb(args: list[str]) -> int:
    """Peak resident memory of a run of its own, in KiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _PEAK, *args], env=environment, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_video(made: Path, tmp_path: Path) -> None:
    """Three minutes within 5 % of fifteen seconds."""
    speech = _speech(tmp_path / "s.wav", 180)
    args = _args(made, tmp_path / "o.mp4", "--steps", "1", "--audio-scale", "1")
    args[2] = str(speech)
    short, long = peak_kb([*args, "--seconds", "15"]), peak_kb(args)
    assert long < 1.05 * short, f"{long} KiB against {short}"
