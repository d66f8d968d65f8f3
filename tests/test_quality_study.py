"""The human evaluation kit without a browser: what raters get, what is read of them, and the figures.

No person answered anything here: every rater is simulated, and says so in the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import numbered, write_video

from avatar_rt.errors import InputError
from bench.quality.study.__main__ import main
from bench.quality.study.agreement import Limits, alpha, screen
from bench.quality.study.analyse import REGULARISER, bradley_terry, drawn_means, preferences, ratings, results, weights
from bench.quality.study.answers import Answer, Sheet, read_key, read_sheets
from bench.quality.study.build import plan, write_study
from bench.quality.study.questions import PAIRWISE, QUESTIONS, RATING, REAL

N = np.nan
DIMENSIONS = [q.key for q in QUESTIONS[RATING]]


def rated(system: str, case: str, value: int, repeat: bool = False, **kept: Any) -> Answer:
    kept = {"seconds": 9.0, "deciding": 5.0, "limit": 3.0} | kept
    return Answer(f"{system}/{case}", case, (system,), repeat, dict.fromkeys(DIMENSIONS, value), **kept)


def chose(left: str, right: str, case: str, choice: str, repeat: bool = False) -> Answer:
    pair = "-".join(sorted((left, right)))
    return Answer(f"{pair}/{case}", case, (left, right), repeat, {"choice": choice}, 9.0, 5.0, 3.0)


def sheet(name: str, answers: list[Answer]) -> Sheet:
    return Sheet(name, True, len(answers), tuple(answers))


def honest(name: str, seed: int, levels: dict[str, float], cases: int = 12) -> Sheet:
    """A simulated rater: each system's level, each case's own shift, noise."""
    rng, shift = np.random.default_rng(seed), np.random.default_rng(99).normal(0, 0.5, cases)
    given = [
        rated(s, f"case-{c:02d}", int(np.clip(round(v + shift[c] + rng.normal(0, 0.5)), 1, 5)))
        for s, v in levels.items()
        for c in range(cases)
    ]
    return sheet(name, [*given, rated(*given[0].trial.split("/"), given[0].values["identity"], repeat=True)])


def test_alpha_on_the_published_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: ordinal 0.815."""
    published = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ])  # fmt: skip
    assert alpha(published) == pytest.approx(0.815, abs=5e-4)
    assert alpha(published[::-1]) == pytest.approx(alpha(published), abs=1e-12)
    assert alpha(np.array([[1.0, 3, 5], [1, 3, 5]])) == 1
    assert np.isnan(alpha(np.array([[3.0, 3], [3, 3]]))) and np.isnan(alpha(np.array([[1.0, N], [N, 2]])))
    rng = np.random.default_rng(0)
    assert abs(alpha(rng.integers(1, 6, (4, 2000)).astype(float))) < 0.03  # chance


def test_two_way_bootstrap_knows_that_raters_differ() -> None:
    """Raters who differ by a constant: the interval must not shrink with the number of cases."""
    bias = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    widths = []
    for cases in (20, 200):
        values = 3 + bias[:, None] + np.zeros((5, cases))
        draws = drawn_means(values, *weights(5, cases, 4000))
        widths.append(np.quantile(draws, 0.975) - np.quantile(draws, 0.025))
    expected = 2 * 1.96 * bias.std() / np.sqrt(5)
    assert widths == pytest.approx([expected, expected], rel=0.1)
    values[:, 1] = N
    assert np.isfinite(drawn_means(values, *weights(5, 200, 10))).all()


def test_mean_opinions_order_the_systems() -> None:
    levels = {"truth": 4.6, "good": 3.8, "poor": 2.0}
    sheets = [honest(f"r{i}", i, levels) for i in range(5)]
    found = ratings(sheets, list(levels), [f"case-{c:02d}" for c in range(12)], "truth")["identity"]
    of = found["systems"]
    assert of["truth"]["low"] > of["good"]["high"] and of["good"]["low"] > of["poor"]["high"]
    assert of["poor"]["low"] < of["poor"]["mos"] < of["poor"]["high"] and of["poor"]["n"] == 60  # no repeats in it
    assert of["good"]["below_truth"][1] < 0 and found["alpha"] > 0.6


