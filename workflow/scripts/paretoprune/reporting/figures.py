"""Panels, legends, frames and files, which all figures share."""

from collections.abc import Sequence
from pathlib import Path

import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paretoprune.files import atomic_path


def panel_grid(
    n_panels: int, width: float, height: float, *, max_columns: int = 2, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure of `n_panels` panels in rows of at most `max_columns`.

    Args:
        n_panels: Number of panels.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        max_columns: Most panels in a row.
        share_y: Whether the panels share their vertical axis.

    Returns:
        The figure and its panels, row by row.
    """
    columns = min(n_panels, max_columns)
    n_rows = -(-n_panels // columns)
    figure = Figure(figsize=(max(6.0, width * columns), height * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, columns, sharey=share_y, squeeze=False).flat)
    for axes in panels[n_panels:]:
        axes.remove()
    return figure, panels[:n_panels]


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Put a legend under all panels, in as many columns as fit the figure's width, at most five."""
    n_columns = min(5, len(labels))
    while n_columns > 1 and _legend_width(labels, n_columns) > figure.get_figwidth():
        n_columns -= 1
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, handlelength=3.2)


def _legend_width(labels: Sequence[str], n_columns: int) -> float:
    """Estimate the width of a legend in inches, at the font size of `figure_style`."""
    # matplotlib fills the columns one by one; the first ones get one label more where they cannot all have the same.
    short, n_longer = divmod(len(labels), n_columns)
    widths, first = 0.0, 0
    for column in range(n_columns):
        end = first + short + (column < n_longer)
        widths += 0.78 + 0.076 * max(len(label) for label in labels[first:end])
        first = end
    return widths


def despined(figure: Figure) -> Figure:
    """The figure, now without the upper and right spines of its panels."""
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            sns.despine(ax=axes)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `figure` to `stem`.svg and `stem`.png (150 dpi)."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", None)):
        with atomic_path(stem.with_name(stem.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata)
