"""Compiles a Triton launch for a GPU that is not here, and reads from the binary what it would take of one."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from avatar_rt.kernels._launch import Launch

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # that one block may use
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Compiled:
    """What a block takes: bytes of shared memory, registers per thread, bytes spilled per thread; and the PTX."""

    shared: int
    registers: int
    spills: int
    ptx: str


def _specialized(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Signature, constants and divisibility as Triton itself would take them from the arguments of a call."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr or (value == 1 if isinstance(value, int) and not parameter.do_not_specialize else 0):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    assert set(launch.args) == set(signature), "the launch and the kernel name different parameters"
    return signature, constants, attributes


def compile_ahead(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` (80, 90, 120)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialized(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(binary.metadata_group[f"{launch.kernel.__name__}.cubin"])
    usage = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage.stdout + usage.stderr)[1]) for word in ("REG", "STACK"))
    return Compiled(binary.metadata.shared, registers, stack, binary.asm["ptx"])