def test_raters_are_screened_with_the_reason() -> None:
    levels = {"truth": 4.6, "good": 3.6, "poor": 2.0}
    sheets = [honest(f"r{i}", i, levels) for i in range(6)]
    base = sheets[0].answers
    turned = [Answer(**{**a.__dict__, "values": {k: 6 - v for k, v in a.values.items()}}) for a in base]
    flat = [Answer(**{**a.__dict__, "values": dict.fromkeys(DIMENSIONS, 3)}) for a in base]
    hasty = [Answer(**{**a.__dict__, "deciding": 0.4}) for a in base]
    early = [Answer(**{**a.__dict__, "seconds": 1.0}) for a in base]
    unsure = [a for a in base if not a.repeat] + [rated(*base[0].trial.split("/"), 1, repeat=True)]
    odd = {"turned": turned, "flat": flat, "hasty": hasty, "early": early, "unsure": unsure}
    found = screen(RATING, [*sheets, *(sheet(name, answers) for name, answers in odd.items())])
    assert set(found) == set(odd)
    assert "correlation" in found["turned"][0] and "the same answer, 3" in found["flat"][0]
    assert "too fast" in found["hasty"][0] and "too fast" in found["early"][0] and "differ" in found["unsure"][0]
    assert "hasty" not in screen(RATING, [*sheets, sheet("hasty", hasty)], Limits(seconds=0))


def test_choices_are_not_screened_for_disagreeing() -> None:
    given = {
        name: [chose("a", "b", f"c{i}", side) for i in range(20)] for name, side in (("x", "left"), ("y", "right"))
    }
    assert screen(PAIRWISE, [sheet(k, v) for k, v in given.items()]) == {}
    again = [chose("b", "a", f"c{i}", "left", repeat=True) for i in range(4)]  # first a, then b
    found = screen(PAIRWISE, [sheet("x", given["x"] + again)])
    assert "4 of 4 repeated choices" in found["x"][0]


def test_majority_counts_cases_whatever_the_side() -> None:
    """Three raters: two for a in c0..c4, two for b in c5, one each and a tie in c6."""
    sheets = []
    for name, at_c5, at_c6 in (("x", "b", "a"), ("y", "b", "b"), ("z", "a", None)):
        liked = ["a" if name != "z" else "b"] * 5 + [at_c5, at_c6]
        pairs = [("a", "b") if (i + len(sheets)) % 2 else ("b", "a") for i in range(7)]  # sides in turn
        sides = ["tie" if s is None else ("left", "right")[p.index(s)] for s, p in zip(liked, pairs, strict=True)]
        sheets.append(sheet(name, [chose(*p, f"c{i}", s) for i, (p, s) in enumerate(zip(pairs, sides, strict=True))]))
    found = preferences(sheets, ["a", "b"], [f"c{i}" for i in range(7)])
    pair = found["pairs"][0]
    assert (pair["a"], pair["won"], pair["tied"], pair["lost"]) == ("a", 5, 1, 1)
    assert (pair["votes_a"], pair["votes_tied"], pair["votes_b"]) == (12, 1, 8)
    assert pair["rate"] == pytest.approx(5 / 6) and pair["p"] == pytest.approx(14 / 64)
    assert found["strengths"]["a"]["strength"] > 0 > found["strengths"]["b"]["strength"]


def test_raters_who_always_prefer_one_system_agree() -> None:
    """As +1 throughout it would be no variety at all, and alpha undefined or near zero."""
    sheets = [sheet(name, [chose("a", "b", f"c{i}", "left") for i in range(12)]) for name in ("x", "y", "z")]
    assert preferences(sheets, ["a", "b"], [f"c{i}" for i in range(12)])["alpha"] == 1


