"""Finds the native extension, or says in a few words why there is none."""

import functools
import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

ABI_VERSION = 1  # of csrc/include/avatar_rt.h, as these Python files know it
_BUILD = "run `pip install -e .` (or `make setup`)"


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The module and an empty string, or None and the reason."""
    try:
        module = importlib.import_module("avatar_rt._native")
    except ModuleNotFoundError:
        return None, f"avatar_rt._native is not built: {_BUILD}"
    except ImportError as e:
        return None, f"avatar_rt._native does not load ({e}): {_BUILD}"
    if module.abi_version != ABI_VERSION:
        return None, f"avatar_rt._native is version {module.abi_version}, expected {ABI_VERSION}: {_BUILD}"
    return module, ""


def module() -> ModuleType:
    """The extension; only for implementations, which refuse to run where ``native`` has none."""
    found, reason = native()
    assert found is not None, reason
    return found


def arg(x: Tensor | None) -> Any:
    """A tensor as the extension takes it: address, dtype, shape, strides. The caller keeps ``x`` alive."""
    if x is None:
        return None
    return module().Tensor(x.data_ptr(), str(x.dtype).removeprefix("torch."), x.shape, x.stride())
