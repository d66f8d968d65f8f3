"""What the ranks of test_parallel.py compute: the same model and inputs on every rank, alone and spread."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import PrefixStore
from torch.nn import functional as F

from avatar_rt.config import DiTConfig, VAEConfig
from avatar_rt.engine import AvatarEngine
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT
from avatar_rt.models.vae import VideoVAE
from avatar_rt.ops import PackedReference, pack_reference
from avatar_rt.runtime.parallel import Mesh, SequenceParallel
from avatar_rt.runtime.parallelise import parallelise
from avatar_rt.runtime.ranks import module_of
from avatar_rt.runtime.sharded import shard_module
from avatar_rt.runtime.stripes import SpreadVAE
from avatar_rt.runtime.team import Team
from avatar_rt.runtime.traffic import pass_bytes, reference_bytes
from avatar_rt.runtime.transport import TorchTransport, join

SMALL = DiTConfig(
    dim=48, ffn_dim=64, num_heads=4, num_layers=2, text_dim=12, text_len=4, latent_channels=4, mask_channels=2,
    reference=True, anchor=True, anchor_concat=True,
    audio_dim=10, reference_audio_dim=6, audio_adapter_dim=8, motion_dim=16,
)  # fmt: skip
MESHES = {2: ((2, 1), (1, 2)), 4: ((2, 2), (1, 4))}


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


@functools.cache
def joined() -> TorchTransport:
    return join(torch.device("cpu"))


class Recorder(TorchTransport):
    """Keeps what this rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def all_to_all(self, x: Tensor, *args: Any) -> Any:
        self.tensors.append(x.clone())
        return super().all_to_all(x, *args)

    def all_gather(self, x: Tensor, *args: Any) -> Any:
        self.tensors.append(x.clone())
        return super().all_gather(x, *args)

    def exchange(self, sends: Any, receives: Any) -> Any:
        self.tensors += [x.clone() for x, _ in sends]
        return super().exchange(sends, receives)

    def broadcast(self, x: Tensor, root: int) -> Any:
        self.tensors.append(x.clone())
        return super().broadcast(x, root)


@functools.cache
def meshes() -> dict[str, SequenceParallel]:
    rank, world = joined().rank, joined().world
    return {f"{u}x{r}": SequenceParallel(Mesh(u, r, rank, world), Recorder()) for u, r in MESHES[world]}


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


def _words(tensors: list[Tensor]) -> set[bytes]:
    """Every aligned run of four numbers."""
    words: set[bytes] = set()
    for t in tensors:
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        words |= {raw[i : i + 16] for i in range(0, len(raw) - 15, 16)}
    return words - {bytes(16)}


@torch.no_grad()
def traffic() -> dict[str, Any]:
    """Of every mesh: the bytes that passes send by kind, with few and many reference rows, and as the model has it;
    and whether anything of the reference's keys and values was among them."""
    found: dict[str, Any] = {}
    dit = model()
    for name, spread in meshes().items():
        transport = spread.transport
        assert isinstance(transport, Recorder)
        transport.take()
        case: dict[str, Any] = {}
        for ref in (2, 5):
            x = inputs(ref=ref)
            transport.tensors.clear()
            k, v = encode(dit, x, spread=spread)
            case[f"seen while encoding, {ref} frames"] = len(_words(transport.tensors) & _words([k, v]))
            case[f"encoding, {ref} frames"] = dict(transport.take())
            case[f"encoding model, {ref} frames"] = reference_bytes(SMALL, spread.mesh, rows=7 * ref, itemsize=4)
            transport.tensors.clear()
            packed = [pack_reference(*layer) for layer in zip(k, v, strict=True)]
            for _ in range(2):
                forward(dit, x, spread=spread, packed=packed)
                case.setdefault("sent", []).append(dict(transport.take()))
            case[f"reference seen, {ref} frames"] = len(_words(transport.tensors) & _words([k, v]))
            case[f"words, {ref} frames"] = len(_words(transport.tensors))
        case["model"] = pass_bytes(SMALL, spread.mesh, frames=3, patches=6, anchor=6, itemsize=4)
        found[name] = case
    return found


@torch.no_grad()
def stripes() -> dict[str, Any]:
    """Errors of a video decoded in stripes, in two calls, each rank's state sent out and gathered between them."""
    torch.manual_seed(0)
    cfg = VAEConfig(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), latent_channels=4)
    vae = VideoVAE(cfg).eval()
    team = Team(joined(), PrefixStore("stripes", joined().store), torch.device("cpu"))
    spread = SpreadVAE(vae, joined(), team)
    if not team.leads:
        team.follow(), team.stop(True)
        return {}
    z = torch.randn(1, 4, 5, 7, 3)
    want, state = vae.decode_step(z[:, :, :2], None)
    then, after = vae.decode_step(z[:, :, 2:], state)
    got, striped_state = spread.decode_step(z[:, :, :2], None)
    later, striped_after = spread.decode_step(z[:, :, 2:], striped_state)
    errors = [error(a, b) for a, b in zip((got, later, *striped_after), (want, then, *after), strict=True)]
    few = spread.decode_step(z[:, :, :2, :1], None)[0]
    errors.append(error(few, vae.decode_step(z[:, :, :2, :1], None)[0]))
    team.stop(True)
    return {"worst": max(errors), "states": len(after)}


