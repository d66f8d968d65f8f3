"""The pages in a real browser: a rater's study from the first video to the answers, and the report's player.

The rater is simulated and its answers say so. The browser is Debian's Chromium without a window; it reads from the disk
and from a server of the test's own.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clicks, numbered, write_video

from avatar_rt.media.writer import VideoWriter
from bench.quality import report
from bench.quality.measure import Measure
from bench.quality.study.__main__ import main
from bench.quality.study.answers import read_key

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--mute-audio", "--window-size=1200,900",
    "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
FRAMES = 5  # 0.2 s: a whole study plays in seconds


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    for program in (BROWSER, DRIVER):
        if not program.exists():
            pytest.skip(f"there is no {program}: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "got").mkdir()
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "got")})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    driver.got = folder / "got"
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cases, videos of one system), two cases, with sound."""
    root = tmp_path_factory.mktemp("made")
    sound = clicks(FRAMES / 25, 16_000)[:, 0]
    for case in ("case-00", "case-01"):
        (root / "cases" / case).mkdir(parents=True)
        for name in ("reference", "target"):
            write_video(root / "cases" / case / f"{name}.mp4", numbered(FRAMES))
        (root / "tiny").mkdir(exist_ok=True)
        with VideoWriter(root / "tiny" / f"{case}.mp4", (48, 64), audio=(sound, 16_000)) as writer:
            writer.write(255 - numbered(FRAMES))
    return root / "cases", root / "tiny"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what is posted; says nothing."""

    posted: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def build(folders: tuple[Path, Path], out: Path, *more: str) -> dict:
    given = ["build", "--videos", f"tiny={folders[1]}", "--cases", str(folders[0]), "--out", str(out), "--seed", "7"]
    assert main([*given, *more]) == 0
    return read_key(out / "key.json")


def press(browser: Any, keys: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(keys)


def wait(browser: Any, what: Any, seconds: float = 20) -> Any:
    return WebDriverWait(browser, seconds, 0.02).until(what)


def shown(browser: Any) -> list[str]:
    """The blind names of the videos on the screen, without the reference."""
    found = browser.find_elements(By.CSS_SELECTOR, "#screens figure:not(.reference) video")
    return [v.get_attribute("src").rsplit("/", 1)[1].removesuffix(".mp4") for v in found]


def opened(browser: Any) -> bool:
    return not browser.find_elements(By.CSS_SELECTOR, "#questions input:disabled")


def play(browser: Any) -> list[str]:
    """Plays what is on the screen to its end; answers must not be open before. Gives the blind names."""
    assert not opened(browser) and not browser.find_element(By.ID, "next").is_enabled()
    press(browser, "5")  # too early: nothing
    assert not browser.find_elements(By.CSS_SELECTOR, "#questions input:checked")
    press(browser, " ")
    wait(browser, opened)
    return shown(browser)


def enter(browser: Any, url: str, rater: str) -> None:
    browser.get(url + "?simulated")
    box = browser.find_element(By.ID, "rater")
    box.clear()
    box.send_keys(rater + Keys.ENTER)
    wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#screens video"))


def close_and_return(browser: Any, url: str, name: str, answers: int) -> None:
    """Another tab takes over; a browser hands what a page stored to the next one a little later, so that is awaited."""
    old = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(url)
    look = f"return (JSON.parse(localStorage.getItem({name!r})) || {{answers: []}}).answers.length"
    wait(browser, lambda b: b.execute_script(look) == answers)
    new = browser.current_window_handle
    browser.switch_to.window(old)
    browser.close()
    browser.switch_to.window(new)


def count(browser: Any) -> str:
    return browser.find_element(By.ID, "count").text


def test_a_rater_rates_returns_submits_and_is_read(browser: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """From the disk: the answers are downloaded. The truth is given 5, 4, 5, 4, 5, 4 and the system 2, 1, ..."""
    key = build(folders, tmp_path / "study")
    url = (tmp_path / "study" / "page" / "index.html").as_uri()
    enter(browser, url, "r1")
    total = int(count(browser).split()[-1])
    assert total == len(key["trials"]) + 1  # one repeat
    seen = []
    for i in range(total):
        if i == 2:
            before = shown(browser)
            close_and_return(browser, url, f"avatar_rt.study.{key['study']}.answers.r1", i)
            enter(browser, url, "R1")
            assert shown(browser) == before
        assert count(browser) == f"{i + 1} of {total}"
        (name,) = play(browser)
        seen.append(name)
        high = key["items"][name]["system"] == "truth"
        press(browser, "545454" if high else "212121")
        press(browser, Keys.ENTER)
    assert sorted(set(seen)) == sorted(key["items"]) and len(seen) == total
    browser.find_element(By.ID, "download").click()
    file = wait(browser, lambda b: next(browser.got.glob(f"answers-{key['study']}-r1.json"), None))
    told = json.loads(file.read_text())
    assert told["simulated"] and told["finished"] and [a["repeat"] for a in told["answers"]].count(True) == 1
    assert all(a["plays"] == [1] and a["seconds"] >= 0.15 and a["deciding"] >= 0 for a in told["answers"])
    (tmp_path / "answers").mkdir()
    file.rename(tmp_path / "answers" / file.name)
    given = ["analyse", "--answers", str(tmp_path / "answers"), "--key", str(tmp_path / "study" / "key.json")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2  # nobody is that fast: screened out, so nobody is left
    assert main([*given, "--out", str(tmp_path / "out"), "--screen-seconds", "0"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    of = {d: {s: x["mos"] for s, x in found["results"][d]["systems"].items()} for d in ("identity", "visual")}
    assert of == {"identity": {"truth": 5, "tiny": 2}, "visual": {"truth": 4, "tiny": 1}}
    assert found["simulated"] == 1 and not found["unfinished"]


def test_preferences_are_posted(browser: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """From a server: the true video is preferred wherever it stands, and the answers arrive by themselves."""
    with served(tmp_path / "study" / "page") as url:
        key = build(folders, tmp_path / "study", "--kind", "pairwise", "--post", f"{url}/answers")
        enter(browser, f"{url}/index.html", "r2")
        for _ in range(len(key["trials"]) + 1):
            sides = [key["items"][name]["system"] for name in play(browser)]
            press(browser, (Keys.ARROW_LEFT, Keys.ARROW_RIGHT)[sides.index("truth")])
            press(browser, Keys.ENTER)
        wait(browser, lambda b: "have been sent" in b.find_element(By.ID, "sent").text)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "r2.json").write_text(json.dumps(Quiet.posted.pop()))
    given = ["analyse", "--answers", str(tmp_path / "answers"), "--key", str(tmp_path / "study" / "key.json")]
    assert main([*given, "--out", str(tmp_path / "out"), "--screen-seconds", "0"]) == 0
    pair = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["pairs"][0]
    assert (pair["a"], pair["won"], pair["tied"], pair["lost"]) == ("tiny", 0, 0, 2)


def test_each_rater_has_an_order_that_stays(browser: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    build(folders, tmp_path / "study", "--kind", "real_or_generated")
    browser.get((tmp_path / "study" / "page" / "index.html").as_uri())
    many = """const study = {study: "s", repeats: 0.05, per_rater: arguments[1], trials: []};
        for (let c = 0; c < 20; c++) for (const v of "abc") study.trials.push({id: v + c, videos: [v + c], group: c});
        return order.trials(study, arguments[0]).map(t => [t.id, t.group, t.repeat]);"""
    orders = {r: browser.execute_script(many, r, None) for r in ("r1", "r2", "r3")}
    assert orders["r1"] == browser.execute_script(many, "r1", None)
    assert orders["r1"] != orders["r2"] != orders["r3"]
    for trials in orders.values():
        first = [t[0] for t in trials if not t[2]]
        again = [t[0] for t in trials if t[2]]
        assert len(set(first)) == 60 == len(first) and len(again) == 3
        groups = [t[1] for t in trials if not t[2]]
        assert sum(a == b for a, b in itertools.pairwise(groups)) <= 2
        places = [t[0] for t in trials]
        assert all(places.index(t) < 35 and len(places) - 1 - places[::-1].index(t) >= 40 for t in again)
    part = [t for t in browser.execute_script(many, "r1", 10) if not t[2]]
    assert len(part) == 12 and len({t[1] for t in part}) == 4  # whole cases


def test_the_report_plays_side_by_side(browser: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [
        {"system": "tiny", "case": f"case-{i:02d}", "status": "ok", "reason": "", "sharp": float(i)} for i in range(2)
    ]
    measures = [Measure("sharp", "Sharpness", "", "higher", "visual")]
    report.build(rows, measures, tmp_path / "out", cases=folders[0], systems={"tiny": folders[1]})
    browser.get((tmp_path / "out" / "index.html").as_uri())
    videos = browser.find_elements(By.CSS_SELECTOR, "#screens video")
    assert [v.get_attribute("data-system") for v in videos] == ["reference", "target", "tiny"]

    def times(b: Any) -> list[float]:
        return b.execute_script("return [...document.querySelectorAll('#screens video')].map(v => v.currentTime)")

    def ready(b: Any) -> bool:
        return b.execute_script("return [...document.querySelectorAll('#screens video')].every(v => v.readyState > 1)")

    stage = browser.find_element(By.ID, "stage")
    wait(browser, ready)
    for _ in range(2):
        stage.send_keys(Keys.ARROW_RIGHT)
    wait(browser, lambda b: np.allclose(times(b), 2 / 25, atol=0.01))
    stage.send_keys(Keys.HOME)
    stage.send_keys(" ")
    wait(browser, lambda b: min(times(b)) > 0.15)  # all have played
    stage.send_keys("3")
    assert browser.execute_script("return [...document.querySelectorAll('#screens video')].map(v => v.muted)") == [
        True, True, False,
    ]  # fmt: skip
    stage.send_keys("j")
    assert browser.find_element(By.CSS_SELECTOR, "#values th").text.endswith("case-01")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
