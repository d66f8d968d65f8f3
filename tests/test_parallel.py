"""Sequence parallelism on gloo ranks: the results of one process within rounding, on every mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import launch
from small_bundle import CONFIG, write_bundle
from tolerance import assert_accurate

from avatar_rt import ops
from avatar_rt.config import ChunkConfig
from avatar_rt.errors import InputError
from avatar_rt.runtime.parallel import Mesh, merge, split_rows

ROUNDING = 1e-5  # of the largest value, fp32; measured: 2e-6 at most


def random_bundle(path: Path) -> None:
    """A bundle whose heads can be dealt out to four ranks."""
    dit = replace(CONFIG.dit, dim=48, num_heads=4, audio_adapter_dim=8)
    vae = replace(CONFIG.vae, base_dim=8, dim_mult=(1, 2, 2), patch=1, time_kernel=())
    sampling, chunk = replace(CONFIG.sampling, reference_scale=2.0), ChunkConfig(latents=3, overlap=1)
    write_bundle(path, spread=0.1, reference_latents=2, dit=dit, vae=vae, chunk=chunk, sampling=sampling)


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world found."""
    folder = tmp_path_factory.mktemp("ranks")
    random_bundle(folder / "bundle")
    return launch(request.param, "rank_work.everything", folder)


def test_passes_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["passes"]) >= 4
        for case, errors in rank["passes"].items():
            assert max(errors.values()) < ROUNDING, (case, errors)


def test_gradients_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["gradients"].values()) < ROUNDING, rank["gradients"]


def test_no_reference_row_travels_after_it_was_computed(found: list[dict[str, Any]]) -> None:
    """Passes send the same bytes however long the reference is, as many as the model says, and none of its numbers."""
    for rank in found:
        for mesh, case in rank["traffic"].items():
            first, *others = case["sent"]
            assert all(other == first for other in others), mesh
            assert first == case["model"] and sum(first.values()) > 0, (mesh, first, case["model"])
            assert case["reference seen, 2 frames"] == case["reference seen, 5 frames"] == 0
            assert case["seen while encoding, 2 frames"] > 0  # it is what would be found
            for frames in (2, 5):
                assert case[f"encoding, {frames} frames"] == case[f"encoding model, {frames} frames"]


def test_stripes_decode_the_same_video(found: list[dict[str, Any]]) -> None:
    assert found[0]["stripes"]["worst"] < ROUNDING and found[0]["stripes"]["states"] > 3


def test_sharded_weights_compute_the_same(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["sharded"]["error"] < ROUNDING
        assert rank["sharded"]["held"] == pytest.approx(1 / len(found), rel=0.3)


def test_the_leader_may_have_its_reference_in_any_form(found: list[dict[str, Any]]) -> None:
    told = dict(found[0]["led"])
    assert "latents: expected [B, 6, T, H, W]" in told.pop("latents said") and "t: expected" in told.pop("t said")
    assert len(told) == 8 and max(told.values()) < ROUNDING, told
    for rank in found[1:]:
        assert rank["led"]["kept"] == 1  # the last, which no pass has used yet


def test_ranks_make_the_video_of_one_process(found: list[dict[str, Any]]) -> None:
    """The whole pipeline: a reference encoded by all ranks, and one whose heads are sent out; and then another."""
    video = found[0]["video"]
    alone = video["alone"].astype(int)
    assert alone.shape[0] == 10 and alone.std() > 5
    assert np.abs(alone - video["alone again"]).mean() > 0.5
    meshes = [name for name in video if len(name) == 3]
    assert meshes == (["2x1", "1x2"] if len(found) == 2 else ["2x2"])
    for name in meshes:
        assert video[f"{name} heads"] == 4 // int(name[0])
        for case in (name, f"{name} from full heads"):
            assert np.abs(alone - video[case]).max() <= 1, case
        assert np.abs(video["alone again"].astype(int) - video[f"{name} again"]).max() <= 1, name
    for rank in found[1:]:
        assert all(rank["video"][f"{name} shards"] <= 2 for name in meshes)


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
