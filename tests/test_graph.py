"""Graphed callables: captured once per shapes, inputs copied, fixed ones read in place; a capture that a CPU has."""

from __future__ import annotations

import pytest
import torch

from avatar_rt.errors import InputError, UnsupportedError
from avatar_rt.runtime import graph
from avatar_rt.runtime.graph import Graphed


class Recorder:
    """Captures as a graph would: the recorded call reads only the buffers it was given, and fills one output."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, call):
        self.captures += 1
        output = call()

        def replay() -> None:
            for target, source in zip(output, call(), strict=True):
                target.copy_(source)

        return output, replay


def _call(x, pair, *, scale=1.0, weights=None):
    return (x * scale + pair[0], weights["w"] @ pair[1])


def _args(seed: int, size: int = 3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g), (torch.randn(size, generator=g), torch.randn(size, generator=g))


def test_equal_shapes_replay_one_graph() -> None:
    recorder = Recorder()
    graphed, weights = Graphed(_call, ("weights",), recorder), {"w": torch.randn(3, 3)}
    results = [graphed(*_args(seed), scale=2.0, weights=weights) for seed in range(4)]
    assert recorder.captures == 1
    for seed, got in enumerate(results):  # earlier results are not overwritten by later calls
        for a, b in zip(got, _call(*_args(seed), scale=2.0, weights=weights), strict=True):
            assert torch.equal(a, b)


def test_other_shapes_numbers_and_fixed_tensors_are_other_graphs() -> None:
    recorder = Recorder()
    graphed, weights = Graphed(_call, ("weights",), recorder), {"w": torch.randn(3, 3)}
    graphed(*_args(0), weights=weights)
    graphed(*_args(0), scale=3.0, weights=weights)
    graphed(*_args(0), weights={"w": torch.randn(3, 3)})
    assert recorder.captures == 3
    large = {"w": torch.randn(5, 5)}
    got = graphed(*_args(0, 5), weights=large)
    assert recorder.captures == 4 and torch.equal(got[1], large["w"] @ _args(0, 5)[1][1])
    graphed(*_args(9), weights=weights)
    assert recorder.captures == 4
    weights["w"].mul_(2)  # read where it lies
    assert torch.equal(graphed(*_args(1), weights=weights)[1], weights["w"] @ _args(1)[1][1])


def test_only_so_many_graphs_are_kept() -> None:
    recorder = Recorder()
    graphed, weights = Graphed(_call, ("weights",), recorder), {"w": torch.randn(3, 3)}
    for i in range(graph.MOST_GRAPHS + 1):
        graphed(*_args(0), scale=float(i), weights=weights)
    graphed(*_args(0), scale=0.0, weights=weights)
    assert recorder.captures == graph.MOST_GRAPHS + 2


def test_a_graph_needs_a_gpu() -> None:
    from avatar_rt import AvatarEngine

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match=r"graph: torch .* sees no CUDA GPU"):
        Graphed(_call)
    with pytest.raises(UnsupportedError, match=r"graph: torch .* sees no CUDA GPU"):
        AvatarEngine(compile="graph")
    with pytest.raises(InputError, match="compile: expected graph, inductor or None"):
        AvatarEngine(compile="fast")
