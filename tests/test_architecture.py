"""Imports point one way, down the floors of the house, and no two files need each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the roof down; rooms of one floor do not know each other
    ("__main__",),
    ("cli",),
    ("commands",),
    ("report",),
    ("studies",),
    ("training",),
    ("methods",),
    ("replay", "memory"),
    ("rewards",),
    ("sampling",),
    ("model",),
    ("built_in",),
    ("tasks", "processes", "planning"),
    ("config",),
    ("rollout",),
    ("files", "jsonl", "tables", "tree"),
    ("errors", "fitting", "formats", "hub", "hub_names", "jackknife", "latex", "machine", "seeds", "terminal"),
    ("shapes",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules(package: str) -> dict[str, Path]:
    """Files of a package by dotted name."""
    paths = (ROOT / package).rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules in `known` that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in known}


def room(module: str) -> str:
    return module.split(".")[1]


GRADE, KERNELS = modules("grade"), modules("grade_kernels")
KERNEL_FLOORS = {"aot": 0, "torch_ops": 2, "triton_ops": 2, "common": 3}  # the public operations are floor 1


def test_every_room_has_a_floor():
    assert {room(name) for name in GRADE if name != "grade"} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(GRADE) - {"grade"}))
def test_imports_point_down(module):
    others = {name for name in imports(GRADE[module], GRADE) - {"grade"} if room(name) != room(module)}
    wrong = sorted(name for name in others if FLOOR[room(name)] <= FLOOR[room(module)])
    assert not wrong, f"{module} imports {wrong}, which does not lie below it"


@pytest.mark.parametrize("module", sorted(set(KERNELS) - {"grade_kernels"}))
def test_imports_of_the_kernels_point_down(module):
    """Public operations need the two backends, and these `common`; the ahead-of-time compiler is on top."""

    def floor(name):
        return KERNEL_FLOORS.get(room(name), 1)

    others = {name for name in imports(KERNELS[module], KERNELS) - {"grade_kernels"} if room(name) != room(module)}
    wrong = sorted(name for name in others if floor(name) < floor(module) or floor(name) == floor(module) != 1)
    assert not wrong, f"{module} imports {wrong}, which does not lie below it"


@pytest.mark.parametrize("known", [GRADE, KERNELS], ids=["grade", "grade_kernels"])
def test_no_two_files_need_each_other(known):
    needs = {name: imports(path, known) - {name, "grade", "grade_kernels"} for name, path in known.items()}
    # A package's own list of what it offers is no file that another needs for itself.
    needs = {name: {other for other in others if not other.startswith(f"{name}.")} for name, others in needs.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_the_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "grade_kernels", "numpy", *sys.stdlib_module_names}
    for path in KERNELS.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names if name} <= allowed, path


@pytest.mark.parametrize("module", sorted(set(GRADE) - {"grade"}))
def test_no_import_inside_a_function_but_of_heavy_libraries(module):
    """Commands load what they run once the settings are known to be good."""
    if room(module) in ("cli", "commands"):
        return
    tree = ast.parse(GRADE[module].read_text(encoding="utf-8"))
    inner = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "grade"
        or isinstance(node, ast.Import)
        and any(alias.name.split(".")[0] == "grade" for alias in node.names)
    ]
    assert not inner, f"{module}, line {inner[0].lineno}: an import of ours inside a function"
