"""Sequence parallelism on gloo ranks: the results of one process within rounding, on every mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import launch
from tolerance import assert_accurate

from avatar_rt import ops
from avatar_rt.errors import InputError
from avatar_rt.runtime.parallel import Mesh, merge, split_rows

ROUNDING = 1e-5  # of the largest value, fp32; measured: 2e-6 at most


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world found."""
    return launch(request.param, f"rank_work.{'two' if request.param == 2 else 'four'}", tmp_path_factory.mktemp("r"))


def test_passes_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["passes"]) >= 4
        for case, errors in rank["passes"].items():
            assert max(errors.values()) < ROUNDING, (case, errors)


def test_gradients_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["gradients"].values()) < ROUNDING, rank["gradients"]


def test_mesh_must_fit_the_processes_and_the_heads() -> None:
    with pytest.raises(
        InputError, match="ulysses degree 2 x ring degree 3: expected as many as there are processes, 4"
    ):
        Mesh(2, 3, 0, 4)
    with pytest.raises(InputError, match="ring degree: expected at least 1, got 0"):
        Mesh(4, 0, 0, 4)
    with pytest.raises(InputError, match=r"ulysses degree: expected a divisor of num_heads=12, got 8; .* be 1, 2, 4"):
        Mesh(8, 1, 0, 8).check_heads(12)
    mesh = Mesh(2, 3, 3, 6)
    assert mesh.ulysses_groups == [[0, 1], [2, 3], [4, 5]] and mesh.ring_groups == [[0, 2, 4], [1, 3, 5]]
    assert mesh.ring_rank == 1


@pytest.mark.parametrize(("total", "parts"), [(1, 1), (7, 3), (27, 4), (36960, 8)])
def test_rows_are_split_evenly(total: int, parts: int) -> None:
    counts = split_rows(total, parts)
    assert sum(counts) == total and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_halves_are_the_whole(dtype: torch.dtype) -> None:
    """Keys cut anywhere, with scores far apart: one softmax, as if they had not been cut."""
    q, k, v = (torch.randn(2, 9, 3, 16) for _ in range(3))
    k[:, 5:] *= 5
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = torch.einsum("blnd,bsnd->bnls", q.double(), k.double()) / 4
    truth = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v.double()), scores.logsumexp(-1)
    for cut in (1, 4, 8):
        halves = [ops.sparse_reference_attention(q, k[:, s], v[:, s], return_lse=True)
                  for s in (slice(0, cut), slice(cut, 9))]  # fmt: skip
        out, lse = merge(*halves)
        assert out.dtype == torch.float32
        whole, whole_lse = ops.sparse_reference_attention(q, k, v, return_lse=True)
        assert_accurate(out.to(dtype), whole, truth[0])
        assert_accurate(lse, whole_lse, truth[1])
