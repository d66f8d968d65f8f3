"""Checks at an op's boundary: one sentence per fault, built from what was got and what was expected."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from avatar_rt.errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(name: str, x: Tensor, layout: str, sizes: dict[str, int]) -> None:
    """Match ``x`` against a layout such as ``"B L N D"``; letters not yet in ``sizes`` are added to it.

    Raises: InputError on a wrong rank or on a size that disagrees with ``sizes``.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(x).__name__}")
    letters = layout.split()
    text = ", ".join(letters)
    if x.dim() != len(letters):
        raise InputError(f"{name}: expected {len(letters)} dimensions [{text}], got shape {list(x.shape)}")
    for letter, size in zip(letters, x.shape, strict=True):
        known = sizes.setdefault(letter, size)
        if known != size:
            raise InputError(f"{name}: expected {letter}={known}, got {size} (shape {list(x.shape)} for [{text}])")


def same_dtype(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises: InputError when ``x`` has another dtype or device than ``like``."""
    if x.dtype != like.dtype:
        raise InputError(f"{name}: expected dtype {_word(like.dtype)} like {like_name}, got {_word(x.dtype)}")
    same_device(name, x, like_name, like)


def same_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises: InputError when ``x`` lives on another device than ``like``."""
    if x.device != like.device:
        raise InputError(f"{name}: expected device {like.device} like {like_name}, got {x.device}")


def floating(name: str, x: Tensor) -> None:
    """Raises: InputError unless ``x`` is fp32, bf16, fp16 or fp64."""
    if x.dtype not in FLOATS:
        raise InputError(f"{name}: expected a floating dtype, got {_word(x.dtype)}")


def rows_contiguous(name: str, x: Tensor) -> None:
    """Raises: InputError unless the last dimension of ``x`` is contiguous."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise InputError(f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}")


def positive(name: str, value: float) -> None:
    """Raises: InputError unless ``value`` is a finite number above zero."""
    if not 0.0 < value < float("inf"):
        raise InputError(f"{name}: expected a finite number above 0, got {value}")


def strength(value: float) -> None:
    """Raises: InputError unless ``value`` is 0 or more, and finite in fp32."""
    if not 0.0 <= value <= torch.finfo(torch.float32).max:
        raise InputError(f"strength: expected a finite number of 0 or more, got {value}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks matrix work on ``x`` to run in; None when autocast is off or ``x`` is fp64."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def plain(x: Tensor) -> AbstractContextManager:
    """A block in which autocast is off for the device of ``x``: inside an op, dtypes are the op's own affair."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
