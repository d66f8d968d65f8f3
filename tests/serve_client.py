"""A server in a thread of the test, and what a client of it needs."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avatar_rt import AvatarEngine

SAMPLES = Path(__file__).resolve().parents[1] / "avatar_rt" / "samples"
BOUNDARY = "-" * 20 + "avatar"


@dataclass
class Served:
    """A server's address, and its insides for the tests that look at them."""

    port: int
    app: Any

    @property
    def server(self) -> Any:
        return self.app.state.server

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body), the body parsed if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        told = {k.lower(): v for k, v in answer.getheaders()}
        return answer.status, told, json.loads(data) if "json" in told.get("content-type", "") else data

    def post(self, path: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """A form; bytes and paths are sent as files."""
        return self.request("POST", path, form(fields), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})

    def prepared(self) -> str:
        """The id of the shipped reference."""
        status, _, told = self.post("/v1/references", video=SAMPLES / "reference.mp4")
        assert status == 200, told
        return told["id"]

    def job(self, name: str, seconds: float = 60) -> dict[str, Any]:
        """A job once it is finished."""
        end = time.monotonic() + seconds
        while True:
            status, _, told = self.request("GET", f"/v1/videos/{name}")
            assert status == 200 and time.monotonic() < end, told
            if told["status"] in ("completed", "failed"):
                return told
            time.sleep(0.05)

    @contextmanager
    def live(self, **more: Any) -> Iterator[Any]:
        """A WebSocket."""
        from websockets.sync.client import connect

        with connect(f"ws://127.0.0.1:{self.port}/v1/live", max_size=None, **more) as ws:
            yield ws


def form(fields: dict[str, Any]) -> bytes:
    """multipart/form-data."""
    parts = []
    for name, value in fields.items():
        value = value.read_bytes() if isinstance(value, Path) else value
        file = '; filename="../../etc/passwd"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else str(value).encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@contextmanager
def served(engine: AvatarEngine, limits: Any) -> Iterator[Served]:
    """Serves on a free port while the block lasts."""
    from avatar_rt.serve import make_server

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    port = listening.getsockname()[1]
    server = make_server(engine, limits, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started)
    yield Served(port, server.config.app)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive(), "the server did not stop"


def until(what: Callable[[], Any], seconds: float = 20.0) -> None:
    """Waits until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@dataclass
class Heard:
    """What a live session has sent: its messages in order, and its film."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    film: bytes = b""

    def take(self, ws: Any, stop: Callable[[dict[str, Any]], bool], timeout: float = 30) -> dict[str, Any]:
        """Receives up to a message, with the bytes that belong to it."""
        while True:
            message = json.loads(ws.recv(timeout))
            self.messages.append(message)
            if "bytes" in message:
                data = ws.recv(timeout)
                assert isinstance(data, bytes) and len(data) == message["bytes"]
                self.film += data
            if stop(message):
                return message

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.messages if m["type"] == kind]


def pcm(samples: np.ndarray) -> bytes:
    """16-bit little-endian."""
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def opening(reference: str, **more: Any) -> str:
    return json.dumps({"type": "session.open", "version": 1, "reference_id": reference, "steps": 1} | more)