def test_bradley_terry_recovers_the_strengths_it_was_drawn_from() -> None:
    true = {"a": 1.0, "b": 0.3, "c": -0.2, "d": -1.1}
    rng, votes = np.random.default_rng(0), {}
    for a, b in (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")):
        wins = rng.random((10, 60)) < 1 / (1 + np.exp(true[b] - true[a]))
        votes[a, b] = np.where(wins, 1.0, -1.0)
    found = bradley_terry(votes, list(true), 10, 60)
    assert [found[s]["strength"] for s in true] == pytest.approx(list(true.values()), abs=0.15)
    assert all(found[s]["low"] < true[s] < found[s]["high"] for s in true)
    two = bradley_terry({("a", "b"): np.array([[1.0, 1, 1, -1]])}, ["a", "b"], 1, 4)  # 3 : 1 is log 3
    assert two["a"]["strength"] - two["b"]["strength"] == pytest.approx(np.log(3), abs=2 * REGULARISER)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cases, videos of one system): three cases, the system lacks the last; its videos are longer."""
    root = tmp_path_factory.mktemp("made")
    for i in range(3):
        (root / "cases" / f"case-{i:02d}").mkdir(parents=True)
        for name in ("reference", "target"):
            write_video(root / "cases" / f"case-{i:02d}" / f"{name}.mp4", numbered(5 + i))
    (root / "tiny").mkdir()
    for i in range(2):
        write_video(root / "tiny" / f"case-{i:02d}.mp4", numbered(9))
    return root / "cases", root / "tiny"


@pytest.mark.parametrize(("kind", "trials"), [(RATING, 4), (PAIRWISE, 2), (REAL, 4)])
def test_the_page_is_blind(folders: tuple[Path, Path], tmp_path: Path, kind: str, trials: int) -> None:
    cases, tiny = folders
    key = write_study(plan({"tiny": tiny}, cases, kind, seed=5), tmp_path, title="Faces")
    assert key["left_out"] == {"case-02": "no video of tiny"} and len(key["trials"]) == trials
    assert read_key(tmp_path / "key.json") == key
    assert [(i["system"], i["seconds"]) for i in key["items"].values()].count(("truth", 0.2)) == 1
    files = [p for p in (tmp_path / "page").rglob("*") if p.is_file()]
    assert len(files) == 1 + 4 + (0 if kind == REAL else 2)
    for path in files:
        told = path.read_bytes() if path.suffix == ".mp4" else path.read_text().encode()
        for word in (b"tiny", b"truth", b"case-0", b"key.json"):
            assert word not in told and word.decode() not in path.name
    assert {len(name) for name in key["items"]} == {16}
    page = (tmp_path / "page" / "index.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert {t["id"] for t in data["trials"]} == set(key["trials"])
    other = write_study(plan({"tiny": tiny}, cases, kind, seed=6), tmp_path, title="Faces")  # replaces the first
    assert not set(other["items"]) & set(key["items"])


def test_a_study_that_cannot_be_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    cases, tiny = folders
    with pytest.raises(InputError, match="a case that every system has"):
        plan({"tiny": tiny, "empty": tmp_path}, cases, RATING, 0)
    with pytest.raises(InputError, match="at least one system"):
        plan({"truth": tiny}, cases, RATING, 0)
    (tmp_path / "precious.txt").touch()
    with pytest.raises(InputError, match="other files"):
        write_study(plan({"tiny": tiny}, cases, RATING, 0), tmp_path)


def answered(key: dict, rater: str, **changed: Any) -> dict:
    """A simulated rater's file: the truth gets 5, the system 2."""
    answers = []
    for i, (trial, of) in enumerate(key["trials"].items()):
        value = 5 if key["items"][of[0]]["system"] == "truth" else 2
        answers.append({
            "trial": trial, "place": i, "repeat": False, "videos": of, "values": dict.fromkeys(DIMENSIONS, value),
            "plays": [1], "seconds": 8.0, "deciding": 4.0,
        })  # fmt: skip
    told = {"schema": "avatar_rt.study-answers/1", "study": key["study"], "kind": RATING, "rater": rater}
    told |= {"simulated": True, "started": "", "finished": None, "trials": len(answers), "answers": answers}
    return told | changed


