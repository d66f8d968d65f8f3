"""The page of results: failures first, nothing fetched, every text escaped, and the last line."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from media_files import numbered, write_video

from avatar_rt.errors import InputError
from bench.quality import report, videos
from bench.quality.expected import Expectation, read_expectations
from bench.quality.measure import Measure

SHARP = Measure("sharp", "Sharpness", "", "higher", "visual")
ENERGY = Measure("energy", "Energy <&>", "x", "target", "motion", 1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A report of two systems on seven cases: one video damaged, one value missing, one case of one system only."""
    folder = tmp_path_factory.mktemp("report")
    rows = []
    for k, system in enumerate(("truth", "<b>odd</b>")):
        for i in range(7):
            row = {"system": system, "case": f"case-{i:02d}", "status": "ok", "reason": ""}
            rows.append(row | {"sharp": 10.0 + i - 2 * k, "energy": 1.0 + k, "unheard": 1.0})
    rows[2] |= {"status": "unreadable video", "reason": "it breaks off", "sharp": 99.0}
    rows[4]["energy"] = float("nan")
    del rows[-1]
    for system in ("truth", "odd"):
        (folder / system).mkdir()
    for i in range(2):
        write_video(folder / "truth" / f"case-{i:02d}.mp4", numbered(6))
    write_video(folder / "odd" / "case-00.mp4", numbered(6), pix_fmt="yuv444p")
    (folder / "odd" / "case-01.mp4").write_bytes(b"no video")
    systems = {"truth": folder / "truth", "<b>odd</b>": folder / "odd"}
    asked = [Expectation("sharp", "truth", "<b>odd</b>", "as told"), Expectation("sync", "truth", "<b>odd</b>")]
    facts = {"commit": "abc", "weights": "tiny 123"}
    done = report.build(rows, [SHARP, ENERGY], folder / "out", systems=systems, expectations=asked, facts=facts)
    return folder / "out", done


def test_failures_are_counted_and_named_before_any_number(made: tuple[Path, dict]) -> None:
    folder, document = made
    page = (folder / "index.html").read_text()
    first = page[page.index('id="failures"') : page.index('id="group-')]
    for told in ("it breaks off", "unreadable video", "not measured", "no row", "case-06", "no video"):
        assert told in first
    # 1 damaged row, 1 missing row, 1 missing value; videos: 5 + 5 missing and 1 that cannot be read.
    assert document["failures"] == 3 + 11
    sharp = document["measures"]["sharp"]
    assert (sharp["truth"]["n"], sharp["truth"]["of"]) == (6, 7)
    assert sharp["truth"]["mean"] == pytest.approx(np.mean([10, 11, 13, 14, 15, 16]))  # 99 is of a failed row
    assert "6 of 7" in page


def test_a_damaged_row_cannot_make_a_comparison_better(made: tuple[Path, dict]) -> None:
    found = {c["measure"]: c for c in made[1]["comparisons"]}
    assert found["sharp"]["n"] == 5 and found["sharp"]["gain"] == -2 and found["sharp"]["verdict"] == "too few cases"
    assert made[1]["expected"] == {"pass": 0, "fail": 0, "not checked": 2}


def test_the_page_is_whole_and_escaped(made: tuple[Path, dict]) -> None:
    folder, _ = made
    page = (folder / "index.html").read_text()
    assert "<b>odd</b>" not in page and "&lt;b&gt;odd&lt;/b&gt;" in page and "Energy &lt;&amp;&gt;" in page
    assert not re.search(r'(src|href)="(https?:)?//', page) and "@import" not in page and "url(http" not in page
    for path in re.findall(r'src="([^"#:]+)"', page):
        assert (folder / path).is_file()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    played = [path for case in data["cases"] for path in case["videos"].values()]
    assert len(played) == 3 and all(videos.is_played(folder / path) for path in played)  # 4:4:4 was written anew
    assert "unheard" in page and page.count("abc") and "tiny 123" in page
    ids = re.findall(r'\bid="(case-of-[^"]+)"', page)
    assert set(re.findall(r'href="#(case-of-[^"]+)"', page)) <= set(ids)


def test_the_same_table_makes_the_same_page(made: tuple[Path, dict], tmp_path: Path) -> None:
    rows = [{"system": "a", "case": f"c{i}", "status": "ok", "reason": "", "sharp": float(i)} for i in range(4)]
    for name in ("x", "y"):
        report.build(rows, [SHARP], tmp_path / name)
    pages = [(tmp_path / name / "index.html").read_text() for name in ("x", "y")]
    assert pages[0] == pages[1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"system": "a", "case": f"c{i}", "status": "ok", "reason": "", "my_own": float(i)} for i in range(4)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    own = {"key": "my_own", "title": "Mine", "unit": "", "better": "lower", "group": "own"}
    (tmp_path / "measures.json").write_text(json.dumps([own]))
    (tmp_path / "about.json").write_text(json.dumps({"weights": "w1"}))
    out = tmp_path / "out"
    given = ["--rows", str(tmp_path / "rows.csv"), "--out", str(out), "--about", str(tmp_path / "about.json")]
    assert report.main([*given, "--measures", str(tmp_path / "measures.json")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["measures"]["my_own"]["a"]["mean"] == 1.5 and (out / "index.html").is_file()
    assert report.main([*given]) == 2  # no known column
    assert "my_own" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("kept")
    given[3] = str(tmp_path / "other")
    assert report.main([*given, "--measures", str(tmp_path / "measures.json")]) == 2
    assert "other files" in capsys.readouterr().err and (tmp_path / "other" / "precious.txt").is_file()


def test_the_degraded_systems_have_expectations_of_known_measures() -> None:
    path = Path(report.__file__).parent / "expected.json"
    asked = read_expectations(path)
    assert {e.better for e in asked} == {"truth"} and len({(e.measure, e.worse) for e in asked}) == len(asked)
    assert {e.worse for e in asked} == {"frozen", "other", "shifted", "blurred", "drifting"} and all(
        e.why for e in asked
    )
    known = {m.key for m in report.known_measures()}
    absent = [f for f in report.FAMILIES if importlib.util.find_spec(f"bench.quality.{f}") is None]
    if absent:
        pytest.skip(f"the measures of {', '.join(absent)} are not here")
    assert {e.measure for e in asked} <= known


def test_folders_of_videos(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SYSTEM=DIR"):
        videos.parse_systems(["tiny"])
    with pytest.raises(InputError, match="no folder"):
        videos.parse_systems([f"tiny={tmp_path / 'none'}"])
    for name in ("a.mp4", "a.webm", "b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"a\.mp4 and a\.webm"):
        videos.find_videos(tmp_path)
    odd = videos.write(tmp_path / "odd.mp4", numbered(3, 47, 63), np.zeros(1920, np.float32))
    clip = videos.read_video(odd)
    assert clip.frames.shape == (3, 48, 64, 3)
    assert videos.strip(clip.frames, 8, 24).shape == (24, 8 * 32, 3)
