"""The house rules that a parser can hold: which way imports point, what a stage may know, how long a file may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = (
    {"errors"},
    {"config"},
    {"kernels", "_native"},
    {"ops"},
    {"models", "runtime", "media"},
    {"voice", "scene", "trust", "pipeline"},
    {"prepared"},
    {"session"},
    {"job"},
    {"engine"},
    {"serve"},
    {"__init__"},
    {"__main__"},
    {"training", "export", "bench"},
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
PROGRAMS = ("training", "export", "bench")
STAGES = (
    "reference",
    "schedule",
    "likeness",
    "denoise",
    "refine",
    "decode",
)  # in data order; schedule is arithmetic that later stages call
MAX_LINES = 400

PACKAGE = sorted((ROOT / "avatar_rt").rglob("*.py"))
PYTHON = [*PACKAGE, *(p for folder in (*PROGRAMS, "tests") for p in sorted((ROOT / folder).rglob("*.py")))]
NATIVE = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in {".cpp", ".h", ".hpp", ".cu", ".cuh"}]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _part(module: str) -> str:
    """``avatar_rt.ops.norm`` -> ``ops``; ``avatar_rt`` -> ``__init__``; ``training.train`` -> ``training``."""
    names = module.split(".")
    if names[0] in PROGRAMS:
        return names[0]
    return names[1] if len(names) > 1 else "__init__"


def _module(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file() or _part(name) == "_native"


def _imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of our own code anywhere in a file, as (module, imported name or None for a whole module)."""
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = []
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.append((whole, None) if _is_module(whole) else (source, alias.name))
        else:
            continue
        yield from ((m, n) for m, n in found if m.split(".")[0] in ("avatar_rt", *PROGRAMS))


def test_every_part_has_a_place() -> None:
    parts = {_part(_module(path)) for path in PACKAGE}
    assert parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a place in ORDER"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parts[-2] != "tests"], ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    part = _part(_module(path))
    for module, _ in _imports(path):
        other = _part(module)
        assert other == part or LEVEL[other] < LEVEL[part], f"{_name(path)} ({part}) imports {module} ({other})"


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_native_code_is_reached_through_ops(path: Path) -> None:
    if _part(_module(path)) != "ops":
        assert not [m for m, _ in _imports(path) if _part(m) == "_native"], (
            f"{_name(path)} goes around the op contracts"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "avatar_rt" / "pipeline").glob("[a-z]*.py")), ids=_name)
def test_a_stage_knows_only_the_types_of_the_stages_before_it(path: Path) -> None:
    assert path.stem in STAGES, f"give the stage {path.stem} a place in STAGES"
    for module, name in _imports(path):
        if not module.startswith("avatar_rt.pipeline"):
            continue
        other = module.split(".")[-1]
        assert other in STAGES[: STAGES.index(path.stem)], f"{path.stem} imports {module}, which is no stage before it"
        source = _tree(ROOT / "avatar_rt" / "pipeline" / f"{other}.py")
        types = {node.name for node in source.body if isinstance(node, ast.ClassDef)}
        assert name in types or other == "schedule", f"{path.stem} imports {name}: of {other}, only {sorted(types)}"


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_nothing_branches_on_a_preset_or_the_environment(path: Path) -> None:
    from avatar_rt.config import PRESETS

    for node in ast.walk(_tree(path)):
        where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Compare | ast.match_case):
            compared = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            assert not compared & set(PRESETS), f"{where} compares with the name of a preset"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv"), f"{where} reads an environment variable"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            assert not names & {"environ", "getenv"}, f"{where} reads an environment variable"


@pytest.mark.parametrize("path", NATIVE, ids=_name)
def test_native_code_reads_no_environment(path: Path) -> None:
    assert not re.search(r"\b(secure_)?getenv\s*\(", path.read_text()), f"{_name(path)} reads an environment variable"


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=_name)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_LINES, f"{_name(path)}: expected at most {MAX_LINES} lines, got {lines}"


def test_programs_are_not_packages() -> None:
    found = [_name(p) for folder in PROGRAMS for p in (ROOT / folder).rglob("__init__.py")]
    assert not found, f"training, export and bench are programs: remove {found}"


def test_a_module_and_the_function_it_exports_have_different_names() -> None:
    folder = ROOT / "avatar_rt" / "ops"
    modules = {p.stem for p in folder.glob("*.py")}
    exported = {name for module, name in _imports(folder / "__init__.py") if name}
    assert not modules & exported
