"""Imports point down only."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyllm"

# From the top down. A room may import those in the rows below its own. Modules that stand alone are rooms too.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["serving", "tasks", "benchmarks"],
    ["training", "engine", "quantization"],
    ["checkpoint"],
    ["families"],
    ["models", "text", "data"],
    ["nn", "runtime"],
    ["ops"],
    ["_C"],
]
HEIGHT = {room: -i for i, rooms in enumerate(LAYERS) for room in rooms}


def sources() -> list[Path]:
    # Benchmarks are a link to a folder of their own, and, like tests, may import what they like.
    return sorted(p for p in PACKAGE.rglob("*.py") if "benchmarks" not in p.parts and "reference" not in p.parts)


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of each import in a file, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def room_of(name: str) -> str | None:
    """The room that a dotted name is in, __init__ for what the package itself exports, None for other packages."""
    package, _, rest = name.partition(".")
    if package != "pyllm":
        return None
    room = rest.partition(".")[0]
    return room if room in HEIGHT or room == "reference" or (room and (PACKAGE / room).is_dir()) else "__init__"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in HEIGHT, f"{room} is a new room: give it a place in LAYERS"
    tree = ast.parse(path.read_text("utf-8"))
    switches = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "REFERENCE" in ast.unparse(n.test)]
    for line, name in imports(tree):
        target = room_of(name)
        if target is None or target == room:
            continue
        where = f"pyllm/{path.relative_to(PACKAGE)}:{line} imports {name}"
        if target == "reference":
            allowed = any(s.lineno <= line <= s.end_lineno for s in switches)
            assert allowed, f"{where}: only tests, benchmarks and the PYLLM_REFERENCE switch may"
        else:
            assert HEIGHT[target] < HEIGHT[room], f"{where}: {target} is not below {room}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda p: p.name)
def test_the_reference_imports_torch_alone(path):
    for line, name in imports(ast.parse(path.read_text("utf-8"))):
        root = name.partition(".")[0]
        known = root == "torch" or root in sys.stdlib_module_names or room_of(name) == "reference"
        assert known, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize(("room", "others"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_kernels_know_neither_python_nor_each_other(room, others):
    for path in (ROOT / "csrc" / room).rglob("*"):
        if path.is_file():
            for included in re.findall(r'^\s*#\s*include\s*[<"]([^>"]*)', path.read_text("utf-8"), re.M):
                wrong = included.startswith((f"{others}/", "pybind11/", "Python.h", "tensor_caster", "dlpack", "ops/"))
                assert not wrong, f"{path.relative_to(ROOT)} includes {included}"
