"""How methods and figures look: one style per method in every figure of a run, and one in those of the comparison."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import seaborn as sns

# Two-phase searches have strong colours and solid lines, the others muted colours and dashes. This shows in grey, too.
_COLORS = {
    "two_phase": ("#C8102E", "#0B6FB8", "#7B3FA0", "#12805C"),
    "channels": ("#1A9BA8", "#E36AA0"),
    "flat": ("#E08A00", "#A6761D", "#C26A8A"),
    "allocation": ("#5F7285", "#9A8C7A", "#7FA39A", "#A89BBF", "#4A4A4A", "#B7A24B"),
}
_DASHES: dict[str, tuple[Any, ...]] = {
    "two_phase": ("-",),
    "channels": ("-",),
    "flat": ((0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2))),
    "allocation": ((0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (2.5, 1.2)), (0, (9, 3))),
}
_MARKERS = {
    "two_phase": ("o", "s", "D", "P"),
    "channels": ("*", "X"),
    "flat": ("^", "v"),
    "allocation": ("p", "<", ">", "h", "d", "X"),
}
_WIDTHS = {"two_phase": 2.2, "channels": 2.2, "flat": 1.8, "allocation": 1.5}


# Okabe and Ito's colours, which colour-blind readers can tell apart; each has a dash and a marker for print in grey.
_COMPARED: tuple[tuple[str, Any, str], ...] = (
    ("#D55E00", "-", "o"),
    ("#0072B2", (0, (6, 1.6)), "s"),
    ("#009E73", (0, (1.4, 1.2)), "^"),
    ("#CC79A7", (0, (6, 1.6, 1.4, 1.6)), "D"),
    ("#56B4E9", (0, (3, 1.4)), "v"),
)
MOST_SHOWN = len(_COMPARED)

DENSE_COLOR = "#222222"
# The line of the dense network's error, as `Axes.axhline` takes it.
DENSE_LINE: dict[str, Any] = {"color": DENSE_COLOR, "lw": 1.1, "ls": (0, (5, 4))}


@dataclass(frozen=True)
class MethodStyle:
    """How a method looks.

    Attributes:
        color: Hexadecimal colour.
        dashes: Line style as matplotlib takes it.
        marker: Marker as matplotlib takes it.
        width: Line width in points.
        zorder: Lines with a higher value are drawn above others.
        searches: Whether it searches until its evaluations are spent. An allocation does not.
    """

    color: str
    dashes: Any
    marker: str
    width: float
    zorder: float
    searches: bool = True

    @property
    def bold(self) -> bool:
        """Whether its line stands out."""
        return self.width > 2

    @property
    def line(self) -> dict[str, Any]:
        """Line properties as `Axes.plot` takes them."""
        return {"color": self.color, "ls": self.dashes, "lw": self.width, "zorder": self.zorder}

    @property
    def band(self) -> dict[str, Any]:
        """Properties of the band around the line as `Axes.fill_between` takes them."""
        return {"color": self.color, "alpha": 0.09 * self.width, "lw": 0}


def method_styles(kinds: Mapping[str, str]) -> dict[str, MethodStyle]:
    """Give each method its style, the same in every figure of the runs.

    Args:
        kinds: "two_phase", "flat" or "allocation" per method, in the order in which they are listed.
    """
    looks = {
        kind: zip(cycle(_COLORS[kind]), cycle(_DASHES[kind]), cycle(_MARKERS[kind]), strict=False) for kind in _COLORS
    }
    return {
        method: MethodStyle(
            *next(looks[kind]),
            width=_WIDTHS[kind],
            zorder=4.0 if kind == "two_phase" else 3.0,
            searches=kind != "allocation",
        )
        for method, kind in kinds.items()
    }


def comparison_styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """Give each method its style in the figures of the comparison, the first the boldest.

    Args:
        methods: The reference and at most `MOST_SHOWN` - 1 others.

    Raises:
        ValueError: There are more methods than styles that can be told apart.
    """
    if len(methods) > MOST_SHOWN:
        raise ValueError(f"expected at most {MOST_SHOWN} methods to draw, found {len(methods)}; choose among them")
    return {
        method: MethodStyle(*look, width=2.4 if i == 0 else 1.7, zorder=4.0 - 0.1 * i)
        for i, (method, look) in enumerate(zip(methods, _COMPARED, strict=False))
    }


@contextmanager
def figure_style() -> Iterator[None]:
    """Set the look of figures inside the block and restore every matplotlib setting after it."""
    look = {
        **sns.plotting_context("notebook", font_scale=0.82),
        **sns.axes_style("ticks"),
        "axes.edgecolor": "#5A6572",
        "axes.grid": True,
        "axes.labelcolor": "#2B333C",
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 10.5,
        "figure.facecolor": "white",
        "grid.color": "#E6EAEE",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
        # Equal results give equal files: no random element ids.
        "svg.hashsalt": "paretoprune",
        "text.color": "#2B333C",
        "xtick.color": "#5A6572",
        "ytick.color": "#5A6572",
        "xtick.labelcolor": "#2B333C",
        "ytick.labelcolor": "#2B333C",
    }
    with mpl.rc_context(look):
        yield
