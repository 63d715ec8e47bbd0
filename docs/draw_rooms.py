"""Draw the rooms of the package and the imports between them into docs/rooms.svg: `make rooms`.

The order of the floors, and what counts as an import, are those of `tests/test_rooms.py`, which holds the directions.
Equal sources give equal files.
"""

import ast
from collections import Counter
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from test_rooms import FLOORS, MODULES, PACKAGE, imported_rooms, room_of

DRAWING = Path(__file__).with_name("rooms.svg")
# Sizes in inches, which are the units of the axes: a box, the space beside the boxes, between floors and within one,
# and from the middle of a box to where arrows leave and arrive.
BOX, HEIGHT, MARGIN, BETWEEN, WITHIN, PORT = 4.3, 0.42, 1.9, 0.28, 0.05, 0.12
# One hue for each importing room, in turn: neighbours differ.
COLOURS = ("#1f4e79", "#b03a2e", "#1e8449", "#b9770e", "#6c3483", "#117a65", "#5d4037")
INK, PALE, FAINT = "#2c3e50", "#eef2f6", "#5f6f7f"


def count_imports() -> Counter[tuple[str, str]]:
    """How many modules of a room (first) import from another room (second)."""
    return Counter((room_of(path), room) for path in MODULES for room in imported_rooms(path) if room != room_of(path))


def purpose(room: str) -> str:
    """The first line of what a room, or a module that stands by itself, says about itself."""
    path = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return line if len(line) <= 64 else f"{line[:62].rsplit(' ', 1)[0]} …"


def heights() -> dict[str, float]:
    """Middle of each box above the ground, in inches, from the top floor down; rooms of one floor stand close."""
    places: dict[str, float] = {}
    y = 0.0
    for floor in FLOORS:
        for room in reversed(floor):
            places[room] = y + HEIGHT / 2
            y += HEIGHT + WITHIN
        y += BETWEEN - WITHIN
    return dict(sorted(places.items(), key=lambda item: -item[1]))


def draw(target: Path) -> None:
    """Draw the package as an SVG file.

    Args:
        target: Where to write it.
    """
    middle = heights()
    colours = {room: COLOURS[i % len(COLOURS)] for i, room in enumerate(middle)}
    width, top = BOX + 2 * MARGIN, max(middle.values()) + HEIGHT
    figure = Figure(figsize=(width, top + 0.5))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(-0.5, top))
    axes.axis("off")
    for room, y in middle.items():
        _draw_room(axes, room, y)
    for (room, imported), n_modules in sorted(count_imports().items()):
        _draw_import(axes, (room, imported), (middle[room], middle[imported]), colours[room], n_modules)
    note = "An arrow points at what is imported; its width grows with the number of importing modules."
    axes.text(width / 2, -0.25, note, ha="center", va="center", fontsize=8, color=FAINT)
    # Text stays text, and no date or random name makes two drawings of the same package differ.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "paretoprune"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


def _draw_room(axes: Axes, room: str, y: float) -> None:
    """A box with the room's name, its purpose and, for a folder, its number of modules."""
    is_folder = (PACKAGE / room).is_dir()
    box = FancyBboxPatch(
        (MARGIN, y - HEIGHT / 2),
        BOX,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=PALE if is_folder else "white",
        edgecolor=INK if is_folder else FAINT,
        linewidth=1.1 if is_folder else 0.8,
        gid=f"room-{room}",
        zorder=3,
    )
    axes.add_patch(box)
    left, right = MARGIN + 0.12, MARGIN + BOX - 0.12
    name = room if is_folder else f"{room}.py"
    axes.text(left, y + 0.08, name, va="center", fontsize=9.5, weight="bold", color=INK, zorder=4)
    axes.text(left, y - 0.1, purpose(room), va="center", fontsize=7, color=INK, zorder=4)
    if is_folder:
        n_modules = sum(path.name != "__init__.py" for path in (PACKAGE / room).rglob("*.py"))
        count = f"{n_modules} modules"
        axes.text(right, y + 0.08, count, ha="right", va="center", fontsize=7, color=FAINT, zorder=4)


def _draw_import(axes: Axes, names: tuple[str, str], heights: tuple[float, float], colour: str, n_modules: int) -> None:
    """An arc from a room to one that it imports."""
    # Rooms use one another on the right; single modules, which nearly everybody uses, hang on the left.
    side = 1 if (PACKAGE / names[1]).is_dir() else -1
    x = MARGIN + (BOX if side > 0 else 0)
    # Arcs leave in the lower half of a box and arrive in the upper one, so that both ends can be told apart.
    start, end = heights[0] - PORT, heights[1] + PORT
    bulge = side * min(1.25 * MARGIN, 0.3 + 0.24 * (start - end) ** 0.95)
    curve = Curve(
        [(x, start), (x + bulge, start), (x + bulge, end), (x, end)],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )
    arrow = FancyArrowPatch(
        path=curve,
        arrowstyle="-|>,head_length=4,head_width=2",
        linewidth=0.3 + 0.6 * n_modules,
        color=colour,
        alpha=0.75,
        shrinkA=0,
        shrinkB=0,
        # Short arcs lie on top of wide ones.
        zorder=2 - 0.01 * (start - end),
        gid=f"import-{names[0]}-{names[1]}",
    )
    axes.add_patch(arrow)


if __name__ == "__main__":
    draw(DRAWING)
