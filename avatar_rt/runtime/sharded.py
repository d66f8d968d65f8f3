"""Weights that do not fit on one device: FSDP2 keeps a part of each block on a rank and gathers a block to run it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard_module(module: nn.Module, device: torch.device) -> None:
    """Shards a module's blocks over all ranks, in place, for inference; the rest of it as one more piece.

    The next block's weights travel while one computes. Every rank then runs every pass: of a ``VideoRefDiT``,
    ``forward`` and ``encode_reference``. Sharding by block is exact: each rank computes with whole weights.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in module.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
        for name in ("reference_kv", "reference"):
            register_fsdp_forward_method(block, name)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "encode_reference")
