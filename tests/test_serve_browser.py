"""The server's page in a real browser without a window: it plays live, the picture moves, the sound is heard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_client import SAMPLES, Served, served

from avatar_rt import AvatarEngine

for package in ("starlette", "uvicorn", "websockets", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[serve]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from avatar_rt.serve.limits import Limits  # noqa: E402

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--mute-audio", "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a microphone that beeps every second
)  # fmt: skip
# What the player shows, small and grey, and how loud it is, looked at from now on.
WATCH = """
const player = document.getElementById("player"), canvas = document.createElement("canvas");
canvas.width = canvas.height = 32;
const drawing = canvas.getContext("2d", { willReadFrequently: true });
const context = new AudioContext(), analyser = context.createAnalyser();
context.createMediaElementSource(player).connect(analyser);
window.loudest = 0;
setInterval(() => {
  const wave = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(wave);
  window.loudest = Math.max(window.loudest, ...wave.map(Math.abs));
}, 20);
window.look = () => {
  drawing.drawImage(player, 0, 0, 32, 32);
  return [...drawing.getImageData(0, 0, 32, 32).data].filter((_, i) => i % 4 === 1);
};
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(AvatarEngine(), Limits()) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path, server: Served) -> Iterator[Any]:
    for program in (BROWSER, DRIVER):
        if not program.exists():
            pytest.skip(f"there is no {program}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    driver.get(f"http://127.0.0.1:{server.port}/")
    if not driver.execute_script(
        """return MediaSource.isTypeSupported('video/mp4; codecs="avc1.64000D, mp4a.40.2"')"""
    ):
        driver.quit()
        pytest.skip(f"{BROWSER} plays no h264 and aac")
    driver.find_element(By.ID, "video").send_keys(str(SAMPLES / "reference.mp4"))
    driver.find_element(By.ID, "steps").send_keys("1")
    driver.execute_script(WATCH)
    yield driver
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    driver.quit()
    assert not errors


def wait(browser: Any, what: Any, seconds: float = 90) -> Any:
    return WebDriverWait(browser, seconds, 0.05).until(what)


def now(browser: Any) -> float:
    return browser.execute_script("return player.currentTime")


def status(browser: Any) -> str:
    return browser.find_element(By.ID, "status").text


def see_and_hear(browser: Any) -> None:
    """The player gets on, its picture changes, and there is sound."""
    wait(browser, lambda b: now(b) > 0.3)
    first, at = browser.execute_script("return look()"), now(browser)
    wait(browser, lambda b: now(b) > at + 0.5)
    second = browser.execute_script("return look()")
    assert len(set(first)) > 20  # a picture, not a plain colour
    assert sum(a != b for a, b in zip(first, second)) > 50
    assert browser.execute_script("return [player.videoWidth, player.videoHeight]") == [256, 256]
    wait(browser, lambda b: b.execute_script("return loudest") > 0.02)


def test_the_page_says_a_file_to_its_end(browser: Any) -> None:
    assert not browser.find_element(By.ID, "file").is_enabled()  # no sound chosen yet
    browser.find_element(By.ID, "sound").send_keys(str(SAMPLES / "speech.wav"))
    browser.find_element(By.ID, "file").click()
    see_and_hear(browser)
    wait(browser, lambda b: status(b) == "Done.")
    wait(browser, lambda b: b.execute_script("return player.ended"))
    seconds = browser.execute_script("return player.duration")
    assert seconds == pytest.approx(5.0, abs=0.15)
    assert browser.find_element(By.ID, "file").is_enabled()


def test_the_page_repeats_the_microphone_and_can_be_interrupted(browser: Any, server: Served) -> None:
    browser.find_element(By.ID, "microphone").click()
    see_and_hear(browser)
    browser.find_element(By.ID, "interrupt").click()
    wait(browser, lambda b: b.execute_script("return live.generation") == 1)  # the first chunk after it is here
    at = now(browser)
    wait(browser, lambda b: now(b) > at + 0.3)  # and is played
    browser.find_element(By.ID, "stop").click()
    wait(browser, lambda b: not server.server.live)
    assert browser.find_element(By.ID, "microphone").is_enabled()


def test_the_page_says_what_is_wrong(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video")
    browser.find_element(By.ID, "video").clear()
    browser.find_element(By.ID, "video").send_keys(str(tmp_path / "no.mp4"))
    browser.find_element(By.ID, "microphone").click()
    wait(browser, lambda b: status(b).startswith("video: expected a video"))
    browser.get_log("browser")  # the refused upload is an error to the browser too
