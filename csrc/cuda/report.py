"""Builds the native core with the CUDA attention kernels, and reports what they take: ``python csrc/cuda/report.py``.

Fails when a kernel spills a register, when the assembler serialises wgmma, when a kernel is missing, or when the build
takes more than 10 minutes of two cores or 6 GB: the limits that a machine without a GPU has to live with.
"""

import argparse
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {("sm80", "sm_80"), ("sm80", "sm_90"), ("sm90", "sm_90a")}
MAX_CPU_SECONDS, MAX_BYTES = 2 * 600, 6 * 2**30

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_NAME = re.compile(r"attention_(sm\d+)_kernel\w*?4(Bf16|Fp16)ELi(\d+)E")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_LOSS = re.compile(r"\(C75\d\d\).*(?:serialized|ignored).*")


def parse(log: str) -> list[dict]:
    """One row per attention kernel and architecture from what ``ptxas -v`` printed."""
    rows: list[dict] = []
    row: dict = {}
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name = _NAME.search(entry[1])
            row = {"kernel": name[1], "dtype": name[2].lower(), "d": int(name[3]), "arch": entry[2]} if name else {}
            if row:
                rows.append(row)
        elif spills := _SPILLS.search(line):
            row.update(stack=int(spills[1]), spilled=int(spills[2]) + int(spills[3]))
        elif used := _USED.search(line):
            row["registers"] = int(used[1])
    return rows


def faults(log: str, rows: list[dict]) -> list[str]:
    """What in the log must not be there, or is missing; empty when all is well."""
    found = [f"{_words(r)} spills {r['spilled']} bytes" for r in rows if r["spilled"] or r["stack"]]
    found += sorted({re.sub(r"'_ZN.*", "", line[0]) for line in _LOSS.finditer(log)})
    have = {(r["kernel"], r["arch"], r["dtype"], r["d"]) for r in rows}
    want = {(*k, dtype, d) for k in KERNELS for dtype in ("bf16", "fp16") for d in (64, 128)}
    return found + [f"no kernel {' '.join(map(str, k))} in the log" for k in sorted(want - have)]


def table(rows: list[dict], shared: dict[tuple[str, int], dict]) -> str:
    """The report, with the dynamic shared memory and block sizes that the bindings know (may be empty)."""
    lines = [f"{'kernel':<7}{'arch':<8}{'dtype':<7}{'d':>4}{'registers':>11}{'spilled':>9}{'threads':>9}{'shared':>9}"]
    for r in sorted(rows, key=lambda r: (r["kernel"], r["arch"], r["d"], r["dtype"])):
        block = shared.get((r["kernel"], r["d"]), {"threads": "", "shared_bytes": ""})
        lines.append(
            f"{r['kernel']:<7}{r['arch']:<8}{r['dtype']:<7}{r['d']:>4}{r['registers']:>11}{r['spilled']:>9}"
            f"{block['threads']:>9}{block['shared_bytes']:>9}"
        )
    return "\n".join(lines)


def _words(row: dict) -> str:
    return f"attention {row['kernel']} {row['dtype']} d={row['d']} for {row['arch']}"


def build(folder: Path, target: str | None) -> str:
    """Configure and build from nothing with the CUDA kernels on; what the compilers printed."""
    import cmake
    import ninja
    import pybind11

    shutil.rmtree(folder, ignore_errors=True)
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    configure = [
        program, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        "-DCMAKE_BUILD_TYPE=Release", "-DAVATAR_RT_CUDA=ON", f"-DCMAKE_INSTALL_PREFIX={ROOT / 'avatar_rt'}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    command = [program, "--build", folder, "--parallel", "2", *(["--target", target] if target else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    for component in () if target else ("python", "c"):
        subprocess.run([program, "--install", folder, "--component", component], check=True, capture_output=True)
    return done.stdout


def blocks() -> dict[tuple[str, int], dict]:
    """Thread blocks by (kernel, head dim), from the extension that was just installed."""
    sys.path.insert(0, str(ROOT))
    from avatar_rt import _native

    return {(k["kernel"], k["head_dim"]): k for k in _native.cuda_attention_kernels()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda", help="folder to build in, emptied first")
    parser.add_argument("--kernels-only", action="store_true", help="compile the kernels, install nothing")
    args = parser.parse_args()
    start = time.monotonic()
    log = build(args.build, "avatar_rt_cuda" if args.kernels_only else None)
    seconds = time.monotonic() - start
    rows = parse(log)
    print(table(rows, {} if args.kernels_only else blocks()))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    largest = usage.ru_maxrss * 1024  # of one process; two run at a time
    cpu = usage.ru_utime + usage.ru_stime
    print(f"built in {seconds:.0f} s ({cpu:.0f} s of CPU), largest process {largest / 2**20:.0f} MB")
    found = faults(log, rows)
    if cpu > MAX_CPU_SECONDS:  # not the clock: a busy machine is not the kernels' fault
        found.append(f"the build took {cpu:.0f} s of CPU, expected at most {MAX_CPU_SECONDS}")
    if 2 * largest > MAX_BYTES:
        found.append(f"two such compilers take {2 * largest / 2**30:.1f} GB, expected at most {MAX_BYTES / 2**30:.0f}")
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
