"""Imports go one way: the order of the rooms, as docs/architecture.md gives it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spiral_jax"
# From the ground up; a room may import rooms before it. Rooms of one line do not know each other.
FLOORS = [
    line.split("|")[2].strip().strip("`").split("`, `")
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]
GROUND = ("errors", "hardware", "progress", "registry", "command")


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def room_of(module: str) -> str:
    """The package's folder or file that a module is in; commands are one room."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "commands"
    name = parts[1]
    return name if name in GROUND or (PACKAGE / name).is_dir() else "commands"


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in it; those for type checkers alone are left out."""
    tree, found = ast.parse(path.read_text()), set()
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return {name for name in found if name in known}


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Which rooms a room imports."""
    known, arrows = modules(), {}
    for module, path in known.items():
        if path.name.startswith(("modeling_", "configuration_")):
            continue  # the PyTorch twin imports nothing of ours
        for other in imported(path, known):
            # The version stands in the package itself.
            if room_of(other) != room_of(module) and other != "spiral_jax":
                arrows.setdefault(room_of(module), set()).add(room_of(other))
    return arrows


def test_the_page_names_every_room():
    named = [room for floor in FLOORS for room in floor]
    assert sorted(named) == sorted({room_of(module) for module in modules()})
    assert len(named) == len(set(named))


def test_no_arrow_goes_up(arrows):
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    up = [(room, other) for room, others in arrows.items() for other in others if floor_of[other] >= floor_of[room]]
    assert not up


def test_files_import_in_no_circle():
    """Not even inside a room."""
    known = modules()
    graph = {module: imported(path, known) - {module, "spiral_jax"} for module, path in known.items()}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]):
        assert state.get(module) != 1, " -> ".join([*way[way.index(module) :], module])
        if module in state:
            return
        state[module] = 1
        for other in graph[module]:
            visit(other, (*way, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


def test_commands_stand_beside_the_ground_alone():
    verbs = set(re.findall(r'^    "(\w+)":', (PACKAGE / "__main__.py").read_text(), re.M))
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert files == verbs | set(GROUND)
