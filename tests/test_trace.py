"""Named ranges: nothing when nobody looks, torch's under its profiler, NVTX when asked for."""

from __future__ import annotations

import json
import sys
import types
from contextlib import contextmanager

import pytest
import torch

from avatar_rt.errors import UnsupportedError
from avatar_rt.runtime import trace
from avatar_rt.runtime.trace import nvtx_ranges, stage


def test_nothing_happens_when_nobody_looks(monkeypatch):
    def never(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", never)
    with stage("denoise"):
        pass


def test_ranges_are_in_torchs_profile_and_nest():
    @stage("inner")
    def work(n):
        """Adds one."""
        return torch.ones(n) + 1

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, stage("outer"):
        assert work(3).tolist() == [2, 2, 2]
        work(2)
    assert work.__doc__ == "Adds one."
    found = {e.key: e for e in profiler.key_averages() if e.is_user_annotation}
    assert {k: e.count for k, e in found.items()} == {"outer": 1, "inner": 2}
    assert found["outer"].cpu_time_total >= found["inner"].cpu_time_total


def test_an_error_leaves_a_range_and_passes_through():
    with pytest.raises(ValueError, match="mine"), stage("decode"):
        raise ValueError("mine")


@pytest.fixture
def nvtx(monkeypatch):
    """A stand-in for the nvtx package that writes down what it was asked."""
    seen = []

    @contextmanager
    def annotate(message, domain):
        seen.append(f"{domain}:{message}")
        yield
        seen.append(f"end {message}")

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    return seen


def test_nvtx_only_within_its_block(nvtx):
    with stage("before"):
        pass
    with nvtx_ranges(), stage("denoise"), stage("denoise.step"):
        pass
    with stage("after"):
        pass
    assert nvtx == ["avatar_rt:denoise", "avatar_rt:denoise.step", "end denoise.step", "end denoise"]
    assert trace._mark is None


def test_missing_nvtx_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(UnsupportedError, match="the nvtx package is not installed"), nvtx_ranges():
        pass


def test_importing_the_engine_imports_no_nvtx():
    import subprocess

    code = "import sys, avatar_rt.engine; sys.exit('nvtx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_request_shows_its_stages(tmp_path):
    from bench.trace import record

    counts = record(tmp_path / "trace.json", seconds=0.2, steps=1)
    want = {"reference", "reference.context", "reference.cache", "reference.likeness", "speech", "denoise",
            "denoise.step", "decode", "write"}  # fmt: skip
    assert want <= set(counts) <= want | {"denoise.pass"}  # one pass after another where kernels are not recorded
    names = {e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert want <= names
