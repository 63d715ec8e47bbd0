"""The tables and the figure of `channels.json`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from paretoprune.files import atomic_path, read_json
from paretoprune.reporting.figures import despined, legend_below, panel_grid
from paretoprune.reporting.styles import DENSE_LINE, MethodStyle, figure_style

from benchmarks.channels.measuring import Row, difference

# Of a tool that recalibrates batch norms by itself.
OWN_REPAIR = "its own"
# What is put right, and the repairs that count as it.
REPAIRS: Mapping[str, tuple[str, ...]] = {
    "no repair": ("none",),
    "batch norm corrected": ("batchnorm", OWN_REPAIR),
    "every layer re-fitted": ("reconstruct",),
}
OURS, ONE_SHOT = "paretoprune", "paretoprune, one shot"
# How far what is removed may be from the level before a table says so.
TOLD = 0.01

Way = tuple[str, str, str]
_COLORS = {
    "group norm": ("#0072B2", "s"),
    "batch-norm scale": ("#009E73", "^"),
    "Taylor": ("#CC79A7", "D"),
    "uniform": ("#7A7A7A", "p"),
    "modelopt": ("#E0A100", "X"),
    "ours": ("#D55E00", "o"),
}
_DASHES: Mapping[str, Any] = {
    "least loss": (0, (2.5, 1, 1, 1)),
    "local": (0, (1.4, 1.2)),
    "global": (0, (5, 1.6)),
    "searched": "-",
}
# A way that lies on another.
_NOT_DRAWN = (("uniform", "magnitude", "local"),)


def way_of(row: Row) -> Way:
    """What chose the channels of a row; a tool's own repair is a way of its own."""
    return row["tool"], row["importance"], row["repair"] if row["repair"] == OWN_REPAIR else row["allocation"]


def label(way: Way) -> str:
    """A way in words."""
    tool, importance, allocation = way
    if tool == OURS:
        return f"{tool}, searched"
    if tool.startswith("ModelOpt"):
        return f"{tool}, {OWN_REPAIR}" if allocation == OWN_REPAIR else tool
    if tool == "uniform":
        return f"uniform, {importance}"
    if tool == ONE_SHOT:
        return f"{tool}, {allocation}"
    return f"{tool}, {importance}, {allocation}"


def write(path: Path) -> None:
    """Write `channels.md` and `channels.png` beside the results."""
    networks = read_json(path)["networks"]
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines(networks)) + "\n", encoding="utf-8")
    with figure_style(), atomic_path(path.with_suffix(".png")) as temporary:
        draw(networks).savefig(temporary, dpi=150)


def lines(networks: Mapping[str, Any]) -> Iterator[str]:
    """The tables of all networks, line by line."""
    for i, (name, found) in enumerate(networks.items()):
        if i:
            yield ""
        dense, rows = found["dense"], found["rows"]
        yield f"**{name}**: dense {_percent(dense)} % on {found['n_test']} test images."
        for title, repairs in REPAIRS.items():
            yield ""
            yield from table(title, [row for row in rows if row["repair"] in repairs])
        yield ""
        yield from differences(rows, found["n_test"])


