"""``python -m bench.ops``: its document, its refusal of wrong kernels, its arithmetic."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from avatar_rt.config import PRESETS, preset
from avatar_rt.errors import UnsupportedError
from bench import contenders, harness, memory, ops, report
from bench.contenders import OURS, SDPA, Shape
from bench.harness import Clock, Contender, Judge


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its exit code, its lines, its document."""
    path, lines = tmp_path_factory.mktemp("bench") / "quick.json", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
        code = ops.main(["--quick", "--device", "cpu", "--json", str(path)])
    return code, lines, json.loads(path.read_text())


def test_quick_run_ends_in_one_document(quick):
    code, lines, document = quick
    assert code == 0
    assert json.loads(lines[-1]) == document
    assert document["bench"] == "ops"
    assert {"name", "torch", "commit", "python", "cores", "load", "isa"} <= set(document["machine"])
    assert {"matmul_fp32", "matmul_bf16", "copy"} <= set(document["ceilings"])
    assert all(rate > 0 for rate in document["ceilings"].values())


def test_ceilings_come_first(quick):
    _, lines, _ = quick
    first_table = next(i for i, line in enumerate(lines) if " | " in line)
    assert max(i for i, line in enumerate(lines) if "GFLOP/s" in line and "matmul" in line) < first_table


def test_every_figure_is_a_median_of_seven_of_a_checked_result(quick):
    rows = quick[2]["rows"]
    tables = {"target over all, forward", "target over all, backward", "cached step"}
    assert tables | {"local temporal attention", "norm, rope, modulate"} == {r["table"] for r in rows}
    for row in rows:
        assert row["error"] <= row["limit"], row
        assert row["repeats"] >= 7, row
        assert 0 < row["median_ms"] <= row["p90_ms"] * 1.0001, row
        assert row["gflops"] > 0
        assert row["gb_per_s"] > 0
        assert row["times_baseline"] > 0
    for case in {(r["table"], r["case"], r["dtype"]) for r in rows}:
        mine = [r for r in rows if (r["table"], r["case"], r["dtype"]) == case]
        assert [r["times_baseline"] for r in mine if r["kind"] == "baseline"] == [1.0]
        assert any(r["kind"] == "ours" for r in mine)


def test_growth_and_memory_are_in_the_document(quick):
    document = quick[2]
    for data in document["growth"].values():
        assert [p["R"] for p in data["points"]] == [128, 256, 512, 1024]
        assert data["fit"]["slope"] > 0
        assert {"ours", "sdpa", "dense"} <= set(data["points"][0])
    if memory.CLEAR.exists():
        assert any(isinstance(r.get("extra_bytes"), int) for r in document["rows"])


def test_a_wrong_kernel_posts_no_number(monkeypatch, capsys):
    honest = contenders.ours

    def wrong(x):
        out = honest(x).call()
        out[:, -1, -1, -1] += 0.05  # one element of one row
        return Contender(OURS, lambda: out, kind="ours")

    monkeypatch.setattr(contenders, "ours", wrong)
    code = ops.main(["--quick", "--device", "cpu", "--dtype", "fp32", "--filter", "forward fixed"])
    out, err = capsys.readouterr()
    row = next(r for r in json.loads(out.splitlines()[-1])["rows"] if r["name"] == OURS)
    assert code == 1
    assert "is above" in row["refused"]
    assert "median_ms" not in row
    assert "no figure: error" in out
    assert "error: target over all, forward, fixed d=64, fp32" in err


def judge() -> Judge:
    truth = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4)
    return Judge([truth], [truth.float()])


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (torch.full((3, 4), float("nan")), "not finite"),
        (torch.zeros(3, 4), "is above"),
        (torch.zeros(4, 3), "expected [3, 4]"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "torch.bfloat16"),
        ((torch.zeros(3, 4), torch.zeros(3, 4)), "expected 1 results, got 2"),
    ],
)
def test_judge_refuses(result, word):
    assert word in judge()(result)["refused"]


def test_judge_lets_the_truth_pass():
    assert "refused" not in judge()(torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4).float())


def test_a_contender_that_cannot_run_says_so():
    def broken():
        raise UnsupportedError("no implementation can run this call")

    given = [Contender("broken", broken), Contender("fine", lambda: judge().truth[0].float(), kind="baseline")]
    rows = harness.contest(given, judge(), Clock("cpu", 1), flops=1, moved=1, peak=None)
    assert rows[0]["refused"] == "does not run: no implementation can run this call"
    assert rows[1]["repeats"] == 7


def test_a_contender_that_runs_once_is_timed_by_its_check():
    calls = []

    def slow():
        calls.append(1)
        return judge().truth[0].float()

    given = [Contender("slow", slow, limit=1), Contender("fine", lambda: judge().truth[0].float(), kind="baseline")]
    rows = harness.contest(given, judge(), Clock("cpu", 1), flops=1, moved=1, peak=None)
    assert len(calls) == rows[0]["repeats"] == 1


def test_rounds_take_turns():
    order = []
    given = [Contender(name, lambda name=name: order.append(name)) for name in "abc"]

    class Once(Clock):
        def __call__(self, call, inner=1):
            call()
            return 1.0

    times = harness.interleave(given, Once("cpu", 1), repeats=4)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert all(len(t) == 4 for t in times.values())


def test_linear_fit():
    fit = harness.linear_fit([1, 2, 3, 4], [5, 7, 9, 11])
    assert fit["slope"] == pytest.approx(2)
    assert fit["intercept"] == pytest.approx(3)
    assert fit["r2"] == pytest.approx(1)
    assert harness.linear_fit([0, 1, 2, 3], [0, 1, 0, 1])["r2"] == pytest.approx(0.2)
    squares = harness.linear_fit([1, 2, 4, 8, 16], [1, 4, 16, 64, 256])
    assert squares["r2"] < 0.97


