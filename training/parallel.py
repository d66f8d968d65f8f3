"""Several processes as one run, and how a module's blocks are wrapped: recomputed, compiled, sharded.

``torchrun --nproc-per-node N -m training.train ...`` starts N ranks, over gloo on CPUs and NCCL on GPUs. Each draws
other batches of the step; gradients are averaged (every rank holds everything), or a recipe asks for sharded weights:
FSDP2, one group of weights for each block and one for the rest. A recipe may also have neighbouring ranks share a batch
by sequence parallelism, with either. A single process needs no process group.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from avatar_rt.errors import InputError
from avatar_rt.runtime.parallel import Mesh, SequenceParallel
from avatar_rt.runtime.transport import TorchTransport
from training.recipe import Recipe
from training.weights import fill, is_meta

TIMEOUT = timedelta(hours=2)  # rank 0 may validate for long while the others wait


@dataclass(frozen=True)
class World:
    """This process among the run's. ``owned``: the process group was started for this run and ends with it; ``share``:
    of so many neighbouring ranks, which have every batch in common."""

    rank: int
    size: int
    device: torch.device
    owned: bool = False
    share: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def draws(self) -> tuple[int, int]:
        """Which of how many groups of ranks draws a batch of its own."""
        return self.rank // self.share, self.size // self.share

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def total(self, *numbers: int) -> list[int]:
        """Sums over the ranks; over gloo also on GPUs, so that no queue of kernels is waited for."""
        if self.size == 1:
            return list(numbers)
        table = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(table)
        return table.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start(device: str = "") -> World:
    """Joins the ranks that torchrun started, if it did, on ``cpu`` or ``cuda``; "" is a GPU where there is one."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device: expected cpu, torch sees no GPU here, got cuda")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_float32_matmul_precision("high")
    place = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    owned = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if owned:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    if not dist.is_initialized():
        return World(0, 1, place)
    return World(dist.get_rank(), dist.get_world_size(), place, owned)


def finish(world: World) -> None:
    if world.owned:
        dist.destroy_process_group()


def share_batches(method: Any, recipe: Recipe, world: World) -> World:
    """Has neighbouring ranks share every batch, where the recipe asks for it: rows are spread over them, heads and the
    reference's keys and values inside attention. Every rank computes the loss of the whole batch, so that gradients
    averaged over all ranks are those of ranks that draw a batch each.

    Raises: InputError where the degrees do not fit the number of ranks or of heads, or the method cannot be spread.
    """
    size = recipe.ulysses * recipe.ring
    if size == 1:
        return world
    if not hasattr(method, "spread"):
        raise InputError(f"{recipe.name}: expected ulysses=1 and ring=1, this method's passes cannot be spread")
    if world.size == 1 or world.size % size:
        raise InputError(
            f"{recipe.name}: ulysses {recipe.ulysses} x ring {recipe.ring} expects a multiple of {size} ranks, "
            f"got {world.size}"
        )
    transport = TorchTransport(size=size, timeout_s=TIMEOUT.total_seconds())
    mesh = Mesh(recipe.ulysses, recipe.ring, transport.rank, size)
    mesh.check_heads(method.cfg.dit.num_heads)
    method.spread = SequenceParallel(mesh, transport)
    return replace(world, share=size)


@torch.no_grad()
def broadcast(module: nn.Module, world: World) -> None:
    """Gives every rank the weights of the first one."""
    if world.size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(params: Sequence[nn.Parameter], world: World) -> None:
    """Means over the ranks of gradients that every rank holds whole, in one message; missing ones count as zero.

    A parameter that nothing used gets a zero gradient in one process too: what is trained must not depend on how
    many ranks share the work. Sharded gradients are averaged already.
    """
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world.size == 1 or any(isinstance(p, DTensor) for p in params):
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= world.size
    for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = g.view_as(p)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of every module list called ``blocks``: the layers that repeat, and hold most of the weights."""
    lists = [m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and n.split(".")[-1] == "blocks"]
    return [block for blocks in lists for block in blocks]


def ways_in(block: nn.Module) -> tuple[str, ...]:
    """Methods that a block's owner calls: ``forward``, and what the block's class lists as ``ENTRIES``."""
    return ("forward", *getattr(type(block), "ENTRIES", ()))


def wrap_blocks(module: nn.Module, recipe: Recipe) -> None:
    """Recomputes and compiles blocks, as the recipe asks. Names of weights stay as they are."""
    blocks = blocks_of(module)
    if (recipe.recompute or recipe.compile) and not blocks:
        raise InputError(f"{recipe.name}: compile and recompute act on blocks, and this module has no list of blocks")
    for block in blocks:
        for name in ways_in(block):
            method = getattr(block, name)
            if recipe.recompute:
                method = functools.partial(checkpoint, method, use_reentrant=False)
            if recipe.compile:
                method = torch.compile(method, backend=recipe.compile)
            setattr(block, name, method)


# ---- sharding --------------------------------------------------------------------------------------------------------


class _Root(nn.Module):
    """Its forward calls any function: inside, all weights outside the blocks are whole, whoever reads them.

    A method's step uses its module in ways of its own; this makes each of them the forward pass that FSDP2 knows.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def fill_in_order(
    module: nn.Module, device: torch.device, then: Callable[[nn.Module], None] = lambda block: None
) -> None:
    """Fills a module that was built on the meta device block by block, the rest last; each block is then given to
    ``then``."""
    blocks = blocks_of(module)
    for block in blocks:
        fill(block, device)
        then(block)
    fill(module, device, but=blocks)


def shard(module: nn.Module, recipe: Recipe, world: World) -> Callable[..., Any]:
    """Splits the module's weights over the ranks; returns ``call(function, *args)``, inside which they may be used.

    One built on the meta device is filled block by block, so that no rank ever holds all of it. All ranks must call
    alike: a block that one rank runs and another does not, leaves both waiting.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, recipe.sharded_dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # What a block returns is never changed in place, which is all that this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def split(block: nn.Module) -> None:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for name in ways_in(block)[1:]:
            register_fsdp_forward_method(block, name)

    if is_meta(module):
        fill_in_order(module, world.device, split)
    else:
        for block in blocks_of(module):
            split(block)
    root = fully_shard(_Root(module), mesh=mesh, mp_policy=policy)

    def call(function: Callable[..., Any], *args: Any) -> Any:
        result = root(function, *args)
        if not torch.is_grad_enabled():  # else the end of the backward pass does
            root.reshard()
        return result

    return call


@torch.no_grad()
def whole_state(state: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """A sharded state put together in the first rank's memory; empty on the others. Every rank must call it."""
    whole = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_first:
            whole[name] = full.cpu()
    return whole
