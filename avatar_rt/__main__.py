"""The command line, thin over engine.py: ``avatar-rt prepare``, ``generate``, ``demo`` and ``serve``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from avatar_rt import __version__
from avatar_rt.errors import AvatarError, InputError, UnsupportedError

if TYPE_CHECKING:
    from avatar_rt.runtime.ranks import Run

SAMPLES = Path(__file__).parent / "samples"


class Progress:
    """A rich bar on a terminal, plain lines otherwise; frames per second and time left in both."""

    def __init__(self, label: str) -> None:
        self.label, self.started, self.printed = label, time.monotonic(), 0.0
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=None, rate="")
            self.bar.start()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self.started = now
        rate = done / max(now - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, rate=f"{rate:.1f} fps" if done else "")
        elif done and (now - self.printed > 2 or done == total):
            self.printed = now
            left = (total - done) / rate
            print(
                f"{self.label}: {done}/{total} frames, {rate:.1f} fps, {left:.0f} s left", file=sys.stderr, flush=True
            )

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avatar-rt", description="A talking video from a reference video and speech.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped tiny)")
    common.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: %(default)s)")
    common.add_argument("--seed", type=int, default=0, help="same seed, same video (default: %(default)s)")
    common.add_argument("--steps", type=_positive(int), help="solver steps (default: the bundle's)")
    for name, shares in (("ulysses", "heads"), ("ring", "keys and values, passed around")):
        common.add_argument(
            f"--{name}-degree",
            type=_positive(int),
            help=f"processes that share {shares}, under torchrun --nproc-per-node ULYSSES * RING (default: "
            + ("as many as there are over the ring degree)" if name == "ulysses" else "1)"),
        )
    common.add_argument("--shard-weights", action="store_true", help="spread the transformer's weights over processes")
    generate = commands.add_parser("generate", parents=[common], help="reference video and speech to talking video")
    generate.add_argument("reference", type=Path, help="video of one person facing the camera, or an .avref of one")
    generate.add_argument("speech", type=Path, help="sound file, or a video whose sound to use")
    generate.add_argument("-o", "--output", type=Path, required=True, help=".mp4, .mov or .mkv to write")
    generate.add_argument("--scene", type=Path, help="picture of the place (default: the reference's own)")
    generate.add_argument("--prompt", default="", help="a few words about the scene")
    generate.add_argument("--seconds", type=_positive(float), help="use only the first seconds of the speech")
    generate.add_argument("--reference-scale", type=float, help="guidance towards the reference; 1 is off")
    generate.add_argument("--audio-scale", type=float, help="guidance towards the speech; 1 is off")
    generate.add_argument("--reference-strength", type=float, help="weight of the reference in attention; 1 as trained")
    generate.add_argument(
        "--likeness",
        type=float,
        nargs="*",
        metavar="T",
        help="flow times at which the estimate takes the reference's person; none is off",
    )
    generate.add_argument("--sheet", type=Path, help="also write a contact sheet, .png")
    generate.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same request")
    generate.add_argument("--fragmented", action="store_true", help="leave the file fragmented, as it grew")
    prepare = commands.add_parser("prepare", help="reference video to a file that generate takes instead of it")
    prepare.add_argument("reference", type=Path, help="video of one person facing the camera")
    prepare.add_argument("-o", "--output", type=Path, required=True, help=".avref to write")
    prepare.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped tiny)")
    prepare.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: %(default)s)")
    prepare.add_argument(
        "--storage",
        choices=("bf16", "fp32", "int8", "fp8"),
        help="of the keys and values (default: as computed, bit for bit); int8 and fp8 lose some",
    )
    prepare.add_argument("--consent", help="identifier of the person's consent record")
    demo = commands.add_parser(
        "demo", parents=[common], help="generate from the shipped samples: OUT/demo.mp4, demo.png"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder (default: %(default)s)")
    serve = commands.add_parser("serve", help="a server: jobs at /v1/videos, live sessions at /v1/live, a page at /")
    serve.add_argument("--bundle", type=Path, help="bundle directory (default: the shipped tiny)")
    serve.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: %(default)s)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=_positive(int), default=8000, help="(default: %(default)s)")
    serve.add_argument("--max-upload-mb", type=_positive(int), default=200, help="(default: %(default)s)")
    serve.add_argument("--max-seconds", type=_positive(float), default=600, help="of speech (default: %(default)s)")
    serve.add_argument("--max-sessions", type=_positive(int), default=4, help="live at a time (default: %(default)s)")
    serve.add_argument("--max-waiting", type=_positive(int), default=8, help="jobs in line (default: %(default)s)")
    return parser


def _serve(args: argparse.Namespace) -> None:
    from avatar_rt.engine import AvatarEngine
    from avatar_rt.serve import make_server

    try:
        from avatar_rt.serve.limits import Limits
    except ImportError as e:
        raise UnsupportedError(f"serve: {e.name} is not installed: pip install 'avatar-rt[serve]'") from None
    limits = Limits(
        upload_bytes=args.max_upload_mb * 1_000_000, speech_seconds=args.max_seconds, sessions=args.max_sessions,
        jobs_waiting=args.max_waiting,
    )  # fmt: skip
    server = make_server(AvatarEngine(args.bundle, device=args.device), limits, args.host, args.port)
    print(f"http://{args.host}:{args.port}  (stop with Ctrl-C)", flush=True)
    server.run()


def _generate(args: argparse.Namespace, reference: Path, speech: Path, output: Path, sheet: Path | None) -> None:
    from avatar_rt.runtime.ranks import ranks

    with ranks(args.device, args.ulysses_degree, args.ring_degree) as run:
        _generate_on(run, args, reference, speech, output, sheet)


def _generate_on(
    run: Run, args: argparse.Namespace, reference: Path, speech: Path, output: Path, sheet: Path | None
) -> None:
    from avatar_rt.media.writer import check_output

    if run.leads:
        check_output(output)
    if run.leads and sheet is not None:
        check_output(sheet, (".png",))
    from avatar_rt.engine import AvatarEngine

    started = time.monotonic()
    engine = AvatarEngine(args.bundle, device=run.device)
    if not run.leads_with(engine, shard_weights=args.shard_weights):
        return  # this process followed until the video was written
    options = {"seed": args.seed, "steps": args.steps}
    for name in ("scene", "prompt", "seconds", "reference_scale", "audio_scale", "reference_strength", "likeness"):
        if getattr(args, name, None) is not None:
            options[name] = getattr(args, name)
    options |= {name: getattr(args, name, False) for name in ("resume", "fragmented")}
    bar = Progress("generate")
    try:
        engine.generate(reference, speech, output, progress=bar, **options)
    finally:
        bar.stop()
    if sheet is not None:
        from avatar_rt.media.reader import read_video
        from avatar_rt.media.sheet import contact_sheet

        contact_sheet(read_video(output).frames, 8, sheet, rows=3)
    print(f"wrote {output}" + (f" and {sheet}" if sheet else "") + f" in {time.monotonic() - started:.1f} s")


def _prepare(args: argparse.Namespace) -> None:
    from avatar_rt.prepared import check_avref

    check_avref(args.output)
    from avatar_rt.engine import AvatarEngine

    engine = AvatarEngine(args.bundle, device=args.device)
    reference = engine.prepare(args.reference, consent=args.consent)
    errors = reference.save(args.output, storage=args.storage)
    lost = f", relative error of keys {errors[0]:.2e}, of values {errors[1]:.2e}" if any(errors) else ""
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB{lost})")


def _how_to_resume(output: Path) -> str:
    """What to say of an unfinished run that can be gone on with."""
    from avatar_rt.job import kept_frames, part_of

    frames = kept_frames(output)
    return f"; {frames} frames are kept in {part_of(output)}, the same command with --resume goes on" if frames else ""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.command == "generate":
            _generate(args, args.reference, args.speech, args.output, args.sheet)
        elif args.command == "serve":
            _serve(args)
        elif args.command == "prepare":
            _prepare(args)
        else:
            out = args.out
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise InputError(f"{out}: expected a folder that can be made ({e.strerror})") from None
            _generate(args, SAMPLES / "reference.mp4", SAMPLES / "speech.wav", out / "demo.mp4", out / "demo.png")
    except AvatarError as e:
        stopped = args.command == "generate" and not args.resume and "unfinished run" not in str(e)
        print(f"error: {e}{_how_to_resume(args.output) if stopped else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{_how_to_resume(args.output) if args.command == 'generate' else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
