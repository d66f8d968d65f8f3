"""The training loop: resuming is bit-equal, a wrong resume is refused, overrides are typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from avatar_rt.errors import InputError
from avatar_rt.models.weights import save_weights
from training.optimiser import learning_rate
from training.recipe import Recipe
from training.train import main, train


class Toy:
    """Least squares with a hidden layer, batches drawn from the loop's generator."""

    def __init__(self) -> None:
        self.module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 8)]), "out": nn.Linear(8, 1)})

    def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=generator)
        y = self.module["out"](torch.tanh(self.module["blocks"][0](x)))
        return {"loss": (y - x.sum(1, keepdim=True)).square().mean()}

    def validate(self, step: int, out: Path) -> dict[str, float]:
        g = torch.Generator().manual_seed(9)
        return {"loss": float(self.step(step, g)["loss"])}

    def export(self, out: Path) -> None:
        torch.save(self.module.state_dict(), out / "toy.pt")


RECIPE = Recipe(
    "toy", lambda corpus: Toy(), steps=40, lr=1e-2, muon_lr=1e-2, warmup=5, ema=0.9, autocast=False,
    checkpoint_every=20, validate_every=20,
)  # fmt: skip


def _exported(path: Path) -> dict[str, Tensor]:
    return torch.load(path / "toy.pt", weights_only=True)


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    straight = train(RECIPE, tmp_path, tmp_path / "a")

    class Stop(Exception):
        pass

    class Interrupted(Toy):
        def step(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
            if step == 27:
                raise Stop
            return super().step(step, generator)

    with pytest.raises(Stop):
        train(replace(RECIPE, build=lambda corpus: Interrupted()), tmp_path, tmp_path / "b")
    resumed = train(RECIPE, tmp_path, tmp_path / "b", resume=True)
    assert resumed.step == straight.step == 40
    for key, value in _exported(tmp_path / "a").items():
        assert torch.equal(value, _exported(tmp_path / "b")[key]), key


def test_a_run_may_start_from_parts_or_a_checkpoint(tmp_path: Path) -> None:
    first = train(replace(RECIPE, steps=3, ema=0.0), tmp_path, tmp_path / "a")
    for name, part in first.method.module.named_children():
        save_weights(part, tmp_path / f"{name}.safetensors", dtype=torch.float32)
    for init in (tmp_path, tmp_path / "a"):
        again = train(replace(RECIPE, steps=0), tmp_path, tmp_path / "b", init=init)
        for a, b in zip(first.method.module.parameters(), again.method.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_it_learns(tmp_path: Path) -> None:
    run = train(replace(RECIPE, steps=300), tmp_path, tmp_path)
    before = Toy().validate(0, tmp_path)["loss"]
    with run.averaged():
        assert run.method.validate(0, tmp_path)["loss"] < 0.2 * before


def test_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    train(replace(RECIPE, steps=2), tmp_path, tmp_path)
    with pytest.raises(InputError, match="holds a run of recipe 'toy', got 'other'"):
        train(replace(RECIPE, name="other"), tmp_path, tmp_path, resume=True)


def test_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(RECIPE, s) for s in range(41)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[40] == pytest.approx(RECIPE.final_lr)


def test_overrides_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    changed = RECIPE.override(["steps=7", "lr=0.5", "autocast=true"])
    assert (changed.steps, changed.lr, changed.autocast) == (7, 0.5, True)
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        RECIPE.override(["colour=blue"])
    assert main(["--recipe", "nothing", "--corpus", ".", "--out", "."]) == 2
    assert "--recipe nothing" in capsys.readouterr().err