def table(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """Accuracies after one repair, a line for each way."""
    levels = sorted({row["level"] for row in rows})
    yield _line(title, *(f"−{100 * level:.0f} %" for level in levels))
    yield "|---|" + "---|" * len(levels)
    best = {level: max(row["accuracy"] for row in rows if row["level"] == level) for level in levels}
    for way in dict.fromkeys(map(way_of, rows)):
        at = {row["level"]: row for row in rows if way_of(row) == way}
        tried = max(row["tried"] for row in at.values())
        name = label(way) + (f" ({tried} tried)" if tried > 1 else "")
        cells = [_cell(at[level], best[level]) if level in at else "" for level in levels]
        yield _line(name, *cells)


def differences(rows: Sequence[Row], n_images: int) -> Iterator[str]:
    """How far ours is above every other way, as it comes and with our repair; errors are of paired differences."""
    reference = reference_of(rows)
    if reference is None:
        return
    ours = {row["level"]: row for row in rows if way_of(row) == reference and row["repair"] == "reconstruct"}
    others = [row for row in rows if way_of(row)[0] not in (OURS, ONE_SHOT)]
    levels = sorted(ours)
    yield _line(f"{label(reference)}, re-fitted, minus", *(f"−{100 * level:.0f} %" for level in levels))
    yield "|---|" + "---|" * len(levels)
    repairing = {row["tool"] for row in others if row["repair"] == OWN_REPAIR}
    as_it_comes = [row for row in others if row["repair"] == (OWN_REPAIR if row["tool"] in repairing else "none")]
    refitted = [row for row in others if row["repair"] == "reconstruct"]
    for name, compared in (("as it comes", as_it_comes), ("with our repair", refitted)):
        for way in dict.fromkeys(map(way_of, compared)):
            at = {row["level"]: row for row in compared if way_of(row) == way}
            cells = []
            for level in levels:
                found = difference(ours[level], at[level], n_images) if level in at else None
                cells.append("" if found is None else f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f}".replace("-", "−"))
            yield _line(f"{label(way).removesuffix(f', {OWN_REPAIR}')}, {name}", *cells)


def reference_of(rows: Sequence[Row]) -> Way | None:
    """Ours: what was searched, or else the best way in one shot."""
    mine = [way for way in dict.fromkeys(map(way_of, rows)) if way[0] in (OURS, ONE_SHOT)]
    return min(mine, key=lambda way: (way[0] != OURS, way[2] != "least measured loss"), default=None)


def draw(networks: Mapping[str, Any]) -> Figure:
    """Accuracy against multiply-adds, a panel for each network and repair."""
    figure, panels = panel_grid(len(networks) * len(REPAIRS), 4.6, 4.3, max_columns=len(REPAIRS))
    panels_of = iter(panels)
    handles: dict[str, Any] = {}
    for name, found in networks.items():
        for title, repairs in REPAIRS.items():
            axes = next(panels_of)
            rows = [row for row in found["rows"] if row["repair"] in repairs]
            for way in sorted(dict.fromkeys(map(way_of, rows)), key=_order):
                if way in _NOT_DRAWN:
                    continue
                at = sorted((row for row in rows if way_of(row) == way), key=lambda row: row["removed"])
                look = style(way)
                x, y, bars = ([100 * row[key] for row in at] for key in ("removed", "accuracy", "standard_error"))
                (drawn,) = axes.plot(x, y, marker=look.marker, ms=5.5 + look.bold, mec="white", mew=0.6, **look.line)
                if look.bold:
                    axes.errorbar(
                        x, y, bars, fmt="none", ecolor=look.color, elinewidth=1, capsize=2, zorder=look.zorder
                    )
                handles.setdefault(label(way), drawn)
            line = axes.axhline(100 * found["dense"]["accuracy"], zorder=1, **DENSE_LINE)
            handles.setdefault("dense network", line)
            axes.set(xlabel="multiply-adds removed (%)", title=f"{_name(name)}, {title}")
            if title == next(iter(REPAIRS)):
                axes.set(ylabel="test accuracy, nothing trained (%)")
    legend_below(figure, list(handles.values()), list(handles))
    return despined(figure)


def style(way: Way) -> MethodStyle:
    """How a way is drawn: a colour for each importance, dashes for how layers share what is removed."""
    tool, importance, allocation = way
    key = importance if tool == "torch-pruning" else tool if tool in _COLORS else "ours"
    key = "modelopt" if tool.startswith("ModelOpt") else key
    color, marker = _COLORS[key]
    if tool == OURS:
        return MethodStyle(color, "-", marker, 2.4, 5.0)
    dashes = _DASHES.get(allocation, (0, (3, 1.4)))
    return MethodStyle(color, dashes, marker, 1.6, 4.5 if tool == ONE_SHOT else 3.0)


def _order(way: Way) -> tuple[Any, ...]:
    """Ours first, then other tools."""
    tool, importance, allocation = way
    return tool != OURS, tool != ONE_SHOT, tool == "uniform", tool.startswith("ModelOpt"), importance, allocation


def _name(network: str) -> str:
    return network.replace("resnet", "ResNet-")


def _percent(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}"


def _cell(row: Row, best: float) -> str:
    text = f"**{_percent(row)}**" if row["accuracy"] == best else _percent(row)
    beyond = abs(row["removed"] - row["level"]) >= TOLD
    return f"{text} (−{100 * row['removed']:.1f} %)" if beyond else text


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
