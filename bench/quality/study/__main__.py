"""Human evaluation: ``python -m bench.quality.study build`` makes a rater's page, ``analyse`` reads the answers.

``build`` writes DIR/page, which raters get, and DIR/key.json, which they do not. ``analyse`` writes a page of results.
The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from avatar_rt.errors import AvatarError
from bench.quality.study import analyse, build
from bench.quality.study.agreement import Limits
from bench.quality.study.questions import KINDS
from bench.quality.videos import parse_systems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality.study", description="Human evaluation of videos.")
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("build", help="write a rater's page and its key")
    page.add_argument("--videos", action="append", required=True, metavar="SYSTEM=DIR", help="CASE.mp4 of one system")
    page.add_argument("--cases", type=Path, required=True, help="CASE/reference.mp4, CASE/target.mp4")
    page.add_argument("--out", type=Path, required=True)
    page.add_argument("--kind", choices=KINDS, default=KINDS[0])
    page.add_argument("--seed", type=int, required=True, help="of the blind names")
    page.add_argument("--hidden", default="truth", metavar="SYSTEM", help="the truth; the cases' target.mp4")
    page.add_argument("--per-rater", type=int, help="trials a rater gets at least, in whole cases; all")
    page.add_argument("--post", metavar="URL", help="the page also sends the answers there")
    page.add_argument("--title", default="Video study")
    read = commands.add_parser("analyse", help="read answers and write a page of results")
    read.add_argument("--answers", type=Path, required=True, help="folder of answers, *.json")
    read.add_argument("--key", type=Path, required=True)
    read.add_argument("--out", type=Path, required=True)
    for field in fields(Limits):
        flag, kind = f"--screen-{field.name.replace('_', '-')}", type(field.default)
        read.add_argument(flag, type=kind, default=field.default, help=f"rater screening; {field.default}")
    return parser


def _build(a: argparse.Namespace) -> dict[str, Any]:
    study = build.plan(parse_systems(a.videos), a.cases, a.kind, a.seed, a.hidden)
    key = build.write_study(study, a.out, title=a.title, post=a.post, per_rater=a.per_rater)
    for case, why in study.left_out.items():
        print(f"left out: {case}: {why}", file=sys.stderr)
    print(f"raters get {a.out / 'page'}; {a.out / 'key.json'} is not for them", file=sys.stderr)
    cut = sum(item["frames_cut"] > 0 for item in key["items"].values())
    return {
        "page": str(a.out / "page" / "index.html"), "key": str(a.out / "key.json"), "study": key["study"],
        "kind": a.kind, "trials": len(key["trials"]), "videos": len(key["items"]), "cases": len(study.cases),
        "videos_cut": cut, "left_out": study.left_out,
    }  # fmt: skip


def _analyse(a: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(**{f.name: getattr(a, f"screen_{f.name}") for f in fields(Limits)})
    document = analyse.write_results(a.answers, a.key, a.out, limits)
    for sentence in document["unusable"]:
        print(f"not used: {sentence}", file=sys.stderr)
    for rater, why in document["screened"].items():
        print(f"screened out: {rater}: {'; '.join(why)}", file=sys.stderr)
    return document


def main(arguments: list[str] | None = None) -> int:
    a = _parser().parse_args(arguments)
    try:
        document = {"build": _build, "analyse": _analyse}[a.command](a)
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
