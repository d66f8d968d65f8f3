"""The server: jobs from the upload to the deletion, live sessions, limits, many at a time."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from serve_client import SAMPLES, Heard, Served, opening, pcm, served, until

from avatar_rt import AvatarEngine
from avatar_rt.config import SAMPLE_RATE
from avatar_rt.media.audio import read_audio

for package in ("starlette", "uvicorn", "websockets", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[serve]'")
from avatar_rt.serve.limits import Limits  # noqa: E402

LIMITS = Limits(upload_bytes=2_000_000, speech_seconds=8, jobs_waiting=1, sessions=2, queue_seconds=3, quiet_seconds=20)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(AvatarEngine(), LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_audio(SAMPLES / "speech.wav").samples


def decoded(film: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(film)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


# ---- jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_from_the_upload_to_the_deletion(server: Served) -> None:
    status, _, job = server.post(
        "/v1/videos", input_reference=SAMPLES / "reference.mp4", audio=SAMPLES / "speech.wav", seconds="1", steps="1",
        seed="3", model="tiny",
    )  # fmt: skip
    assert status == 200 and job["object"] == "video" and job["id"].startswith("video_"), job
    assert job["status"] in ("queued", "in_progress") and job["size"] == "256x256" and job["seconds"] == "1.00"
    done = server.job(job["id"])
    assert done["status"] == "completed" and done["progress"] == 100 and done["error"] is None
    assert done["expires_at"] > done["completed_at"] >= done["created_at"]
    assert job["id"] in [j["id"] for j in server.request("GET", "/v1/videos")[2]["data"]]
    status, headers, film = server.request("GET", f"/v1/videos/{job['id']}/content")
    assert status == 200 and headers["content-type"] == "video/mp4" and len(decoded(film)) == 25
    left = [f.name for f in server.server.uploads.root.rglob("*") if f.is_file()]
    assert left == ["video.mp4"]  # nothing of the uploads stays
    assert oct(server.server.uploads.root.stat().st_mode)[-3:] == "700"
    assert server.request("DELETE", f"/v1/videos/{job['id']}")[2] == {
        "id": job["id"], "object": "video.deleted", "deleted": True,
    }  # fmt: skip
    assert server.request("GET", f"/v1/videos/{job['id']}")[0] == 404
    assert not list(server.server.uploads.root.iterdir())


def test_a_prepared_person_gives_the_same_video(server: Served, tmp_path: Path) -> None:
    """By id, by upload, and by the engine itself."""
    name = server.prepared()
    assert server.prepared() == name
    films = []
    for who in ({"reference_id": name}, {"input_reference": SAMPLES / "reference.mp4"}):
        status, _, job = server.post("/v1/videos", audio=SAMPLES / "speech.wav", seconds="1", steps="1", **who)
        assert status == 200, job
        server.job(job["id"])
        films.append(server.request("GET", f"/v1/videos/{job['id']}/content")[2])
    assert len(server.server.people) == 1
    engine = server.server.engine
    own = engine.generate(SAMPLES / "reference.mp4", SAMPLES / "speech.wav", tmp_path / "o.mp4", seconds=1, steps=1)
    assert films[0] == films[1] == own.read_bytes()


def test_a_job_that_cannot_be_done_says_why(server: Served) -> None:
    status, _, job = server.post("/v1/videos", input_reference=b"no video", audio=SAMPLES / "speech.wav")
    assert status == 200
    failed = server.job(job["id"])
    assert failed["status"] == "failed" and failed["progress"] == 0
    assert failed["error"]["message"].startswith("input_reference: expected a video"), failed["error"]
    status, _, told = server.request("GET", f"/v1/videos/{job['id']}/content")
    assert status == 409 and "this is failed" in told["error"]["message"]


def test_jobs_beyond_the_limit_are_told_to_come_back(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go, name = threading.Event(), server.prepared()
    generate, root = server.server.engine.generate, server.server.uploads.root
    before = len(list(root.iterdir()))

    def held(*given, **options):
        assert go.wait(20)
        return generate(*given, **options)

    monkeypatch.setattr(server.server.engine, "generate", held)
    ask = {"reference_id": name, "audio": SAMPLES / "speech.wav", "seconds": "0.5", "steps": "1"}
    jobs = [server.post("/v1/videos", **ask)[2]["id"] for _ in range(2)]  # one runs, one waits
    status, headers, told = server.post("/v1/videos", **ask)
    assert status == 429 and int(headers["retry-after"]) > 0 and told["error"]["type"] == "rate_limit_error"
    until(lambda: server.request("GET", f"/v1/videos/{jobs[0]}")[2]["status"] == "in_progress")
    for job in jobs:
        assert server.request("DELETE", f"/v1/videos/{job}")[0] == 200
    go.set()
    until(lambda: len(list(root.iterdir())) == before)
    assert server.job(server.post("/v1/videos", **ask)[2]["id"])["status"] == "completed"


def test_what_is_too_long_is_refused(server: Served, speech: np.ndarray) -> None:
    from media_files import write_wav

    root = server.server.uploads.root
    long = write_wav(root / "long.wav", np.zeros(9 * SAMPLE_RATE), SAMPLE_RATE)
    status, _, told = server.post("/v1/videos", input_reference=b"x", audio=long)
    long.unlink()
    assert status == 400 and told["error"]["message"] == "audio: expected at most 8 s of sound, got more"


# ---- live sessions -------------------------------------------------------------------------------------------------


def test_a_live_session_sends_the_video_of_the_file(server: Served, speech: np.ndarray) -> None:
    name, heard = server.prepared(), Heard()
    speech = speech[: 3 * SAMPLE_RATE]
    with server.live() as ws:
        ws.send(opening(name, normalise=False, credit=100))
        opened = heard.take(ws, lambda m: m["type"] == "session.opened")
        assert opened["version"] == 1 and opened["audio_limit"] == 3 * SAMPLE_RATE
        data = pcm(speech)
        for at in range(0, len(data), 640):
            ws.send(data[at : at + 640])
        ws.send(json.dumps({"type": "audio.end"}))
        end = heard.take(ws, lambda m: m["type"] == "session.ended")
    assert end["reason"] == "complete" and len({m["session_id"] for m in heard.messages}) == 1
    (init,) = heard.of("media_init")
    assert init["mime"].startswith("video/mp4")
    chunks = heard.of("chunk")
    assert [c["chunk_index"] for c in chunks] == list(range(len(chunks)))
    assert [c["start_frame"] for c in chunks][:3] == [0, 29, 53] and sum(c["frames"] for c in chunks) == 75
    assert all(c["generation_id"] == 0 for c in chunks) and chunks[0]["seconds"]["denoise"] > 0
    frames = decoded(heard.film)
    engine = server.server.engine
    session = engine.session(server.server.people.get(name), steps=1)
    session.push_audio(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
    session.end_audio()
    expected = np.concatenate(list(session.frames()))
    assert len(frames) == len(expected) == 75
    assert np.abs(np.array(frames).astype(int) - expected).mean() < 4  # the same, as far as h264 goes
    with av.open(io.BytesIO(heard.film)) as container:
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    n = min(len(wave), len(speech))
    assert np.corrcoef(wave[4000:n], speech[4000:n])[0, 1] > 0.95


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_sound_of_any_rate(server: Served, rate: int) -> None:
    name, heard = server.prepared(), Heard()
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(2 * rate) / rate)
    with server.live() as ws:
        ws.send(opening(name, sample_rate=rate, credit=100))
        ws.send(pcm(tone))
        ws.send(json.dumps({"type": "audio.end"}))
        heard.take(ws, lambda m: m["type"] == "session.ended")
    assert sum(c["frames"] for c in heard.of("chunk")) == 50
    with av.open(io.BytesIO(heard.film)) as container:
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    spectrum = np.abs(np.fft.rfft(wave[4000:20_000]))
    assert abs(spectrum.argmax() - 300) <= 1 and np.abs(wave[4000:20_000]).max() == pytest.approx(0.3, abs=0.05)


def test_without_credit_nothing_is_sent_or_made(server: Served, speech: np.ndarray) -> None:
    name, heard = server.prepared(), Heard()
    with server.live() as ws:
        ws.send(opening(name, credit=1))
        ws.send(pcm(speech[: 3 * SAMPLE_RATE - 1]))
        heard.take(ws, lambda m: m["type"] == "chunk")
        with pytest.raises(TimeoutError):
            ws.recv(0.7)
        ws.send(json.dumps({"type": "credit", "chunks": 1}))
        heard.take(ws, lambda m: m["type"] == "chunk")
        assert [c["chunk_index"] for c in heard.of("chunk")] == [0, 1]
        limit = heard.messages[-1]["audio_limit"]
        ws.send(bytes(2 * 6 * SAMPLE_RATE)[: 2 * (limit - 3 * SAMPLE_RATE + 1)])  # just as much as there is room for
        ws.send(bytes(640))
        full = heard.take(ws, lambda m: m["type"] == "error")
        assert full["code"] == "audio_full"  # said, dropped, and the session goes on
        ws.send(json.dumps({"type": "credit", "chunks": 1}))
        heard.take(ws, lambda m: m["type"] == "chunk")


def test_barge_in_and_cancel(server: Served, speech: np.ndarray) -> None:
    name, heard = server.prepared(), Heard()
    with server.live() as ws:
        ws.send(opening(name, credit=1))
        ws.send(pcm(speech[: 3 * SAMPLE_RATE - 1]))
        heard.take(ws, lambda m: m["type"] == "chunk")
        ws.send(json.dumps({"type": "interrupt"}))
        told = heard.take(ws, lambda m: m["type"] == "interrupted")
        assert told["generation_id"] == 1
        assert told["audio_limit"] == 3 * SAMPLE_RATE - 1 + 3 * SAMPLE_RATE  # the queue is empty again
        ws.send(pcm(speech[: 2 * SAMPLE_RATE]))
        ws.send(json.dumps({"type": "credit", "chunks": 1}))
        chunk = heard.take(ws, lambda m: m["type"] == "chunk")
        assert (chunk["generation_id"], chunk["start_frame"]) == (1, 29)  # nothing of the dropped sound is in it
        ws.send(json.dumps({"type": "session.cancel"}))
        assert heard.take(ws, lambda m: m["type"] == "session.ended")["reason"] == "cancelled"
    until(lambda: not server.server.live)


def test_the_face_idles_until_somebody_speaks(server: Served, speech: np.ndarray) -> None:
    name, heard = server.prepared(), Heard()
    with server.live() as ws:
        ws.send(opening(name, idle_after=0.05, credit=2))
        for _ in range(2):
            heard.take(ws, lambda m: m["type"] == "chunk")
        ws.send(pcm(speech[: 2 * SAMPLE_RATE]))
        ws.send(json.dumps({"type": "audio.end"}))
        ws.send(json.dumps({"type": "credit", "chunks": 10}))
        heard.take(ws, lambda m: m["type"] == "session.ended")
    assert sum(c["frames"] for c in heard.of("chunk")) == 53 + 50


def test_sessions_share_the_engine_and_too_many_are_refused(server: Served, speech: np.ndarray) -> None:
    from websockets.exceptions import InvalidStatus

    name = server.prepared()
    heard: list[Heard] = [Heard(), Heard()]
    with server.live() as a, server.live() as b:
        for ws in (a, b):
            ws.send(opening(name, credit=100))
        for each, ws in zip(heard, (a, b)):
            each.take(ws, lambda m: m["type"] == "media_init")
        with pytest.raises(InvalidStatus) as refused, server.live():
            pass
        answer = refused.value.response
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "10"
        assert "live sessions" in json.loads(answer.body)["error"]["message"]
        for ws in (a, b):
            ws.send(pcm(speech[: 2 * SAMPLE_RATE]))
            ws.send(json.dumps({"type": "audio.end"}))
        for each, ws in zip(heard, (a, b)):
            each.take(ws, lambda m: m["type"] == "session.ended")
    assert [sum(c["frames"] for c in h.of("chunk")) for h in heard] == [50, 50]
    assert heard[0].film == heard[1].film  # the same question, the same answer
    until(lambda: not server.server.live)


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_health_stats_and_page(server: Served) -> None:
    status, _, told = server.request("GET", "/health")
    assert status == 200 and told == {"status": "ok", "model": "tiny", "device": "cpu"}
    before = server.request("GET", "/v1/stats")[2]
    after = server.request("GET", "/v1/stats")[2]
    assert after["served"]["requests"] == before["served"]["requests"] + 1
    assert set(after["jobs"]) == {"queued", "in_progress", "completed", "failed"}
    status, headers, page = server.request("GET", "/")
    assert status == 200 and b"<video" in page and "default-src 'self'" in headers["content-security-policy"]
    assert b"http://" not in page and b"https://" not in page  # nothing from elsewhere
    for name in ("page.js", "microphone.js"):
        status, headers, script = server.request("GET", f"/{name}")
        assert status == 200 and "javascript" in headers["content-type"] and b"https://" not in script


def test_another_sites_page_is_refused(server: Served) -> None:
    from websockets.exceptions import InvalidStatus

    status, _, told = server.request("GET", "/health", headers={"Origin": "https://elsewhere.example"})
    assert status == 403 and told["error"]["message"] == "origin: expected a page of this server"
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.request("GET", "/health", headers=own)[0] == 200
    with pytest.raises(InvalidStatus) as refused, server.live(origin="https://elsewhere.example"):
        pass
    assert refused.value.response.status_code == 403


def test_references_go_when_asked_and_when_there_are_too_many(server: Served) -> None:
    from avatar_rt.serve.people import People

    name = server.prepared()
    assert server.request("DELETE", f"/v1/references/{name}")[0] == 200
    assert server.request("DELETE", f"/v1/references/{name}")[0] == 404
    status, _, told = server.post("/v1/videos", reference_id=name, audio=SAMPLES / "speech.wav")
    assert status == 404 and "send the video again" in told["error"]["message"]

    class Engine:
        turns = server.server.engine.turns
        prepare = staticmethod(lambda path: path.name)

    people, folder = People(Engine(), 2), server.server.uploads.folder()  # type: ignore[arg-type]
    names = []
    for i in range(3):
        (folder / str(i)).write_bytes(bytes([i]))
        names.append(people.add(folder / str(i))[0])
        people.get(names[0])
    assert [people.get(n) for n in names] == ["0", None, "2"] and len(people) == 2
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
