"""Trimmed means, intervals, tests and failures of the table of results, against numbers worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from avatar_rt.errors import InputError
from bench.quality.expected import Expectation, check, read_expectations
from bench.quality.measure import Measure
from bench.quality.statistics import (
    Failure,
    centre,
    compare,
    holm,
    interval,
    read_rows,
    sign_test,
    summarise,
    trimmed_mean,
    wilcoxon,
    wilson,
)

SHARP = Measure("sharp", "Sharpness", "", "higher", "visual")
ERROR = Measure("error", "Error", "px", "lower", "visual")
RATIO = Measure("ratio", "Ratio", "", "target", "motion", 1.0)


def table(system: str, **columns: list[float]) -> list[dict]:
    """Rows case-00, case-01, ... of one system."""
    length = len(next(iter(columns.values())))
    named = {"system": system, "status": "ok", "reason": ""}
    return [named | {"case": f"case-{i:02d}"} | {k: v[i] for k, v in columns.items()} for i in range(length)]


def test_trimmed_mean_cuts_a_tenth_at_each_end() -> None:
    assert trimmed_mean([1, 2, 3, 4, 5, 6, 7, 8, 9, 1000]) == 5.5  # (2 + ... + 9) / 8
    assert trimmed_mean([-50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 900]) == 5.5  # one of twelve at each end
    assert trimmed_mean([1, 2, 9]) == 4.0  # nothing to cut
    assert math.isnan(trimmed_mean([]))


def test_a_share_is_not_trimmed() -> None:
    """Trimmed, three failures in 36 would vanish."""
    hits = [1.0] * 33 + [0.0] * 3
    assert trimmed_mean(hits) == 1 and centre(hits) == pytest.approx(33 / 36)
    low, high = interval(hits)
    assert 0.75 < low < 33 / 36 < high <= 1
    assert centre([*hits, 0.5]) == trimmed_mean([*hits, 0.5])


def test_interval_covers_the_mean_it_is_for() -> None:
    rng = np.random.default_rng(0)
    bounds = [interval(rng.normal(3, 1, 36), draws=1000) for _ in range(300)]
    covered = np.mean([low < 3 < high for low, high in bounds])
    assert 0.90 <= covered <= 0.98
    widths = [high - low for low, high in bounds]
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 6, rel=0.12)
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])
    assert all(map(math.isnan, interval([1.0])))


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, math.nan, 0.02])[::2] == pytest.approx([0.2, 0.04])  # NaN is no test
    assert math.isnan(holm([0.2, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_wilson_and_sign_test() -> None:
    low, high = wilson(31, 45)
    assert (round(100 * low), round(100 * high)) == (54, 80)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert all(map(math.isnan, wilson(0, 0)))
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == 1 and sign_test(0, 0) == 1


def test_wilcoxon_is_exact_on_few_pairs() -> None:
    assert wilcoxon([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert wilcoxon([1, 2, 3, 4, 5]) == pytest.approx(2 / 32)  # cannot reach 5 %
    assert wilcoxon([0, 0, 0]) == 1
    assert math.isnan(wilcoxon([]))


def test_a_failure_is_counted_and_named() -> None:
    rows = table("a", sharp=[1.0, 2.0, math.nan, 4.0]) + table("b", sharp=[1.0, 2.0, 3.0, 4.0, 5.0])
    rows[3] |= {"status": "unreadable video", "reason": "it breaks off"}
    found = summarise(rows, SHARP, "a")
    assert found.mean == 1.5 and found.scored == "2 of 5"
    assert found.failures == (
        Failure("case-02", "not measured"), Failure("case-03", "unreadable video", "it breaks off"),
        Failure("case-04", "no row"),
    )  # fmt: skip
    none = summarise(rows, ERROR, "a")
    assert math.isnan(none.mean) and none.scored == "0 of 5"


def test_comparison_finds_the_better_one_whatever_the_direction() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(10, 2, 36)  # cases differ far more than systems: only pairs show it
    noise = rng.normal(0, 0.1, (4, 36))
    a = {"sharp": base + 0.3 + noise[0], "error": base + 0.3 + noise[1], "ratio": 1 + noise[2]}
    b = {"sharp": base, "error": base, "ratio": 1 + noise[3]}
    rows = table("a", **{k: list(v) for k, v in a.items()}) + table("b", **{k: list(v) for k, v in b.items()})
    sharp, error, ratio = compare(rows, [SHARP, ERROR, RATIO], "a", "b")
    assert sharp.verdict == "better" and sharp.won >= 33 and 0.2 < sharp.low < sharp.gain < sharp.high < 0.4
    assert error.verdict == "worse" and error.high < 0
    assert ratio.verdict == "no difference shown" and ratio.p == ratio.p_holm  # alone in its group
    assert [sharp.p_holm, error.p_holm] == holm([sharp.p, error.p]) and sharp.p_holm > sharp.p
    turned = compare(rows, [SHARP], "b", "a")[0]
    assert turned.verdict == "worse" and turned.gain == pytest.approx(-sharp.gain)


def test_comparison_uses_only_shared_cases_and_lists_the_others() -> None:
    rows = table("a", sharp=[1.0, 2.0, 3.0]) + table("b", sharp=[0.0, math.nan, 0.0, 9.0])
    found = compare(rows, [SHARP], "a", "b")[0]
    assert found.cases == ("case-00", "case-02") and found.mean_a == 2.0 and found.mean_b == 0.0
    assert found.only_a == ("case-01",) and found.only_b == ("case-03",)
    assert found.verdict == "too few cases"


def test_expectations_pass_fail_or_say_why_they_were_not_checked() -> None:
    good = list(np.linspace(5, 6, 8))
    rows = table("truth", sharp=good) + table("blurred", sharp=[v - 1 for v in good]) + table("same", sharp=good)
    asked = [
        Expectation("sharp", "truth", "blurred"), Expectation("sharp", "blurred", "truth"),
        Expectation("sharp", "truth", "same"), Expectation("sharp", "truth", "frozen"),
        Expectation("x", "truth", "same"),
    ]  # fmt: skip
    found = check(rows, [SHARP], asked)
    assert [o.verdict for o in found] == ["pass", "fail", "fail", "not checked", "not checked"]
    assert "opposite" in found[1].reason and "frozen" in found[3].reason and "x" in found[4].reason
    few = check(table("truth", sharp=good[:3]) + table("blurred", sharp=[0.0] * 3), [SHARP], asked[:1])
    assert few[0].verdict == "not checked"


def test_expectations_file(tmp_path: Path) -> None:
    path = tmp_path / "expect.json"
    path.write_text('[{"measure": "sharp", "better": "truth", "worse": "blurred"}]')
    assert read_expectations(path) == [Expectation("sharp", "truth", "blurred")]
    for text in ("{}", '[{"measure": "sharp"}]', '[{"measure": 1, "better": "a", "worse": "b"}]', "no"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"expect\.json"):
            read_expectations(path)


def test_table_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = table("a", sharp=[1.5, math.nan])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = read_rows(path)
    assert found[0] == rows[0] and math.isnan(found[1]["sharp"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("system,case\na,x\n", "status, reason"),
        ("system,case,status,reason,sharp\na,x,ok,,abc\n", "'abc'"),
        ("system,case,status,reason,sharp\na,x,ok,,1\na,x,ok,,2\n", "two of a, x"),
        ("system,case,status,reason,sharp\n,x,ok,,1\n", "a system and a case"),
        ("system,case,status,reason,sharp\na,x,ok,,1,7\n", "1 more"),
        ("system,case,status,reason,sharp\n", "at least one row"),
    ],
)
def test_a_broken_table_gets_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert told in str(caught.value) and "\n" not in str(caught.value)
