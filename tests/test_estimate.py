"""The written model of memory and step time, against what torch counts, saves, holds and takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from avatar_rt import ops
from avatar_rt.config import PRESETS, DiTConfig
from avatar_rt.errors import InputError
from avatar_rt.models.dit import VideoRefDiT
from training.cost import Load, count_parameters, load_of, saved_bytes, step_flops, uses_muon
from training.estimate import GPUS, Gpu, Layout, estimate, main, memory_of, sent_of, smallest_ulysses

SMALL = DiTConfig(
    dim=96, ffn_dim=160, num_heads=3, num_layers=3, text_dim=24, text_len=8, freq_dim=64, mask_channels=2,
    reference=True, anchor=True, anchor_concat=True,
    audio_dim=12, reference_audio_dim=10, audio_adapter_dim=16, motion_dim=20,
)  # fmt: skip


def changed(**fields: object) -> DiTConfig:
    return DiTConfig(**{**SMALL.__dict__, **fields})


def grid(batch: int, frames: int, side: int, reference: int) -> Load:
    """Latents of ``side`` pixels: a quarter as many patches."""
    patches = side * side // 4
    return Load(batch, frames, patches, patches, reference, patches)


def forward(module: VideoRefDiT, load: Load) -> Tensor:
    """One pass as training makes it; a scalar that needs every gradient."""
    cfg, b, side = module.cfg, load.batch, int((4 * load.patches) ** 0.5)
    text, motion = torch.randn(b, cfg.text_len, cfg.text_dim), cfg.motion_dim

    def drawn(frames: int, width: int) -> Tensor:
        return torch.randn(b, cfg.in_channels, frames, side, side) if width < 0 else torch.randn(b, frames, width)

    ref = (None, None)
    if load.reference_frames:
        heard = drawn(4 * load.reference_frames, cfg.reference_audio_dim)
        moved = drawn(load.reference_frames, motion) if motion else None
        ref = module.encode_reference(drawn(load.reference_frames, -1), text[:1], heard, moved)
    v, vm = module(
        drawn(load.frames, -1), torch.rand(b), text, drawn(4 * load.frames, cfg.audio_dim), anchor=drawn(1, -1),
        anchor_t=torch.zeros(b), motion=drawn(load.frames, motion) if motion else None, ref_k=ref[0], ref_v=ref[1],
    )  # fmt: skip
    return v.square().mean() + (0 if vm is None else vm.square().mean())


def _plain(q: Tensor, k: Tensor, v: Tensor, ref_k: Tensor | None = None, ref_v: Tensor | None = None, **_) -> Tensor:
    """Attention as two products, which torch's counter sees."""
    if ref_k is not None and ref_v is not None:
        k, v = torch.cat([k, ref_k], 1), torch.cat([v, ref_v], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, *, num_frames: int, radius: int) -> Tensor:
    parts, out = [x.unflatten(1, (num_frames, -1)) for x in (q, k, v)], []
    for f in range(num_frames):
        seen = slice(max(f - radius, 0), f + radius + 1)
        out.append(_plain(parts[0][:, f], parts[1][:, seen].flatten(1, 2), parts[2][:, seen].flatten(1, 2)))
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("cfg", "load"),
    [
        (SMALL, grid(2, 4, 8, 3)),
        (changed(motion_dim=0, dim=192, num_layers=2), grid(1, 3, 8, 2)),
        (changed(text_dim=200, audio_dim=300, reference_audio_dim=100, audio_adapter_dim=0), grid(1, 2, 4, 5)),
        (changed(reference_pattern="frame"), grid(1, 3, 4, 4)),
        (changed(reference_pattern="window", reference_window=1), grid(1, 2, 4, 5)),
        (SMALL, grid(1, 5, 4, 0)),
    ],
)
def test_flops_are_those_torch_counts(cfg: DiTConfig, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "sparse_reference_attention", _plain)
    monkeypatch.setattr(ops, "local_temporal_attention", _banded)
    module = VideoRefDiT(cfg)
    with FlopCounterMode(display=False) as counter:
        loss = forward(module, load)
        first = counter.get_total_flops()
        loss.backward()
    told = step_flops(cfg, load)
    assert told.linear_forward + told.attention_forward == pytest.approx(first, rel=0.002)
    assert told.model == pytest.approx(counter.get_total_flops(), rel=0.002)