def test_preset_shapes_are_those_of_the_transformer():
    tiny = contenders.preset_shape(preset("tiny"), 1)
    assert (tiny.rows, tiny.reference, tiny.heads, tiny.head_dim) == (8 * 65 + 64, 7 * 65, 4, 64)
    tavr = contenders.preset_shape(preset("tavr_14b"), 120)
    assert (tavr.rows, tavr.reference, tavr.heads, tavr.head_dim) == (22 * 1680, 750 * 1680, 40, 128)
    for shape in contenders.preset_shapes((1, 120), 1e11):
        assert shape.flops <= 1e11 or shape.rows < 2 * contenders.FEWEST_ROWS
        assert (
            shape.reference
            == contenders.preset_shape(PRESETS[shape.name.split()[0]], float(shape.name.split()[1])).reference
        )
        assert shape.words().endswith(")") == bool(shape.part)


def test_all_forward_contenders_agree():
    x = contenders.make_inputs(Shape("odd", 40, 72, 3, 32), torch.float32, "cpu")
    judge = contenders.reference_judge(x)
    for c in [*contenders.forward(x), *contenders.cached_step(x, 8, 1)]:
        verdict = (contenders.int8_judge(judge, x) if c.coarse else judge)(c.call())
        assert "refused" not in verdict, (c.name, verdict)


def test_backward_contenders_agree():
    x = contenders.make_inputs(Shape("odd", 40, 72, 3, 32), torch.float32, "cpu")
    found = contenders.backward(x)
    judge = contenders.backward_judge(x, found[-1].call())
    assert [c.name for c in found] == [OURS, SDPA]
    for c in found:
        assert "refused" not in judge(c.call()), c.name


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="no /proc/self/clear_refs: this system does not tell its peak")
def test_extra_memory_is_what_a_call_takes_and_gives_back():
    def call():
        return torch.ones(64 << 20, dtype=torch.uint8)[:1].clone()

    assert 60 < memory.extra_bytes(call) / 2**20 < 72
    assert memory.extra_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8)) / 2**20 < 8  # a result is not extra


def test_store_wants_a_whole_run(capsys):
    with pytest.raises(SystemExit):
        ops.main(["--quick", "--store"])
    assert "--store needs a whole run" in capsys.readouterr().err


def test_report_and_plot_of_a_document(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(ops, "RESULTS", tmp_path)
    path = ops.save(quick[2])
    assert path.parent == tmp_path
    assert report.ops_results() == [path]
    text = report.section()
    assert "R² = " in text
    assert "| cached step | B1 H2 G=128 R=2048 d=64 | bf16 | dense over everything |" in text
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra: pip install -e '.[bench]'")
    from bench import plot

    picture = plot.draw(path, tmp_path / "ops-growth.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "](ops-growth.png)" in report.section()


def test_a_quiet_reading_of_two_threads_goes_into_the_stored_run(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "RESULTS", tmp_path)
    later = quick[2] | {"filter": "threads", "rows": [], "growth": {}}
    later["machine"] = quick[2]["machine"] | {"commit": "abc1234"}
    later["two_threads"] = {"bf16": {"one_ms": 2.0, "two_ms": 1.0, "speedup": 2.0, "load": 0.1}}
    with pytest.raises(UnsupportedError, match="expected a whole run"):
        ops.save(later)
    ops.save(quick[2])
    stored = json.loads(ops.save(later).read_text())["result"]
    assert stored["two_threads"]["bf16"] == later["two_threads"]["bf16"] | {"commit": "abc1234"}
    assert stored["rows"] == quick[2]["rows"] and stored["rows"]


def test_report_shows_each_preset_once():
    keys = [("t", case, "w", "bf16") for case in ("fixed d=64", "tiny 1 s", "tiny 120 s", "wan_1_3b 10 s", "R=512")]
    assert [k[1] for k in report._longest(keys)] == ["fixed d=64", "tiny 120 s", "wan_1_3b 10 s", "R=512"]


def test_plot_without_matplotlib_is_one_sentence(quick, tmp_path, monkeypatch):
    from bench import plot

    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"machine": quick[2]["machine"], "result": quick[2]}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError) as caught:
        plot.draw(path, Path(tmp_path / "x.png"))
    assert str(caught.value) == "plot: matplotlib is not installed: pip install -e '.[bench]'"


@pytest.mark.parametrize("threads", [1, 2])
def test_fma_peak_is_used_where_the_core_has_it(monkeypatch, threads):
    class Native:
        @staticmethod
        def fma_peak(dtype, seconds):
            return {"float32": 240.0, "bfloat16": 450.0}[dtype]

    monkeypatch.setattr(harness._load, "native", lambda: (Native, ""))
    found = harness.ceilings("cpu", Clock("cpu", threads), quick=True)
    assert found["fma_bf16"] == 450e9 * threads
    assert found["fma_fp32"] == 240e9 * threads
    monkeypatch.setattr(harness._load, "native", lambda: (None, "not built"))
    assert set(harness.ceilings("cpu", Clock("cpu", 1), quick=True)) == {"matmul_fp32", "matmul_bf16", "copy"}


def test_peak_is_the_best_measured_rate():
    found = {"matmul_fp32": 9e10, "fma_fp32": 2.4e11, "matmul_bf16": 3.6e11, "copy": 1e10}
    assert harness.peak_of(found, torch.float32) == (2.4e11, "fma_fp32")
    assert harness.peak_of(found, torch.bfloat16) == (3.6e11, "matmul_bf16")
    assert math.isclose(harness.summary([1, 2, 3])["median_ms"], 2000)
