"""Train one stage from its recipe.

    python -m training.train --recipe vae --corpus DIR --out RUN [--resume] [--init WEIGHTS] [--set steps=200]
    torchrun --nproc-per-node 2 -m training.train --recipe avatar --corpus DIR --out RUN

A recipe is a function in ``training/recipes`` that returns a ``Recipe``; ``--set`` overrides its fields. ``RUN`` then
holds ``metrics.jsonl``, ``tensorboard`` (where tensorboard is installed), ``validation`` pictures, checkpoints and the
exported part. ``--resume`` continues from the newest checkpoint, bit for bit on a CPU; SIGINT and SIGTERM leave one
and exit with 130. ``--minutes 9`` stops with a checkpoint in time for a machine that is lent for ten.

A step averages ``micro_batches`` batches, shared among the ranks: two ranks train what one does, in half the time.
``sharded=true`` splits weights and optimiser states as well (FSDP2), ``recompute=true`` trades time for memory,
``compile=inductor`` compiles the blocks. On CUDA nothing of this has been run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from avatar_rt.errors import AvatarError, InputError
from training.loop import train
from training.recipe import Recipe

__all__ = ["find_recipe", "main", "train"]


def find_recipe(name: str) -> Recipe:
    """``MODULE`` or ``MODULE.FUNCTION`` in training/recipes, called. Raises InputError."""
    module, _, function = name.partition(".")
    try:
        recipes = importlib.import_module(f"training.recipes.{module}")
        return getattr(recipes, function or module)()
    except (ImportError, AttributeError) as e:
        raise InputError(f"--recipe {name}: {e}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train one stage from its recipe.")
    parser.add_argument("--recipe", required=True, help="MODULE or MODULE.FUNCTION in training/recipes")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="STEP",
        help="continue from the newest checkpoint in --out, if any (latest), or from that of a step",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="checkpoint, run, weights or folder of parts to start from")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop there, with a checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after so long, with a checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe field")
    args = parser.parse_args(argv)
    try:
        train(
            find_recipe(args.recipe).override(args.set), args.corpus, args.out, resume=args.resume or False,
            init=args.init, until=args.until, minutes=args.minutes,
        )  # fmt: skip
    except AvatarError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {e or 'at once'}; run again with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