def kept_bytes(module: VideoRefDiT, load: Load) -> int:
    """Bytes that autograd holds after a forward, weights aside; every storage once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward(module, load)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("cfg", "load"),
    [
        (SMALL, grid(2, 4, 8, 3)),
        (changed(dim=192, ffn_dim=512, num_heads=6, num_layers=4), grid(1, 5, 12, 2)),
        (changed(num_layers=5, ffn_dim=384), grid(2, 6, 8, 0)),
    ],
)
def test_activations_are_those_autograd_keeps(cfg: DiTConfig, load: Load, dtype: torch.dtype) -> None:
    module = VideoRefDiT(cfg).to(dtype)
    told = saved_bytes(cfg, load, dtype.itemsize).total(cfg.num_layers, recompute=False)
    assert told == pytest.approx(kept_bytes(module, load), rel=0.1)


def test_a_recomputed_block_keeps_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    load = grid(2, 6, 8, 0)
    for layers in (2, 6):
        module = VideoRefDiT(changed(num_layers=layers))
        for block in module.blocks:
            whole = block.forward
            monkeypatch.setattr(block, "forward", lambda *a, f=whole: checkpoint(f, *a, use_reentrant=False))
        kept.append(kept_bytes(module, load))
    told = [saved_bytes(changed(num_layers=n), load, 4) for n in (2, 6)]
    assert (kept[1] - kept[0]) / 4 == pytest.approx(told[0].block_input, rel=0.1)
    with_block = told[1].total(6, recompute=True) - told[0].total(2, recompute=True)
    assert with_block == pytest.approx(4 * told[0].block_input) and told[1].total(6, False) > 3 * told[1].total(6, True)


def test_states_are_exactly_those_of_the_optimisers() -> None:
    cfg, load = SMALL, grid(1, 2, 4, 2)
    module = VideoRefDiT(cfg)
    size = count_parameters(cfg)
    named = list(module.named_parameters())
    assert size.total == sum(p.numel() for _, p in named)
    assert size.block == sum(p.numel() for p in module.blocks[1].parameters())
    optimisers = [
        torch.optim.Muon([p for n, p in named if uses_muon(n, p)], lr=1e-3),
        torch.optim.AdamW([p for n, p in named if not uses_muon(n, p)], lr=1e-3),
    ]
    forward(module, load).backward()
    for _, p in named:  # the last block's reference adapters have no use: the loop gives such weights zeros
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for optimiser in optimisers:
        optimiser.step()
    held = [sum(_bytes(v) for s in o.state.values() for v in s.values()) for o in optimisers]
    preset = PRESETS["tiny"].__class__(**{**PRESETS["tiny"].__dict__, "dit": cfg})
    told = memory_of(preset, load, Layout(1, 1, recompute=False, itemsize=4), size)
    assert told["muon"] == held[0] and told["adamw"] == held[1]
    assert told["weights"] == told["average"] == 4 * size.total
    assert told["gradients"] == sum(_bytes(p.grad) for _, p in named)


def _bytes(x: object) -> int:
    """Of a tensor with more than one number; AdamW's step counters are left out."""
    return x.nbytes if isinstance(x, Tensor) and x.ndim else 0


def test_muons_flops_are_those_torch_counts() -> None:
    matrices = [nn.Parameter(torch.randn(*shape)) for shape in ((24, 24), (24, 64), (40, 8))]
    for p in matrices:
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon(matrices, lr=1e-3).step()
    told = sum(5 * (4 * min(p.shape) ** 2 * max(p.shape) + 2 * min(p.shape) ** 3) for p in matrices)
    assert told == counter.get_total_flops()
    size = count_parameters(changed(num_layers=1))
    assert size.orthogonalise > 5 * 12 * 6 * 96**3  # twelve square matrices, the feed-forward and the adapters


def _steps(cases: list[tuple[DiTConfig, Load]], rounds: int) -> list[float]:
    """CPU seconds of a step of each case, the fastest of rounds that take them in turn."""
    modules = [VideoRefDiT(cfg) for cfg, _ in cases]
    best = [float("inf")] * len(cases)
    for _ in range(rounds):
        for i, (module, (_, load)) in enumerate(zip(modules, cases, strict=True)):
            began = time.process_time()
            forward(module, load).backward()
            best[i] = min(best[i], time.process_time() - began)
    return best


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _fastest(run: Callable[[], object], rounds: int = 6) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return best


def _this_core() -> Gpu:
    """The rates of this core, measured: products, attention both ways, and a norm with its backward."""
    a, b = torch.randn(512, 256), torch.randn(256, 768)
    peak = 2 * 512 * 256 * 768 / _fastest(lambda: a @ b)
    q, k, v = (torch.randn(1, 384, 4, 64, requires_grad=True) for _ in range(3))
    attention = 3.5 * 4 * 384 * 384 * 256 / _fastest(lambda: ops.sparse_reference_attention(q, k, v).sum().backward())
    x = torch.randn(768, 256, requires_grad=True)
    rate = 9 * x.nbytes / _fastest(lambda: nn.functional.gelu(x, approximate="tanh").sum().backward())
    print(f"{peak / 1e9:.0f} GFLOP/s, attention {attention / 1e9:.0f}, {rate / 1e9:.1f} GB/s")
    return Gpu("core", peak, 1e12, rate, 1e9, 1e9, linear=1.0, attention=attention / peak, memory_share=1.0)


