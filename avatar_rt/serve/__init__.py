"""The server: ``avatar-rt serve``. Needs the ``serve`` extra, which is imported here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avatar_rt.errors import UnsupportedError

if TYPE_CHECKING:
    import uvicorn

    from avatar_rt.engine import AvatarEngine
    from avatar_rt.serve.limits import Limits


def make_server(engine: AvatarEngine, limits: Limits, host: str, port: int) -> uvicorn.Server:
    """A server that has not started; its ``run()`` serves until it is told to stop.

    Raises: UnsupportedError without the packages of the ``serve`` extra.
    """
    try:
        import multipart  # noqa: F401
        import uvicorn
        import websockets  # noqa: F401

        from avatar_rt.serve.app import create_app
    except ImportError as e:
        raise UnsupportedError(f"serve: {e.name} is not installed: pip install 'avatar-rt[serve]'") from None
    config = uvicorn.Config(
        create_app(engine, limits), host=host, port=port, log_level="warning", ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False, limit_concurrency=256, timeout_keep_alive=5, timeout_graceful_shutdown=5,
        server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)
