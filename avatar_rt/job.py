"""A video written to a file chunk by chunk, which goes on where it was stopped: killed, interrupted, out of disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avatar_rt.config import FPS, SAMPLES_PER_FRAME
from avatar_rt.errors import ArtifactError, InputError, UnsupportedError
from avatar_rt.media.growing import GrowingVideo, Mark, OutputStopped, to_plain_file
from avatar_rt.media.stream import SpeechFile
from avatar_rt.media.writer import publish
from avatar_rt.pipeline.denoise import ChunkState
from avatar_rt.runtime.artifact import read_artifact, write_artifact
from avatar_rt.runtime.trace import stage
from avatar_rt.session import Session, SessionState

KIND, FORMAT = "resume", 1


def part_of(output: Path) -> Path:
    """The file that grows while a video is made."""
    return output.with_name(output.name + ".part")


def resume_of(output: Path) -> Path:
    """The file that says how to go on with it."""
    return output.with_name(output.name + ".resume")


def discard(output: Path) -> None:
    """Removes what an unfinished run left; the record first, so that there is never one without its video."""
    resume_of(output).unlink(missing_ok=True)
    part_of(output).unlink(missing_ok=True)


def kept_frames(output: Path) -> int:
    """Frames of an unfinished run that are on the disk; 0 when there is none, or none that can be gone on with."""
    try:
        return _read(output)[1].frames
    except (InputError, ArtifactError):
        return 0


def write_video(
    session: Session,
    speech: SpeechFile,
    output: Path,
    size: tuple[int, int],
    facts: Mapping[str, Any],
    *,
    resume: bool,
    fragmented: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Runs a session over a speech file.

    Until it is done the video grows in OUTPUT.part, playable, and OUTPUT.resume is renewed after every chunk. Nothing
    of it is left when the input or the options turn out to be wrong. Whatever else stops it leaves both.

    Args:
        size: (height, width) of the frames.
        facts: All that the frames follow from, by name: a run goes on only with the same.
        resume: Go on with what is there; from the start when nothing is.
        fragmented: Leave the file as it grew instead of making an ordinary one of it.
        progress: Called with (frames written, frames in all).

    Raises: InputError when something is there and ``resume`` is not wanted, or when it was made of other facts.
    """
    facts = {**facts, "format": FORMAT}
    state, mark = SessionState(), None
    if resume_of(output).exists():
        if not resume:
            raise InputError(
                f"{resume_of(output)}: an unfinished run lies there; go on with it (--resume), or remove this file"
            )
        state, mark = _open(output, facts)
    try:
        _run(session, speech, output, size, facts, state, mark, progress)
        if fragmented:
            publish(part_of(output), output)
        else:
            to_plain_file(part_of(output), output)
    except (InputError, UnsupportedError, ArtifactError) as e:
        if not isinstance(e, OutputStopped):
            discard(output)
        raise
    discard(output)


def _run(
    session: Session,
    speech: SpeechFile,
    output: Path,
    size: tuple[int, int],
    facts: Mapping[str, Any],
    state: SessionState,
    mark: Mark | None,
    progress: Callable[[int, int], None],
) -> None:
    total = -(-speech.num_samples // SAMPLES_PER_FRAME)
    session.restore(_on(state, session.engine.device))
    with GrowingVideo(part_of(output), size, FPS, sound=(speech.channels, speech.rate), at=mark) as video:

        def write_ready() -> None:
            for frames in session.frames():
                with stage("write"):
                    video.write(frames)
                    _save(output, facts, session.state(), video.mark)
                progress(video.mark.frames, total)

        progress(video.mark.frames, total)
        held: tuple[np.ndarray, np.ndarray] | None = None
        for heard, original in speech.pieces():
            if held is not None:
                session.push_audio(held[0])
                video.add_sound(held[1])
                write_ready()
            held = heard, original
        assert held is not None
        session.push_audio(held[0])
        video.add_sound(held[1], last=True)
        session.end_audio()
        write_ready()
        video.finish()


def _save(output: Path, facts: Mapping[str, Any], state: SessionState, mark: Mark) -> None:
    tensors = {f"decoder.{i:03d}": x for i, x in enumerate(state.decoder)}
    for f in dataclasses.fields(state.chunk):
        x = getattr(state.chunk, f.name)
        if isinstance(x, torch.Tensor):
            tensors[f"chunk.{f.name}"] = x
    header = {"facts": dict(facts), "index": state.index, "frames": state.frames, "mark": dataclasses.asdict(mark)}
    try:
        write_artifact(resume_of(output), KIND, FORMAT, header, tensors)
    except InputError as e:
        raise OutputStopped(str(e)) from None


def _read(output: Path) -> tuple[SessionState, Mark, dict[str, Any]]:
    file = resume_of(output)
    header, tensors = read_artifact(file, KIND, FORMAT, "remove it to start again")
    chunk = {name.removeprefix("chunk."): x for name, x in tensors.items() if name.startswith("chunk.")}
    decoder = tuple(tensors[name] for name in sorted(tensors) if name.startswith("decoder."))
    state = SessionState(header["index"], header["frames"], ChunkState(**chunk), decoder)
    return state, Mark(**header["mark"]), header["facts"]


def _open(output: Path, facts: Mapping[str, Any]) -> tuple[SessionState, Mark]:
    state, mark, theirs = _read(output)
    other = sorted(name for name in set(facts) | set(theirs) if facts.get(name) != theirs.get(name))
    if other:
        raise ArtifactError(
            f"{resume_of(output)}: that run was begun with other {', '.join(other)}; give what it was begun with, "
            "or remove this file"
        )
    part = part_of(output)
    if not part.is_file() or part.stat().st_size < mark.size:
        raise ArtifactError(f"{part}: expected the {mark.size} bytes of video made so far; remove {resume_of(output)}")
    return state, mark


def _on(state: SessionState, device: torch.device) -> SessionState:
    parts = {f.name: getattr(state.chunk, f.name) for f in dataclasses.fields(state.chunk)}
    chunk = {name: x.to(device) for name, x in parts.items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(
        state, chunk=dataclasses.replace(state.chunk, **chunk), decoder=tuple(x.to(device) for x in state.decoder)
    )
