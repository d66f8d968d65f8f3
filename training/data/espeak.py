"""espeak-ng (GPL-3.0-or-later) as a separate process: ``python -m training.data.espeak`` answers requests line by line.

The command espeak-ng prints no times of phonemes, its library does; so that the library never shares a process with
anything else, this file is both the program that loads it and the client that starts the program. It needs Debian's
package libespeak-ng1 and is used by the corpus commands only.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from ctypes.util import find_library

import numpy as np

from avatar_rt.errors import UnsupportedError

_SYNCHRONOUS, _IPA_EVENTS = 2, 3  # output mode; phoneme events, written in the international alphabet
_LIST_END, _PHONEME = 0, 7
_RATE, _PITCH, _RANGE = 1, 3, 4


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int), ("unique", ctypes.c_uint), ("position", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("id", _Id),
    ]  # fmt: skip


def serve() -> None:
    """Reads {voice, rate, pitch, range, text} a line; answers {rate, bytes, events} a line, then int16 samples."""
    library = ctypes.CDLL(find_library("espeak-ng") or "libespeak-ng.so.1")
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, None, _IPA_EVENTS)
    sound: list[bytes] = []
    events: list[tuple[int, str]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
    def take(wave, count, event):
        if wave and count > 0:
            sound.append(ctypes.string_at(wave, count * 2))
        index = 0
        while event[index].type != _LIST_END:
            if event[index].type == _PHONEME:
                events.append((event[index].audio_position, event[index].id.string.decode("utf-8", "ignore")))
            index += 1
        return 0

    library.espeak_SetSynthCallback(take)
    for line in sys.stdin:
        if child := os.fork():  # a fresh library every time: its flutter and breath carry over from call to call
            os.waitpid(child, 0)
            continue
        request = json.loads(line)
        library.espeak_SetVoiceByName(request["voice"].encode())
        for parameter, key in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "range")):
            library.espeak_SetParameter(parameter, int(request[key]), 0)
        text = request["text"].encode()
        library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None)
        samples = b"".join(sound)
        header = json.dumps({"rate": rate, "bytes": len(samples), "events": events})
        sys.stdout.buffer.write(header.encode() + b"\n" + samples)
        sys.stdout.buffer.flush()
        os._exit(0)


class Espeak:
    """The client. One child process, started at the first request."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def say(
        self, text: str, voice: str, rate: int, pitch: int, spread: int
    ) -> tuple[np.ndarray, int, list[tuple[int, str]]]:
        """int16 samples, their rate, and (milliseconds, IPA) at each phoneme's beginning.

        Raises UnsupportedError when the library cannot be loaded.
        """
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "training.data.espeak"]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        request = {"voice": voice, "rate": rate, "pitch": pitch, "range": spread, "text": text}
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
            header = json.loads(self._child.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UnsupportedError("espeak-ng could not be started: install Debian's espeak-ng") from None
        samples = np.frombuffer(self._child.stdout.read(header["bytes"]), np.int16)
        return samples, header["rate"], [(int(t), p) for t, p in header["events"]]

    def close(self) -> None:
        if self._child is not None:
            self._child.terminate()
            self._child.wait()
            self._child = None


if __name__ == "__main__":
    serve()