def test_the_ratio_of_two_measured_steps_is_the_one_told(one_thread: None) -> None:
    cases = [
        (changed(dim=128, ffn_dim=256, num_heads=4, num_layers=3), grid(4, 4, 16, 2)),
        (changed(dim=256, ffn_dim=768, num_heads=4, num_layers=4), grid(2, 6, 16, 3)),
    ]
    core = _this_core()
    bare = (changed(dim=24, ffn_dim=32, num_heads=3, num_layers=3), grid(1, 1, 2, 1))  # calls and hardly arithmetic
    *measured, calls = _steps([*cases, bare], 4)
    told = []
    for cfg, load in cases:
        preset = PRESETS["tiny"].__class__(**{**PRESETS["tiny"].__dict__, "dit": cfg})
        seconds = estimate(preset, load, Layout(1, 1, recompute=False, itemsize=4), core).seconds
        # A processor's calls do not run ahead of its arithmetic, as a GPU's launches do: they come on top.
        told.append(sum(seconds[k] for k in ("products", "attention", "norms, gates")) + calls * cfg.num_layers / 3)
        print(f"measured {measured[len(told) - 1]:.3f}, told {told[-1]:.3f} with calls {calls:.3f}, {seconds}")
    assert told[1] / told[0] == pytest.approx(measured[1] / measured[0], rel=0.25)


def test_sharing_divides_what_it_should() -> None:
    cfg, gpu = PRESETS["tavr_14b"], GPUS["h100"]
    load, size = load_of(cfg, 1), count_parameters(cfg.dit)
    assert 18.5e9 < size.total < 19.5e9  # 18.9 G by TAVR's published weights
    assert (load.generated(cfg.dit), load.reference(cfg.dit)) == (36_960, 8_400)
    few, many = (memory_of(cfg, load, Layout(n, 8), size) for n in (8, 64))
    for name in ("weights", "gradients", "muon", "adamw", "average"):
        assert few[name] == pytest.approx(8 * many[name])
    assert few["activations"] == many["activations"] and few["gathered weights"] == many["gathered weights"]
    one, all_ = (estimate(cfg, load, Layout(8, u), gpu) for u in (1, 8))
    assert one.memory["activations"] == pytest.approx(8 * all_.memory["activations"])
    assert one.seconds["products"] == pytest.approx(8 * all_.seconds["products"])
    assert one.flops == pytest.approx(8 * all_.flops)  # eight clips against one
    sent = sent_of(cfg, load, Layout(8, 8), size)
    rows = 40 * 36_960 + 39 * 8_400  # q, k, v and the output, of which 7/8 lie elsewhere; three passes of bf16
    assert sent["ulysses"] == pytest.approx(3 * 4 * rows / 8 * 5120 * 2 * 7 / 8)
    assert sent["gather weights"] == pytest.approx(2 * 7 / 8 * 2 * size.total)
    assert sent_of(cfg, load, Layout(1, 1), size) == dict.fromkeys(sent, 0.0)
    more = estimate(cfg, load, Layout(64, 8, accumulate=4), gpu)
    assert more.samples_per_day > estimate(cfg, load, Layout(64, 8), gpu).samples_per_day  # one optimiser step for four
    chosen = smallest_ulysses(cfg, load, Layout(8, 1), gpu)
    assert chosen.ulysses == 4 and not estimate(cfg, load, Layout(8, 2), gpu).bytes <= gpu.memory


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, gpus in (("tavr_14b", 8), ("tavr_14b", 64), ("wan_1_3b", 8), ("tiny", 1)):
        assert main(["--preset", preset, "--gpus", str(gpus)]) == 0
        text = capsys.readouterr().out
        assert preset in text and "MFU" in text and "DOES NOT FIT" not in text
        assert main(["--preset", preset, "--gpus", str(gpus), "--json"]) == 0
        raw = json.loads(capsys.readouterr().out)
        assert 0 < raw["mfu"] < 1 and raw["bytes"] == pytest.approx(sum(raw["memory"].values()))
        assert raw["step"] == pytest.approx(sum(raw["seconds"].values()))
    assert main(["--preset", "tavr_14b", "--gpus", "1"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    for wrong, told in ((["--gpus", "12"], "gpus: expected 1..8 or a multiple of 8, got 12"),
                        (["--ulysses", "3"], "ulysses: expected a divisor of 8 GPUs and of 40 heads"),
                        (["--gpu", "abacus"], "gpu: expected one of a100, h100, h200, b200"),
                        (["--height", "500"], "expected multiples of 16, got 500 and 896"),
                        (["--linear", "1.5"], "expected above 0 and up to 1")):  # fmt: skip
        assert main(wrong) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(InputError, match="accumulate"):
        estimate(PRESETS["tiny"], load_of(PRESETS["tiny"], 1), Layout(1, 1, accumulate=0), GPUS["h100"])
