"""The scaling model: FLOPs as torch counts them, bytes as the transport's formulas say, clocks that add up."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rank_work import SMALL, forward, inputs, model
from torch.utils.flop_counter import FlopCounterMode

from avatar_rt.config import preset
from avatar_rt.errors import InputError
from avatar_rt.ops.attention import _sparse_cost
from avatar_rt.runtime.parallel import Mesh
from avatar_rt.runtime.traffic import pass_bytes
from bench.scaling import (
    HARDWARE,
    attention_flops,
    best_pass,
    main,
    model_pass,
    other_flops,
    projection_flops,
    table,
    work_of,
)

TAVR, H100 = preset("tavr_14b"), HARDWARE["h100"]


@torch.no_grad()
def test_flops_are_those_that_torch_counts() -> None:
    """Two blocks less one block: torch counts matrix products, and leaves our attention to its own cost function."""
    counted = []
    for layers in (1, 2):
        with FlopCounterMode(display=False) as counter:
            forward(model(dataclasses.replace(SMALL, num_layers=layers)), inputs())
        counted.append(counter.get_total_flops())
    rows, video = 27, 21
    ours = 4 * projection_flops(SMALL, rows) + other_flops(SMALL, rows, video, 3)
    inside = 4 * rows * SMALL.text_len * SMALL.dim + 4 * video * 3 * SMALL.audio_per_latent * SMALL.dim
    assert counted[1] - counted[0] == ours - inside > 0


def test_attention_flops_are_those_of_the_op() -> None:
    q, k = torch.empty(1, 27, SMALL.num_heads, SMALL.head_dim), torch.empty(1, 40, SMALL.num_heads, SMALL.head_dim)
    assert attention_flops(SMALL, 27, 40) == _sparse_cost(q, k, k, None, None, 1.0)[0]


def test_one_gpu_sends_nothing_and_many_send_what_the_formula_says() -> None:
    work = work_of(TAVR, 10)
    one, eight = (best_pass(TAVR.dit, work, n, H100)[0] for n in (1, 8))
    assert not one.bytes and one.waiting == one.sending == 0
    of_work = {"frames": work.frames, "patches": work.patches, "anchor": work.anchor}
    assert eight.bytes == pass_bytes(TAVR.dit, eight.mesh, **of_work, itemsize=2) and eight.bytes["all_to_all"] > 1e9
    for p in (one, eight):
        assert p.seconds == pytest.approx(p.computing + p.waiting)
    assert eight.computing == pytest.approx(one.computing / 8, rel=0.02)


def test_slow_links_are_waited_for_and_fast_ones_are_not() -> None:
    work = work_of(TAVR, 10)
    fast = dataclasses.replace(H100, nvlink=1e18, network=1e18, link_us=0, network_us=0)
    slow = dataclasses.replace(H100, nvlink=1e8, network=1e8)
    for mesh in (Mesh(8, 1, 0, 8), Mesh(1, 8, 0, 8), Mesh(8, 8, 0, 64)):
        assert model_pass(TAVR.dit, work, mesh, fast).waiting < 1e-3
        crawling = model_pass(TAVR.dit, work, mesh, slow)
        assert crawling.waiting > 0.9 * crawling.seconds
        assert model_pass(TAVR.dit, work, mesh, H100).waiting < crawling.waiting


def test_memory_decides_the_mesh() -> None:
    """Ten seconds of reference are 87 GB: a GPU of 80 must hold fewer heads of it, whatever the ring would save."""
    rows = table(TAVR, work_of(TAVR, 10), [1, 8], H100)
    assert not rows[0]["fits"] and rows[1]["fits"] and float(rows[1]["reference_kept_bytes"]) < 50e9
    assert 0.8 < float(rows[1]["efficiency"]) <= 1.0
    with pytest.raises(InputError, match="gpus: expected 1 to 36960, got 100000"):
        best_pass(TAVR.dit, work_of(TAVR, 10), 100_000, H100)


def test_the_command_prints_a_table_and_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "wan_1_3b", "--gpus", "1", "4", "--matmul-tflops", "400"]) == 0
    told = capsys.readouterr().out.strip().splitlines()
    assert told[0].startswith("Model, not a measurement: wan_1_3b")
    document = json.loads(told[-1])
    assert [row["gpus"] for row in document["rows"]] == [1, 4]
    assert document["assumed"]["matmul"] == pytest.approx(400 / 989)
    assert main(["--gpus", "0"]) == 2