@torch.no_grad()
def sharded() -> dict[str, float]:
    """Error of a pass whose weights FSDP2 keeps in parts, spread over the ranks too."""
    dit, x = model(), inputs()
    k, v = encode(dit, x)
    want = forward(dit, x, ref_k=k, ref_v=v)
    parts, spread = copy.deepcopy(dit), next(iter(meshes().values()))
    shard_module(parts, torch.device("cpu"))
    held = sum(p.to_local().numel() for p in parts.parameters())
    k, v = encode(parts, x, spread=spread)
    got = forward(parts, x, ref_k=k, ref_v=v, spread=spread)
    return {"error": error(got[0], want[0]), "held": held / sum(p.numel() for p in dit.parameters())}


@torch.inference_mode()
def led(folder: Path | None = None) -> dict[str, Any]:
    """What the leader gets through ``parallelise``: every form of a reference, an error that ends nothing, and how
    many references a follower still keeps when the leader has let them go."""
    spread = list(meshes().values())[1 if joined().world == 2 else 0]
    team = Team(joined(), PrefixStore("led", joined().store), torch.device("cpu"))
    plain = model()
    dit = parallelise(plain, spread, team)
    if not team.leads:
        team.follow(), team.stop(True)
        return {"kept": len(dit._shards)}
    found: dict[str, Any] = {}
    two, x = inputs(batch=2), inputs()

    def packed(k: Tensor, v: Tensor, storage: str | None = None, batch: int = 1) -> list[PackedReference]:
        layers = [[c.expand(batch, -1, -1, -1) for c in layer] for layer in zip(k, v, strict=True)]
        return [pack_reference(*layer, storage=storage) for layer in layers]

    (k, v), (own_k, own_v) = encode(plain, x), encode(dit, x)
    for name, given, storage, batch in (
        ("plain", x, None, 1), ("packed", x, None, 1), ("int8", x, "int8", 1), ("int8 again", x, "int8", 1),
        ("packed for two", two, None, 2),
    ):  # fmt: skip
        want, got = ({"packed": packed(*kv, storage, batch)} for kv in ((k, v), (own_k, own_v)))
        if name == "plain":
            got = {"ref_k": own_k, "ref_v": own_v}
        pairs = zip(forward(dit, given, **got), forward(plain, given, **want), strict=True)
        found[name] = max(error(a, b) for a, b in pairs)
    found["from full heads"] = error(forward(dit, x, ref_k=k + 0.0, ref_v=v)[0], forward(plain, x, ref_k=k, ref_v=v)[0])
    full = packed(k.flip(3), v.flip(3), "int8")
    found["int8 from full heads"] = error(forward(dit, x, packed=full)[0], forward(plain, x, packed=full)[0])
    for name, wrong in (("latents", x | {"latents": x["latents"][:, :5]}), ("t", x | {"t": x["t"][:, :2]})):
        try:
            forward(dit, wrong)
        except InputError as e:
            found[f"{name} said"] = str(e)
    del got, full, own_k, own_v
    found["without"] = error(forward(dit, x)[0], forward(plain, x)[0])
    encode(dit, x)
    team.stop(True)
    return found


def video(folder: Path) -> dict[str, Any]:
    """Frames of a random bundle through the whole pipeline, over small meshes: from a clip, and from full heads."""
    with torch.inference_mode():
        engine = AvatarEngine(folder / "bundle", dtype=torch.float32)
        g = np.random.default_rng(0)
        crops = g.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        sound = g.standard_normal(6000).astype(np.float32) * 0.1
        whole = engine.prepare(crops, cropped=True) if joined().rank == 0 else None
    plain_dit, plain_vae, found = module_of(engine.dit), module_of(engine.vae), {}

    def frames(reference: Any) -> np.ndarray:
        session = engine.session(reference)
        session.push_audio(sound)
        session.end_audio()
        return np.concatenate(list(session.frames()))

    if whole is not None:
        found["alone"] = frames(whole)
    for name, spread in meshes().items():
        if max(spread.mesh.ulysses, spread.mesh.ring) > 2:
            continue
        team = Team(joined(), PrefixStore(f"video {name}", joined().store), torch.device("cpu"))
        engine.dit, engine.vae = parallelise(plain_dit, spread, team), SpreadVAE(plain_vae, joined(), team)
        if not team.leads:
            team.follow()
        else:
            own = engine.prepare(crops, cropped=True)
            found[name] = frames(own)
            found[f"{name} from full heads"] = frames(whole)
            found[f"{name} heads"] = own.cache.k.shape[3]
            del own
            found[f"{name} again"] = frames(engine.prepare(crops[::-1].copy(), cropped=True))
        shards = len(engine.dit._shards)
        team.stop(True)
        found[f"{name} shards"] = shards
    engine.dit, engine.vae = plain_dit, plain_vae
    if whole is not None:
        with torch.inference_mode():
            found["alone again"] = frames(engine.prepare(crops[::-1].copy(), cropped=True))
    return found


def everything(folder: Path) -> dict[str, Any]:
    return {
        "passes": passes(), "gradients": gradients(), "traffic": traffic(), "stripes": stripes(), "sharded": sharded(),
        "led": led(), "video": video(folder),
    }  # fmt: skip
