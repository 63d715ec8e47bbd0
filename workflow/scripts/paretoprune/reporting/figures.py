"""What every figure shares: its panels, the legend below them, its frame and its files."""

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
    """A figure of `n_panels` panels, at most `max_columns` in a row; sizes of one panel in inches."""
    columns = min(n_panels, max_columns)
    n_rows = -(-n_panels // columns)
    figure = Figure(figsize=(max(6.0, width * columns), height * n_rows), layout="constrained")
    panels = list(figure.subplots(n_rows, columns, sharey=share_y, squeeze=False).flat)
    for axes in panels[n_panels:]:
        axes.remove()
    return figure, panels[:n_panels]


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend under all panels, in as many columns, at most five, as fit the figure's width."""
    n_columns = min(5, len(labels))
    while n_columns > 1 and _legend_width(labels, n_columns) > figure.get_figwidth():
        n_columns -= 1
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, handlelength=3.2)


def _legend_width(labels: Sequence[str], n_columns: int) -> float:
    """About how wide a legend is, in inches at the font size of `figure_style`; columns are filled one by one."""
    short, n_longer = divmod(len(labels), n_columns)
    widths, first = 0.0, 0
    for column in range(n_columns):
        end = first + short + (column < n_longer)
        widths += 0.78 + 0.076 * max(len(label) for label in labels[first:end])
        first = end
    return widths


def finished(figure: Figure) -> Figure:
    """The figure without the frame lines that hold no scale."""
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            sns.despine(ax=axes)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `figure` to `stem`.svg and `stem`.png (150 dpi)."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", None)):
        with atomic_path(stem.with_name(stem.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata)
