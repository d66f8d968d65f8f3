"""Multipart requests to files in a private folder that goes when the request is done with."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from avatar_rt.serve.limits import Limits, refuse

_TEXT_BYTES = 4096  # of a field that is no file
Field = Callable[[str], Any] | type[Path]


class Uploads:
    """Receives forms, ``limits.uploads`` at a time. Files get our names, never the client's."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.root = Path(tempfile.mkdtemp(prefix="avatar_rt-"))  # readable by its owner only
        self.receiving = 0

    def close(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.root, ignore_errors=True)

    def folder(self) -> Path:
        """A new private folder, its owner's to remove."""
        return Path(tempfile.mkdtemp(dir=self.root))

    @asynccontextmanager
    async def received(self, request: Request, fields: Mapping[str, Field]) -> AsyncIterator[tuple[Path, dict]]:
        """The folder with a request's files, and its values; the folder goes with the block unless it was moved away.

        Args:
            fields: Name -> ``Path`` for a file, else what reads the text (raising ValueError on what it cannot read).
        """
        if self.receiving >= self.limits.uploads:
            refuse(429, f"expected at most {self.limits.uploads} uploads at a time; try again", retry_after=5)
        self.receiving += 1
        folder = self.folder()
        try:
            values = await self._receive(request, fields, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.receiving -= 1
        try:
            yield folder, values
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _receive(self, request: Request, fields: Mapping[str, Field], folder: Path) -> dict[str, Any]:
        kind = request.headers.get("content-type", "none").split(";")[0].strip()
        if kind != "multipart/form-data":
            refuse(415, f"content type: expected multipart/form-data, got {kind[:80]}")
        most = self.limits.upload_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            refuse(413, f"body: expected at most {most} bytes, got {length[:20]}")
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                counted = Request(request.scope, _counted(request, most))
                async with counted.form(max_files=4, max_fields=16, max_part_size=_TEXT_BYTES) as form:
                    return await run_in_threadpool(_read_form, form.multi_items(), fields, folder)
        except ClientDisconnect:
            refuse(400, "body: expected all of it, but the client went away")
        except TimeoutError:
            refuse(408, f"body: expected it within {self.limits.upload_seconds:g} s")


def _counted(request: Request, most: int) -> Callable[[], Any]:
    """The request's channel, which refuses once ``most`` bytes have come."""
    total = 0

    async def receive() -> Any:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > most:
            refuse(413, f"body: expected at most {most} bytes, got more")
        return message

    return receive


def _read_form(items: list[tuple[str, UploadFile | str]], fields: Mapping[str, Field], folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, given in items:
        if name not in fields:
            refuse(400, f"form: expected fields among {', '.join(fields)}, got {name[:80]!r}")
        if name in values:
            refuse(400, f"{name}: expected it once, got it twice")
        wants_file = fields[name] is Path
        if wants_file != isinstance(given, UploadFile):
            refuse(400, f"{name}: expected {'a file' if wants_file else 'a text field'}")
        if isinstance(given, UploadFile):
            values[name] = folder / name
            with values[name].open("wb") as file:
                shutil.copyfileobj(given.file, file)
        else:
            try:
                values[name] = fields[name](given)
            except ValueError as e:
                refuse(400, f"{name}: expected {e or 'another value'}, got {given[:80]!r}")
    return values


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Reads a number of a range."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise ValueError(f"{'a whole number' if kind is int else 'a number'} from {least:g} to {most:g}")
        return value

    return read
