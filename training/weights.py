"""A module's values: the first ones of a module built on the meta device, and whole ones for a sharded one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from avatar_rt.errors import InputError


def is_meta(module: nn.Module) -> bool:
    """Whether a module was built on the meta device: it has sizes and no weights yet."""
    return any(p.is_meta for p in module.parameters())


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, *, but: Sequence[nn.Module] = ()) -> None:
    """Gives modules that were built on the meta device memory, and the values that their constructors would have: by
    their ``reset_parameters``, children first. The same on every rank that has the same seed. ``but``: parts left out.

    Raises: InputError on a module with weights and no ``reset_parameters``.
    """
    left = {id(m) for part in but for m in part.modules()}
    inner = [m for m in reversed(list(module.modules())) if id(m) not in left]
    for m in inner:
        if any(p.is_meta for p in m.parameters(recurse=False)):
            if not hasattr(m, "reset_parameters"):
                raise InputError(f"{type(m).__name__}: expected a reset_parameters to fill it with, there is none")
            m.to_empty(device=device, recurse=False)
    for m in inner:
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


@torch.no_grad()
def put(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies whole tensors into a module's own, of which this rank may hold a part."""
    own = module.state_dict()
    for name, value in state.items():
        p = own[name]
        if isinstance(p, DTensor):
            local = value.to(p.device, p.dtype)
            p.copy_(distribute_tensor(local, p.device_mesh, p.placements, src_data_rank=None))
        else:
            p.copy_(value)