def test_broken_files_are_one_sentence_each_and_counted(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, tiny = folders
    key = write_study(plan({"tiny": tiny}, cases, RATING, seed=5), tmp_path / "study")
    good = answered(key, "r1")
    first = good["answers"][0]
    broken: dict[str, tuple[Any, str]] = {
        "a-text": ("no json", "cannot be read"), "b-list": ([], "expected object, got list"),
        "c-missing": ({k: v for k, v in good.items() if k != "rater"}, "expected rater, which is not there"),
        "d-version": (good | {"schema": "avatar_rt.study-answers/0"}, "expected avatar_rt.study-answers/1"),
        "e-study": (good | {"study": "other"}, "expected answers to study"),
        "f-value": (good | {"answers": [first | {"values": dict.fromkeys(DIMENSIONS, 6)}]}, "answer 0: identity"),
        "g-trial": (good | {"answers": [first | {"trial": "x"}]}, "trial x is not of this study"),
        "h-play": (good | {"answers": [first | {"plays": [0]}]}, "answers[0].plays[0]: expected at least 1"),
        "i-time": (good | {"answers": [first | {"seconds": float("nan")}]}, "expected at least 0, got nan"),
        "j-twice": (good | {"answers": [first, first]}, "answered twice"),
        "k-none": (good | {"answers": []}, "no trial is answered"),
        "m-extra": (good | {"note": "hello"}, "note, which has no place here"),
        "z-again": (good, "r1 has answered already, in l-good.json"),
    }  # fmt: skip
    folder = tmp_path / "answers"
    folder.mkdir()
    for name, (data, _) in broken.items():
        (folder / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    (folder / "l-good.json").write_text(json.dumps(good))
    sheets, problems = read_sheets(folder, key)
    assert [s.rater for s in sheets] == ["r1"]
    for (name, (_, told)), problem in zip(broken.items(), problems, strict=True):
        assert problem.startswith(f"{name}.json: ") and told in problem and "\n" not in problem
    given = ["analyse", "--answers", str(folder), "--key", str(tmp_path / "study" / "key.json")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["unusable"]) == len(broken) and last["raters"] == 1 and last["simulated"] == 1
    assert last["results"]["lip_sync"]["systems"]["tiny"]["mos"] == 2 and last["thin_trials"] == 4
    page = (tmp_path / "out" / "index.html").read_text()
    assert "simulated" in page and "<svg" in page and "l-good.json" in page
    (folder / "l-good.json").unlink()
    for name in broken:
        if name != "z-again":
            (folder / f"{name}.json").write_text("{}")
    (folder / "z-again.json").unlink()
    assert main([*given, "--out", str(tmp_path / "out")]) == 2


def test_shares_taken_for_real_and_what_is_missing() -> None:
    key = {"kind": REAL, "study": "s", "hidden": "truth", "left_out": {}, "trials": {}, "items": {}}
    sheets = []
    for r in range(4):
        answers = []
        for c in range(10):
            for s, real in (("truth", True), ("tiny", c < 2)):
                key["items"][f"{s}{c}"] = {"system": s, "case": f"c{c}", "seconds": 3.0}
                key["trials"][f"{s}/c{c}"] = [f"{s}{c}"]
                values = {"choice": "real" if real else "generated"}
                answers.append(Answer(f"{s}/c{c}", f"c{c}", (s,), False, values, 9.0, 5.0, 3.0))
        sheets.append(Sheet(f"r{r}", True, 20, tuple(answers[: 20 if r else 15])))
    found = results(sheets, key)
    truth, tiny = (found["results"]["systems"][s] for s in ("truth", "tiny"))
    assert truth["share"] == 1 and truth["asked"] == 38 and tiny["real"] == 8 and tiny["asked"] == 37
    assert tiny["low"] < 8 / 37 < tiny["high"] < 0.5 and tiny["p"] < 0.01
    assert tiny["drawn_high"] - tiny["drawn_low"] > tiny["high"] - tiny["low"]  # raters agree: cases are what varies
    assert found["unfinished"] == {"r0": "15 of 20 trials"}
