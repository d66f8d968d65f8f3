"""``bench.stream``, its baseline and ``bench.stages``: the twin is the model, a wrong run posts no number."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_denoise_guided import SMALL, Case, _models

from avatar_rt.pipeline.reference import ReferenceContext
from bench import stages, stream
from bench.baseline import PlainDiT
from bench.stream import Marks, Request
from bench.stream_page import stages_table, stream_table


@pytest.mark.parametrize("prompt", [False, True])
@torch.no_grad()
def test_the_twin_is_the_model(prompt: bool) -> None:
    """In fp32: with the reference recomputed, with its keys and values, and without one."""
    _, exact = _models()
    case, twin = Case(SMALL, prompt=prompt), PlainDiT(exact)
    cache = case.cache(exact, False)
    context = ReferenceContext(case.ref, None, case.ref_motion, case.given.empty_text)
    seen = ({}, {}), ({"ref": context}, {"ref_k": cache.k, "ref_v": cache.v})
    granted = ({"kv": (cache.k, cache.v)}, {"ref_k": cache.k, "ref_v": cache.v})
    for audio in (None, case.given.audio):
        for plain, ours in (*seen, granted):
            got = twin(case.latents, case.t, case.given.text, audio, case.anchor, case.motion, **plain)
            want = exact(
                case.latents, case.t, case.given.text, audio, anchor=case.anchor, anchor_t=torch.zeros(1),
                motion=case.motion, **ours,
            )  # fmt: skip
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[int, list[str], dict]:
    path, lines = tmp_path_factory.mktemp("bench") / "quick.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
        code = stream.main(["--quick", "--json", str(path)])
    return code, lines, json.loads(path.read_text())


def test_quick_run_ends_in_one_document(quick) -> None:
    code, lines, document = quick
    assert code == 0 and json.loads(lines[-1]) == document
    assert document["bench"] == "stream" and set(document["systems"]) == {"ours", "eager"}
    assert {"name", "torch", "commit", "python", "cores", "load", "isa"} <= set(document["machine"])
    for row in document["systems"].values():
        assert row["frames"] == 30 and row["rms"] <= document["error_limit"]
        assert 0 < row["first_s"] <= row["wall_s"] and row["fps"] == pytest.approx(30 / row["wall_s"])
    assert document["ratios"]["eager"]["cpu_s"] > 0 and not document["refused"]


def test_a_wrong_engine_posts_no_number(monkeypatch, capsys) -> None:
    def broken(self, engine, reference, likeness):
        while True:
            yield np.zeros((29, 256, 256, 3), np.uint8)

    monkeypatch.setattr(Request, "session_frames", broken)
    assert stream.main(["--quick"]) == 1
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document["refused"] == ["ours"] and "ours" not in document["systems"] and not document["ratios"]
    assert "no figure: rms error" in printed


def test_marks_are_arithmetic() -> None:
    marks = Marks()
    marks.at = [(10.0, 1.0, 0), (12.0, 2.0, 29), (13.0, 2.5, 53), (15.0, 3.5, 77)]
    row = marks.row()
    assert (row["first_s"], row["first_cpu_s"], row["frames"]) == (2.0, 1.0, 77)
    assert (row["chunk_p50_s"], row["wall_s"], row["cpu_s"]) == (1.5, 5.0, 2.5)
    assert row["steady_fps"] == pytest.approx(48 / 3) and row["fps"] == pytest.approx(77 / 5)
    assert row["real_time_factor"] == pytest.approx(5 / (77 / 25))


def test_only_whole_runs_are_stored() -> None:
    for extra in (["--quick"], ["--no-compile"], ["--steps", "2"]):
        with pytest.raises(SystemExit):
            stream.main(["--store", *extra])


def test_stages_count_every_stage(capsys) -> None:
    assert stages.main(["--seconds", "1.2", "--steps", "1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = document["stages"]
    assert {"reference", "speech", "denoise", "denoise.step", "decode", "write"} <= set(found)
    assert found["decode"]["calls"] == found["denoise"]["calls"] == 2
    assert document["chunk_cpu_ms"] >= found["denoise"]["cpu_ms"] and document["frames"] == 30
    assert 0 < document["peak_mib"]["loaded"] <= document["peak_mib"]["generated"]


def test_clocks_add_up() -> None:
    clocks = stages.Clocks()
    clocks.calls = {"a": [(9.0, 9.0), (1.0, 0.5), (3.0, 1.5), (2.0, 1.0)], "b": [(4.0, 2.0)]}
    rows = clocks.rows()
    assert rows["a"] == {"calls": 4, "wall_ms": 2000.0, "cpu_ms": 1000.0} and rows["b"]["wall_ms"] == 4000.0


def test_stored_runs_become_tables() -> None:
    machine = {"cpu": "a CPU", "torch": "2.13.0", "commit": "abc"}
    told = {"threads": 1, "config": "tiny", "size": [64, 64], "seconds": 6.0, "weights": "0123"}
    ours = {"fps": 40.0, "cpu_s": 2.0, "first_s": 0.5, "chunk_p50_s": 0.4, "chunk_p95_s": 0.6, "rms": 0.4}
    systems = {"ours": ours, "eager": {**ours, "fps": 8.0, "cpu_s": 12.0}}
    text = stream_table({"machine": machine, "result": {**told, "systems": systems}})
    assert "| avatar_rt | 40.0 | 1.00 | 0.50 | 0.40, 0.60 | 0.40 |" in text
    assert "| 8.0 | 6.00 |" in text[-1] and "commit abc" in text[1]
    stages = {"decode": {"calls": 4, "cpu_ms": 30.0}, "denoise.pass": {"calls": 240, "cpu_ms": 5.0}}
    result = {**told, "stages": stages, "peak_mib": {"loaded": 400.0, "generated": 450.4}}
    text = stages_table({"machine": machine, "result": result})
    assert text[5:7] == ["| denoise.pass | 240 | 5.00 |", "| decode | 4 | 30.00 |"]
    assert text[-1].endswith("450 MiB at the peak.")
