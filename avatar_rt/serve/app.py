"""The routes: jobs after OpenAI's ``/v1/videos``, prepared references, live sessions, a page, and how it all is."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from avatar_rt.config import SAMPLE_RATE
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import ArtifactError, AvatarError, InputError
from avatar_rt.media.audio import read_audio
from avatar_rt.media.reader import read_image
from avatar_rt.serve.jobs import Job, Jobs, clean
from avatar_rt.serve.limits import Limits, refuse
from avatar_rt.serve.live import Live
from avatar_rt.serve.people import People
from avatar_rt.serve.uploads import Field, Uploads, number

log = logging.getLogger("avatar_rt.serve")
_PAGE_POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; img-src data:; media-src 'self' blob:; frame-ancestors 'none'"
)


class Server:
    """What the routes share: one engine, the people it knows, its jobs and its live sessions."""

    def __init__(self, engine: AvatarEngine, limits: Limits) -> None:
        self.engine, self.limits, self.started = engine, limits, time.time()
        self.uploads, self.people = Uploads(limits), People(engine, limits.references)
        self.jobs = Jobs(engine, self.people, limits)
        self.live: set[Live] = set()
        self.threads = ThreadPoolExecutor(limits.sessions, thread_name_prefix="live")  # one for each session
        self.served = {"requests": 0, "sessions": 0, "chunks": 0, "frames": 0}

    # ---- jobs ------------------------------------------------------------------------------------------------------

    async def create_video(self, request: Request) -> Response:
        """``input_reference`` (a video) or ``reference_id``, ``audio``, and options; answers with the queued job."""
        self.jobs.check_room()
        fields: dict[str, Field] = {
            "input_reference": Path, "audio": Path, "scene": Path, "reference_id": str, "model": str, "prompt": str,
            "seed": number(int, 0, 2**53), "steps": number(int, 1, 1000),
            "seconds": number(float, 0.2, self.limits.speech_seconds),
        }  # fmt: skip
        async with self.uploads.received(request, fields) as (folder, given):
            if "audio" not in given:
                refuse(400, "audio: expected a sound file")
            if ("input_reference" in given) == ("reference_id" in given):
                refuse(400, "form: expected either input_reference, a video, or reference_id")
            if given.pop("model", name := self.engine.config.name) != name:
                refuse(400, f"model: expected {name}")
            reference = None
            if "reference_id" in given:
                reference = self.people.get(given["reference_id"])
                if reference is None:
                    refuse(404, "reference_id: expected the id of a prepared reference, send the video again")
            options = {k: given[k] for k in ("prompt", "seed", "steps", "seconds") if k in given}
            try:
                seconds = await run_in_threadpool(self._speech_seconds, given["audio"])
                if "scene" in given:
                    options["scene"] = await run_in_threadpool(read_image, given["scene"])
            except InputError as e:
                refuse(400, clean(e, folder))
            kept = self.uploads.folder()
            for file in folder.iterdir():
                file.rename(kept / file.name)
            job = Job(kept, min(seconds, options.get("seconds", seconds)), options, reference)
            try:
                self.jobs.add(job)
            except HTTPException:
                shutil.rmtree(kept, ignore_errors=True)
                raise
        return JSONResponse(self.jobs.describe(job))

    def _speech_seconds(self, path: Path) -> float:
        most = self.limits.speech_seconds
        samples = read_audio(path, max_seconds=most + 1).samples
        if len(samples) > most * SAMPLE_RATE:
            raise InputError(f"audio: expected at most {most:g} s of sound, got more")
        return len(samples) / SAMPLE_RATE

    async def list_videos(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.jobs.describe(job) for job in self.jobs.all()]})

    async def get_video(self, request: Request) -> Response:
        return JSONResponse(self.jobs.describe(self.jobs.get(request.path_params["id"])))

    async def get_content(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["id"])
        if job.status != "completed":
            refuse(409, f"video: expected a completed one, this is {job.status}")
        return FileResponse(job.video, media_type="video/mp4", filename=f"{job.id}.mp4")

    async def delete_video(self, request: Request) -> Response:
        name = request.path_params["id"]
        self.jobs.delete(name)
        return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})

    # ---- references ------------------------------------------------------------------------------------------------

    async def create_reference(self, request: Request) -> Response:
        """``video``: prepared before the answer, so that what is wrong with it is said at once."""
        async with self.uploads.received(request, {"video": Path}) as (folder, given):
            if "video" not in given:
                refuse(400, "video: expected a video file")
            try:
                name, reference = await run_in_threadpool(self.people.add, given["video"])
            except InputError as e:
                refuse(400, clean(e, folder))
        return JSONResponse({"id": name, "object": "reference", "frames": len(reference.frames)})

    async def delete_reference(self, request: Request) -> Response:
        name = request.path_params["id"]
        if not self.people.forget(name):
            refuse(404, "reference: expected the id of a prepared reference")
        return JSONResponse({"id": name, "object": "reference.deleted", "deleted": True})

    # ---- live ------------------------------------------------------------------------------------------------------

    async def run_live(self, socket: WebSocket) -> None:
        if (sentence := _foreign(socket)) is not None:
            await socket.send_denial_response(_error(403, sentence))
            return
        if len(self.live) >= self.limits.sessions:
            sentence = f"expected at most {self.limits.sessions} live sessions; try again"
            await socket.send_denial_response(_error(429, sentence, {"Retry-After": "10"}))
            return
        live = Live(socket, self.engine, self.people, self.limits, self.threads)
        self.live.add(live)
        self.served["sessions"] += 1
        try:
            await socket.accept()
            await live.run()
        finally:
            self.live.discard(live)
            self.served["chunks"] += live.chunks_sent
            self.served["frames"] += live.frames_sent

    # ---- the rest --------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.engine.config.name, "device": str(self.engine.device)})

    async def stats(self, request: Request) -> Response:
        return JSONResponse({
            "uptime_seconds": round(time.time() - self.started, 1), "jobs": self.jobs.count(),
            "references": len(self.people), "live_sessions": len(self.live), "uploads": self.uploads.receiving,
            "waiting_for_the_engine": self.engine.turns.waiting, "served": self.served,
        })  # fmt: skip

    async def page(self, request: Request) -> Response:
        return Response(_file("page.html"), media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})

    async def script(self, request: Request) -> Response:
        return Response(_file(request.url.path.rsplit("/", 1)[-1]), media_type="text/javascript")

    def close(self) -> None:
        """Stops the jobs and removes every file."""
        self.jobs.close()
        self.threads.shutdown()
        self.uploads.close()


def create_app(engine: AvatarEngine, limits: Limits | None = None) -> Starlette:
    """The ASGI application over one engine. Its files and threads go with its lifespan."""
    server = Server(engine, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(server.close)

    def route(path: str, **methods: Any) -> list[Route]:
        return [Route(path, handler, methods=[method]) for method, handler in methods.items()]

    routes = [
        *route("/v1/videos", POST=server.create_video, GET=server.list_videos),
        *route("/v1/videos/{id}", GET=server.get_video, DELETE=server.delete_video),
        *route("/v1/videos/{id}/content", GET=server.get_content),
        *route("/v1/references", POST=server.create_reference),
        *route("/v1/references/{id}", DELETE=server.delete_reference),
        WebSocketRoute("/v1/live", server.run_live),
        *route("/health", GET=server.health),
        *route("/v1/stats", GET=server.stats),
        *route("/", GET=server.page),
        *route("/page.js", GET=server.script),
        *route("/microphone.js", GET=server.script),
    ]
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http, AvatarError: _ours, Exception: _any}
    )
    app.state.server = server
    app.add_middleware(_Guard, server=server)
    return app


class _Guard:
    """Counts requests and refuses those that another site's page makes in a visitor's browser."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.server.served["requests"] += 1
            if (sentence := _foreign(HTTPConnection(scope))) is not None:
                await _error(403, sentence)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _foreign(connection: HTTPConnection) -> str | None:
    """Why a request comes from a page that is not ours; None for our own and for anything that is no browser."""
    origin = connection.headers.get("origin")
    if origin is None or urlsplit(origin).netloc == connection.headers.get("host"):
        return None
    return "origin: expected a page of this server"


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return JSONResponse({"error": {"message": sentence, "type": kind, "code": status}}, status, headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = None if error.headers is None else dict(error.headers)
    sentence = error.detail
    if sentence == "Not Found":  # starlette's own words
        sentence = "address: expected one of /v1/videos, /v1/references, /v1/live, /v1/stats, /health and /"
    elif sentence == "Method Not Allowed":
        sentence = f"method: expected {(headers or {}).get('Allow', 'another')}, got {request.method[:20]}"
    return _error(error.status_code, sentence, headers)


async def _ours(request: Request, error: Exception) -> Response:
    return _error(500 if isinstance(error, ArtifactError) else 400, str(error))


async def _any(request: Request, error: Exception) -> Response:
    return _error(500, "the server made a mistake")


def _file(name: str) -> bytes:
    return (resources.files("avatar_rt.serve") / name).read_bytes()
