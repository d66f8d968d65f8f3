"""What the ranks of test_parallel.py compute: the same model and inputs on every rank, alone and spread."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avatar_rt.config import DiTConfig
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.ops import pack_reference
from avatar_rt.runtime.parallel import Mesh, SequenceParallel
from avatar_rt.runtime.transport import TorchTransport, join

SMALL = DiTConfig(
    dim=48, ffn_dim=64, num_heads=4, num_layers=2, text_dim=12, text_len=4, latent_channels=4, mask_channels=2,
    reference=True, anchor=True, audio_dim=10, reference_audio_dim=6, audio_adapter_dim=8, motion_dim=16,
)  # fmt: skip
MESHES = {2: ((2, 1), (1, 2)), 4: ((4, 1), (2, 2), (1, 4))}


def model(cfg: DiTConfig = SMALL) -> VideoRefDiT:
    torch.manual_seed(0)
    dit = VideoRefDiT(cfg)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return dit.eval()


def inputs(batch: int = 1, frames: int = 3, ref: int = 3) -> dict[str, Tensor]:
    """Rows: 3 frames of 6 patches and a motion token, and 6 of the anchor: 27, which no mesh divides."""
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    return {
        "latents": rand(batch, 6, frames, 4, 6), "t": rand(batch, frames).sigmoid(), "text": rand(batch, 4, 12),
        "audio": rand(batch, 4 * frames, 10), "anchor": rand(batch, 6, 1, 4, 6), "motion": rand(batch, frames, 16),
        "ref": rand(batch, 6, ref, 4, 6), "ref_audio": rand(batch, 4 * ref, 6), "ref_motion": rand(batch, ref, 16),
    }  # fmt: skip


def encode(dit: VideoRefDiT, x: dict[str, Tensor], **kw: Any) -> tuple[Tensor, Tensor]:
    return dit.encode_reference(x["ref"], torch.zeros(1, 4, 12), x["ref_audio"], x["ref_motion"], **kw)


def forward(dit: VideoRefDiT, x: dict[str, Tensor], **kw: Any) -> tuple[Tensor, Tensor]:
    return dit(x["latents"], x["t"], x["text"], x["audio"], anchor=x["anchor"], motion=x["motion"], **kw)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max())


def meshes() -> dict[str, SequenceParallel]:
    transport = join(torch.device("cpu"))
    world = transport.world
    return {f"{u}x{r}": SequenceParallel(Mesh(u, r, transport.rank, world), TorchTransport()) for u, r in MESHES[world]}


def own_heads(x: Tensor, spread: SequenceParallel) -> Tensor:
    at = spread.mesh.rank % spread.mesh.ulysses
    return x.unflatten(-2, (spread.mesh.ulysses, -1))[..., at, :, :]


@torch.no_grad()
def passes() -> dict[str, Any]:
    """Errors of a reference and of passes with it (plain, packed, weaker) and without, over every mesh and pattern."""
    found: dict[str, Any] = {}
    for name, spread in meshes().items():
        for pattern in ("full", "frame"):
            dit, x = model(dataclasses.replace(SMALL, reference_pattern=pattern)), inputs(batch=2)
            k, v = encode(dit, x)
            own_k, own_v = encode(dit, x, spread=spread)
            errors = {"k": error(own_k, own_heads(k, spread)), "v": error(own_v, own_heads(v, spread))}
            packed = [pack_reference(*layer) for layer in zip(own_k, own_v, strict=True)]
            for case, alone, shared in (
                ("plain", {"ref_k": k, "ref_v": v}, {"ref_k": own_k, "ref_v": own_v}),
                ("packed", {"ref_k": k, "ref_v": v}, {"packed": packed}),
                ("weaker", {"ref_k": k, "ref_v": v, "strength": 0.5}, {"packed": packed, "strength": 0.5}),
                ("off", {"ref_k": k, "ref_v": v, "strength": 0.0}, {"packed": packed, "strength": 0.0}),
                ("none", {}, {}),
            ):
                want, got = forward(dit, x, **alone), forward(dit, x, spread=spread, **shared)
                errors[case] = max(error(a, b) for a, b in zip(got, want, strict=True))
            found[f"{name} {pattern}"] = errors
        rows = torch.tensor([0, 2, 3, 7, 9, 11, 12, 16])
        dit, x = model(), inputs()
        dropped = encode(dit, x, rows=rows)
        shard = encode(dit, x, rows=rows, spread=spread)
        anchors = {"anchor_rows": torch.tensor([1, 4])}
        want = forward(dit, x, ref_k=dropped[0], ref_v=dropped[1], **anchors)
        got = forward(dit, x, ref_k=shard[0], ref_v=shard[1], spread=spread, **anchors)
        found[f"{name} dropped"] = {"velocity": error(got[0], want[0]), "motion": error(got[1], want[1])}
    return found


def gradients() -> dict[str, Any]:
    """A training step, reference included: gradients averaged over ranks against those of one process."""
    found: dict[str, Any] = {}
    x = inputs(batch=2)

    def step(**kw: Any) -> dict[str, Tensor]:
        dit = model()
        k, v = encode(dit, x, **kw)
        out, motion = forward(dit, x, ref_k=k, ref_v=v, **kw)
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        (F.mse_loss(out, target) + motion.square().mean()).backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in dit.named_parameters()}

    want = step()
    for name, spread in meshes().items():
        got = step(spread=spread)
        for grad in got.values():
            torch.distributed.all_reduce(grad)
        worst = max(float(w.abs().max()) for w in want.values())
        found[name] = max(float((got[n] / spread.mesh.world - want[n]).abs().max()) / worst for n in want)
    return found


def two() -> dict[str, Any]:
    return {"passes": passes(), "gradients": gradients()}


four = two
