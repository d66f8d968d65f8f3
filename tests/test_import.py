"""Importing avatar_rt is cheap: no CUDA, no Triton, no TensorRT, no codecs, and little time beyond torch's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

MAX_SECONDS = 2.0
HEAVY = {"triton", "tensorrt", "tensorrt_rtx", "cuda", "cupy", "pycuda", "onnx", "onnxruntime"}
OPTIONAL = {
    "diffusers", "transformers", "numba", "anny", "dlib", "scipy", "matplotlib", "starlette", "uvicorn", "training",
    "export", "bench",
}  # fmt: skip

PROBE = """
import json, sys, time
import torch

def libraries():
    try:
        with open("/proc/self/maps") as maps:
            return {line.split("/")[-1].strip() for line in maps if ".so" in line}
    except OSError:  # not Linux: the check of sys.modules has to do
        return set()

modules, before = set(sys.modules), libraries()
start = time.perf_counter()
import avatar_rt
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
    "libraries": sorted(libraries() - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def probe() -> dict:
    _python(PROBE)  # the first run may compile bytecode and fill the disk cache
    return json.loads(_python(PROBE))


def test_import_touches_no_accelerator(probe: dict) -> None:
    assert not HEAVY & set(probe["modules"])
    assert not probe["cuda"]
    assert not [name for name in probe["libraries"] if name.startswith(("libcuda", "libnv", "libtriton"))]


def test_import_needs_no_optional_package(probe: dict) -> None:
    assert not OPTIONAL & set(probe["modules"])


def test_import_is_quick_once_torch_is_there(probe: dict) -> None:
    assert probe["seconds"] < MAX_SECONDS, f"expected under {MAX_SECONDS} s, got {probe['seconds']:.2f} s"


def test_public_names() -> None:
    import avatar_rt

    expected = {"AvatarEngine", "Session", "preset", "InputError", "UnsupportedError", "ArtifactError"}
    assert expected <= set(avatar_rt.__all__)
    for name in avatar_rt.__all__:
        assert getattr(avatar_rt, name) is not None
    with pytest.raises(AttributeError):
        avatar_rt.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "program", ["-m avatar_rt --help", "-m avatar_rt generate --help", "-m avatar_rt serve --help"]
)
def test_help_needs_no_weights(program: str) -> None:
    done = subprocess.run([sys.executable, *program.split()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
