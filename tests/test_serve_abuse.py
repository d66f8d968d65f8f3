"""Over a hundred requests that nobody should send: each gets its sentence, and the server goes on serving."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clicks, numbered, write_video, write_wav
from serve_client import BOUNDARY, SAMPLES, Heard, Served, form, opening, pcm, served, until

from avatar_rt import AvatarEngine
from avatar_rt.media.audio import read_audio

for package in ("starlette", "uvicorn", "websockets", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[serve]'")
from avatar_rt.serve.limits import Limits  # noqa: E402

UPLOAD = 1_000_000
LIMITS = Limits(upload_bytes=UPLOAD, upload_seconds=2, speech_seconds=8, quiet_seconds=3, message_bytes=50_000)
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
Attack = Callable[[Served], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(AvatarEngine(), LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "no-face.mp4", numbered(25))
    write_wav(folder / "short.wav", clicks(0.05, 16_000), 16_000)
    write_wav(folder / "long.wav", np.zeros(9 * 16_000), 16_000)
    whole = (SAMPLES / "reference.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "play.m3u8").write_bytes(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_bytes(b"la la la\n" * 99)
    (folder / "picture.png").write_bytes(bytes.fromhex("89504e470d0a1a0a") + bytes(99))
    return folder


def asked(status: int, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Attack:
    """A request whose answer has this status, and one sentence."""

    def attack(server: Served) -> None:
        refused(status, server.request(method, path, body, headers))

    return attack


def refused(status: int, answer: tuple[int, dict, Any]) -> None:
    got, _, told = answer
    assert got == status, answer
    sentence = told["error"]["message"]
    assert 10 < len(sentence) < 400 and "\n" not in sentence and "Traceback" not in sentence
    assert "/tmp" not in sentence and "avatar_rt-" not in sentence, "where we keep files is nobody's business"


def job(**fields: Any) -> Attack:
    """A job that is refused at once."""
    good = {"input_reference": b"x", "audio": SAMPLES / "speech.wav"}

    def attack(server: Served) -> None:
        given = {k: v for k, v in (good | fields).items() if v is not None}
        refused(404 if "reference_id" in fields and given.get("input_reference") is None else 400,
                server.post("/v1/videos", **given))  # fmt: skip

    return attack


def raw(data: bytes, *, linger: bool = False) -> Attack:
    """Bytes on a socket, which is closed (or reset) in the middle of whatever they are."""

    def attack(server: Served) -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(data)
            if linger:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return attack


def told(*messages: str | bytes | dict, code: int = 1008, opened: bool = False) -> Attack:
    """A live session in which the last of these messages is one too many: it ends with a sentence and this code."""
    from websockets.exceptions import ConnectionClosed

    def attack(server: Served) -> None:
        heard = Heard()
        with server.live() as ws, pytest.raises(ConnectionClosed) as closed:
            first = [opening(server.prepared(), credit=1)] if opened else []
            for message in [*first, *messages]:
                ws.send(json.dumps(message) if isinstance(message, dict) else message)
            heard.take(ws, lambda m: False)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == code, closed.value
        if code == 1008:
            (error,) = heard.of("error")
            assert 10 < len(error["message"]) < 400 and heard.messages[-1]["type"] == "session.ended"

    return attack


def left(*messages: str | bytes | dict, after: str = "") -> Attack:
    """A live session whose client goes away without a word, at once or after a message of a type."""

    def attack(server: Served) -> None:
        with server.live() as ws:
            for message in [opening(server.prepared(), credit=2), *messages]:
                ws.send(json.dumps(message) if isinstance(message, dict) else message)
            if after:
                Heard().take(ws, lambda m: m["type"] == after)
            ws.socket.shutdown(socket.SHUT_RDWR)

    return attack


def file(field: str, name: str) -> Callable[[Path], Attack]:
    return lambda folder: job(**{field: folder / name})


HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\n"
OPEN = {"type": "session.open", "version": 1, "reference_id": "ref_0"}
SEED = form({"seed": "1"})
SOUND = pcm(np.zeros(16_000))
TRAVERSAL = ("..%2f..%2fetc%2fpasswd", "%00", "x" * 5000, "video_0", "%2e%2e", "..", "a%0d%0ab", "%ff%fe", "*")

ATTACKS: dict[str, Attack] = {
    # addresses and methods
    **{f"id {t[:9]} {i}": asked(404, "GET", f"/v1/videos/{t}") for i, t in enumerate(TRAVERSAL)},
    **{f"content {t[:9]} {i}": asked(404, "GET", f"/v1/videos/{t}/content") for i, t in enumerate(TRAVERSAL)},
    **{f"delete {t[:9]} {i}": asked(404, "DELETE", f"/v1/videos/{t}") for i, t in enumerate(TRAVERSAL[:4])},
    **{f"forget {t[:9]} {i}": asked(404, "DELETE", f"/v1/references/{t}") for i, t in enumerate(TRAVERSAL[:4])},
    **{f"no {p}": asked(404, "GET", p) for p in ("/v2", "/v1", "/page.html", "/serve/app.py", "//etc/passwd")},
    **{f"{m} videos": asked(405, m, "/v1/videos") for m in ("PUT", "PATCH", "DELETE", "BREW")},
    "POST health": asked(405, "POST", "/health", b"{}"),
    "live without a WebSocket": asked(404, "GET", "/v1/live"),
    "another site": asked(403, "POST", "/v1/videos", b"", {"Origin": "http://evil.example"}),
    "null origin": asked(403, "DELETE", "/v1/videos/video_0", None, {"Origin": "null"}),
    # bodies
    "no body": asked(415, "POST", "/v1/videos"),
    "json": asked(415, "POST", "/v1/videos", b'{"a": 1}', {"Content-Type": "application/json"}),
    "url encoded": asked(415, "POST", "/v1/videos", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}),
    "no boundary": asked(400, "POST", "/v1/videos", b"x", {"Content-Type": "multipart/form-data"}),
    "garbage for a form": asked(400, "POST", "/v1/videos", b"\x00\xff" * 500, MULTIPART),
    "another boundary": asked(400, "POST", "/v1/videos", b"--other\r\n\r\n", MULTIPART),
    "half a form": asked(400, "POST", "/v1/videos", form({"audio": b"x" * 999})[:500], MULTIPART),
    "an empty form": asked(400, "POST", "/v1/videos", form({}), MULTIPART),
    "an empty form of a person": asked(400, "POST", "/v1/references", form({}), MULTIPART),
    "no name": asked(400, "POST", "/v1/videos", f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), MULTIPART),
    "too many fields": asked(400, "POST", "/v1/videos", form({f"f{i}": "x" for i in range(50)}), MULTIPART),
    "twice": asked(400, "POST", "/v1/videos", SEED.removesuffix(f"--{BOUNDARY}--\r\n".encode()) + SEED, MULTIPART),
    "too large": asked(413, "POST", "/v1/videos", form({"audio": bytes(UPLOAD)}), MULTIPART),
    "too large a person": asked(413, "POST", "/v1/references", form({"video": bytes(UPLOAD)}), MULTIPART),
    "said to be huge": asked(413, "POST", "/v1/videos", b"", MULTIPART | {"Content-Length": "999999999999"}),
    # fields
    **{f"seed {v}": job(seed=v) for v in ("x", "-1", "1e5", "9" * 30, "", "NaN", "9" * 4001)},
    **{f"steps {v}": job(steps=v) for v in ("0", "-3", "1.5", "100000")},
    **{f"seconds {v}": job(seconds=v) for v in ("nan", "inf", "0", "-1", "1e9", "ten")},
    "unknown field": job(colour="red"),
    "unknown model": job(model="other"),
    "a long prompt": job(prompt="x" * 5000),
    "a file for a text": job(seed=b"7"),
    "a text for a file": job(audio="speech.wav"),
    "no sound": job(audio=None),
    "no person": job(input_reference=None),
    "two people": job(reference_id="ref_0"),
    "an unknown person": job(input_reference=None, reference_id="../../etc/passwd"),
    # connections
    "nothing": raw(b""),
    "noise": raw(np.random.default_rng(1).bytes(3000)),
    "TLS": raw(bytes.fromhex("1603010200010001fc0303") + bytes(200)),
    "half a request line": raw(b"GET /v1/vid"),
    "endless headers": raw(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000),
    "headers and no body": raw(HEAD + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000\r\n\r\n"),
    "body breaks off": raw(
        HEAD + f"Content-Type: {MULTIPART['Content-Type']}\r\nContent-Length: 900000\r\n\r\n".encode()
        + form({"audio": bytes(5000)})[:3000], linger=True),
    "bad chunks": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n"),
    "two lengths": raw(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "half a handshake": raw(b"GET /v1/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
    "reset at once": raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", linger=True),
    # live sessions: the first message
    "not json": told("{"),
    "an array": told("[1, 2]"),
    "deep": told("[" * 20_000),
    "no type": told({}),
    "type of another kind": told({"type": 5}),
    "unknown type": told({"type": "session.destroy"}),
    "bytes first": told(SOUND),
    "credit first": told({"type": "credit", "chunks": 1}),
    "end first": told({"type": "audio.end"}),
    "no reference": told({"type": "session.open", "version": 1}),
    "unknown reference": told(OPEN),
    **{f"open {k} {v}": told(OPEN | {k: v}) for k, v in (
        ("version", 2), ("version", "1"), ("reference_id", 5), ("sample_rate", 7), ("sample_rate", 44_101),
        ("sample_rate", True), ("seed", -1), ("seed", 10**30), ("steps", 0), ("steps", 1.5), ("idle_after", -1),
        ("idle_after", float("nan")), ("idle_after", float("inf")), ("credit", 0), ("normalise", "yes"), ("more", 1),
    )},
    # and what comes after it
    "open twice": told(OPEN, opened=True),
    "credit of nothing": told({"type": "credit", "chunks": 0}, opened=True),
    "credit of a word": told({"type": "credit", "chunks": "many"}, opened=True),
    "credit without number": told({"type": "credit"}, opened=True),
    "not json later": told("sound!", opened=True),
    "odd bytes": told(SOUND + b"x", opened=True),
    "sound after the end": told(SOUND, {"type": "audio.end"}, SOUND, opened=True),
    "nothing for too long": told(opened=True),
    "no credit for too long": told(SOUND, SOUND, SOUND, SOUND, opened=True),
    "a prompt for a model without text": told(OPEN | {"reference_id": "ref_0", "prompt": "x" * 4000}),
    "too large a message": told("x" * 60_000, code=1009),
    "too large a sound": told(bytes(60_000), opened=True, code=1009),
    "gone at once": left(),
    "gone in the first chunk": left(SOUND, SOUND, after="media_init"),
    "gone after the first chunk": left(SOUND, SOUND, after="chunk"),
    "gone while it idles": left({"type": "interrupt"}, after="interrupted"),
}  # fmt: skip
FILES: dict[str, Callable[[Path], Attack]] = {
    f"{field} {name}": file(field, name)
    for field, names in (
        ("audio", ("no-face.mp4", "short.wav", "long.wav", "play.m3u8", "noise", "empty", "text", "picture.png")),
        ("scene", ("play.m3u8", "noise", "empty", "text", "picture.png")),
    )
    for name in names
}
PEOPLE = ("no-face.mp4", "short.wav", "cut.mp4", "play.m3u8", "noise", "empty", "text", "picture.png")


def test_the_list_is_long_enough() -> None:
    assert len(ATTACKS) + len(FILES) + len(PEOPLE) >= 100


def test_each_is_refused_and_the_server_goes_on(server: Served, files: Path) -> None:
    """All in one server, one after the other; then everything works, and nothing of it is left."""
    server.prepared()
    kept = len(list(server.server.uploads.root.iterdir()))
    wrong = []
    people = {f"person {name}": asked_person(files / name) for name in PEOPLE}
    for name, attack in {**ATTACKS, **{k: make(files) for k, make in FILES.items()}, **people}.items():
        try:
            attack(server)
        except Exception as e:
            wrong.append(f"{name}: {type(e).__name__} {str(e)[:300]}")
    assert not wrong, "\n".join(wrong)
    works(server)
    until(lambda: not server.server.live)
    until(lambda: len(list(server.server.uploads.root.iterdir())) <= kept + 1, 10)  # the good job's video
    assert not [t for t in threading.enumerate() if t.name == "denoise"]


def asked_person(path: Path) -> Attack:
    return lambda server: refused(400, server.post("/v1/references", video=path))


def works(server: Served) -> None:
    """A job and a live session come to a good end."""
    name = server.prepared()
    status, _, job = server.post(
        "/v1/videos", reference_id=name, audio=SAMPLES / "speech.wav", seconds="0.5", steps="1"
    )
    assert status == 200 and server.job(job["id"])["status"] == "completed"
    heard = Heard()
    with server.live() as ws:
        ws.send(opening(name, credit=10))
        for piece in np.split(read_audio(SAMPLES / "speech.wav").samples[:16_000], 10):
            ws.send(pcm(piece))
        ws.send(json.dumps({"type": "audio.end"}))
        assert heard.take(ws, lambda m: m["type"] == "session.ended")["reason"] == "complete"
    assert sum(c["frames"] for c in heard.of("chunk")) == 25


def test_a_body_that_never_comes_is_given_up(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(HEAD + f"Content-Type: {MULTIPART['Content-Type']}\r\nContent-Length: 900\r\n\r\n".encode())
        answer = connection.recv(4000)
    assert answer.startswith(b"HTTP/1.1 408") and server.server.uploads.receiving == 0


def test_a_body_without_a_length_is_counted(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            HEAD + f"Content-Type: {MULTIPART['Content-Type']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        start = form({"audio": b"x"}).split(b"\r\nx\r\n")[0] + b"\r\n"
        connection.sendall(f"{len(start):x}\r\n".encode() + start + b"\r\n")
        try:
            for _ in range(UPLOAD // 50_000 + 2):
                connection.sendall(b"c350\r\n" + bytes(50_000) + b"\r\n")
            answer = connection.recv(4000)
        except ConnectionError:  # the answer came before we were done
            answer = b"HTTP/1.1 413"
    assert answer.startswith(b"HTTP/1.1 413"), answer
    until(lambda: server.server.uploads.receiving == 0)


def test_at_the_same_time(server: Served) -> None:
    """The rude and the polite together: the polite are served."""
    rude = [ATTACKS[k] for k in ("garbage for a form", "noise", "bytes first", "not json", "gone at once")] * 4
    wrong: list[BaseException] = []

    def run(attack: Attack) -> None:
        try:
            attack(server)
        except BaseException as e:  # a session beyond the limit is a fair answer
            if "429" not in str(e):
                wrong.append(e)

    threads = [threading.Thread(target=run, args=(attack,)) for attack in rude]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    until(lambda: not server.server.live)
    works(server)
    assert not wrong
