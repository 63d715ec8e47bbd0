"""The rooms of the package: each imports from those before it only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "workflow" / "scripts" / "paretoprune"
# From the ground up. A room imports from those before it; what stands in one line does not see one another.
FLOORS = [
    ["files", "devices", "settings", "telling", "attention"],
    ["tensors", "copies", "shapes"],
    ["masks"],
    ["objectives"],
    ["fronts"],
    ["data"],
    ["networks"],
    ["deployment"],
    ["importance"],
    ["repair"],
    ["evaluation", "search"],
    ["structured"],
    ["training", "stages"],
    ["reporting"],
    ["workflow"],
    ["options"],
    ["api"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports from, wherever the import stands, also for the type checker alone."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("paretoprune.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "paretoprune":
                rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return rooms - {"__version__"}


def test_every_module_lives_in_a_room_that_is_listed() -> None:
    assert {room_of(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_from_those_before_it_only(path: Path) -> None:
    own = room_of(path)
    wrong = {room for room in imported_rooms(path) if room != own and FLOOR[room] >= FLOOR[own]}
    assert not wrong, f"{own} stands on floor {FLOOR[own]} and imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("room", [room for room in FLOOR if (PACKAGE / room).is_dir()])
def test_the_door_of_a_room_holds_a_docstring_and_no_import(room: str) -> None:
    """What `__init__` imported, every step that uses one module of the room would depend on."""
    body = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]
