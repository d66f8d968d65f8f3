"""What a server gives to strangers, and how it says no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from starlette.exceptions import HTTPException


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds.

    Attributes:
        upload_bytes, upload_seconds: Of a request's body, and for it to arrive.
        uploads: Bodies received at a time.
        speech_seconds: Of a job's speech.
        jobs_running, jobs_waiting: Jobs at a time; more are refused.
        job_seconds: That a job may take once it runs.
        jobs_kept, keep_seconds: Finished videos that are kept, and how long.
        references: Prepared people that are kept; who has not been asked for longest goes first.
        sessions: Live sessions at a time.
        session_seconds: Of a live session.
        quiet_seconds: Between two messages of a client that owes sound or credit.
        queue_seconds: Of sound that a live session takes ahead of the video.
        message_bytes: Of one message of a live session.
        send_seconds: For a client to take a message.
    """

    upload_bytes: int = 200_000_000
    upload_seconds: float = 120.0
    uploads: int = 4
    speech_seconds: float = 600.0
    jobs_running: int = 1
    jobs_waiting: int = 8
    job_seconds: float = 7200.0
    jobs_kept: int = 32
    keep_seconds: float = 3600.0
    references: int = 16
    sessions: int = 4
    session_seconds: float = 3600.0
    quiet_seconds: float = 60.0
    queue_seconds: float = 5.0
    message_bytes: int = 1 << 18
    send_seconds: float = 20.0


def refuse(status: int, sentence: str, *, retry_after: int | None = None) -> NoReturn:
    """Ends a request with one sentence."""
    raise HTTPException(status, sentence, None if retry_after is None else {"Retry-After": str(retry_after)})
