"""Videos made in the background: asked for, watched, fetched, deleted."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import AvatarError
from avatar_rt.serve.limits import Limits, refuse
from avatar_rt.serve.people import People
from avatar_rt.session import Reference

log = logging.getLogger("avatar_rt.serve")
UNFINISHED = ("queued", "in_progress")


class _Stop(Exception):
    """Ends a job from within."""


@dataclass
class Job:
    """One video. ``options`` are those of ``AvatarEngine.generate``."""

    folder: Path
    seconds: float
    options: dict[str, Any]
    reference: Reference | None
    id: str = field(default_factory=lambda: "video_" + secrets.token_hex(16))
    status: str = "queued"
    progress: int = 0
    created: float = field(default_factory=time.time)
    completed: float | None = None
    error: str | None = None
    deleted: bool = False

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"


class Jobs:
    """Runs jobs in the order they came; a job takes its turns with the live sessions, chunk by chunk."""

    def __init__(self, engine: AvatarEngine, people: People, limits: Limits) -> None:
        self.engine, self.people, self.limits = engine, people, limits
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._pool = ThreadPoolExecutor(limits.jobs_running, thread_name_prefix="job")

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as the API shows it: OpenAI's video object."""
        scale, cfg = self.engine.config.output_scale, self.engine.config
        expires = None if job.completed is None else int(job.completed + self.limits.keep_seconds)
        return {
            "id": job.id, "object": "video", "model": cfg.name, "status": job.status, "progress": job.progress,
            "created_at": int(job.created), "completed_at": job.completed and int(job.completed),
            "expires_at": expires, "seconds": f"{job.seconds:.2f}", "size": f"{cfg.width * scale}x{cfg.height * scale}",
            "error": None if job.error is None else {"code": "generation_failed", "message": job.error},
        }  # fmt: skip

    def count(self) -> dict[str, int]:
        """Jobs by status."""
        found = [job.status for job in self.all()]
        return {status: found.count(status) for status in ("queued", "in_progress", "completed", "failed")}

    def check_room(self) -> None:
        """Refuses when as many jobs as there may be are not finished."""
        waiting = sum(job.status in UNFINISHED for job in self.all())
        if waiting >= self.limits.jobs_running + self.limits.jobs_waiting:
            refuse(429, f"expected at most {waiting} jobs that are not finished; try again", retry_after=10)

    def add(self, job: Job) -> None:
        """Takes a job over with its folder. Refuses, and takes nothing, when there are too many."""
        with self._lock:
            self._sweep()
            self.check_room()
            self._jobs[job.id] = job
        self._pool.submit(self._run, job)

    def get(self, name: str) -> Job:
        """Refuses an unknown id."""
        with self._lock:
            self._sweep()
            job = self._jobs.get(name)
        if job is None:
            refuse(404, "video: expected the id of a video that is here, got another or one that has expired")
        return job

    def all(self) -> list[Job]:
        """Newest first."""
        return sorted(self._jobs.copy().values(), key=lambda job: -job.created)

    def delete(self, name: str) -> None:
        """Stops a job if it runs and removes what there is of it."""
        job = self.get(name)
        with self._lock:
            self._drop(job)

    def close(self) -> None:
        """Stops everything, within a chunk."""
        for job in self.all():
            job.deleted = True
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> None:
        started = time.monotonic()

        def progress(done: int, total: int) -> None:
            job.progress = min(int(100 * done / max(total, 1)), 99)
            if job.deleted:
                raise _Stop
            if time.monotonic() - started > self.limits.job_seconds:
                raise _Stop(f"the video was not finished within {self.limits.job_seconds:g} s")

        try:
            progress(0, 1)
            job.status = "in_progress"
            reference = job.reference or self.people.add(job.folder / "input_reference")[1]
            self.engine.generate(reference, job.folder / "audio", job.video, progress=progress, **job.options)
            job.progress, job.completed, job.status = 100, time.time(), "completed"
        except (AvatarError, _Stop) as e:
            self._fail(job, clean(e, job.folder))
        except Exception:
            log.exception("job %s", job.id)
            self._fail(job, "the server made a mistake")
        finally:
            job.reference = None
            for file in job.folder.glob("*") if job.status == "completed" else ():
                if file != job.video:
                    file.unlink()
            if job.deleted or job.status != "completed":
                shutil.rmtree(job.folder, ignore_errors=True)

    @staticmethod
    def _fail(job: Job, sentence: str) -> None:
        job.error, job.completed, job.status = sentence, time.time(), "failed"

    def _sweep(self) -> None:
        """Finished jobs go when their time is over, and the oldest when there are too many."""
        finished = sorted((j for j in self._jobs.values() if j.status not in UNFINISHED), key=lambda j: j.created)
        over = len(finished) - self.limits.jobs_kept
        for i, job in enumerate(finished):
            if i < over or time.time() > (job.completed or 0) + self.limits.keep_seconds:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        job.deleted = True
        self._jobs.pop(job.id, None)
        if job.status != "in_progress":  # a job that runs removes its own files
            shutil.rmtree(job.folder, ignore_errors=True)


def clean(error: Exception, folder: Path) -> str:
    """An error's sentence without the place where we keep files."""
    return str(error).replace(f"{folder}/", "")
