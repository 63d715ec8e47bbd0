"""Figures of measured times: what they were predicted to be, and what they have to do with multiply-adds.

As in `run_plots`, every `draw_*` function returns a `Figure`. Call them inside `styles.figure_style()`.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paretoprune.deployment.latency import GOOD, Checked
from paretoprune.reporting.figures import despined, legend_below
from paretoprune.reporting.styles import DENSE_COLOR, DENSE_LINE, MethodStyle

_OTHER_COLOR, _BAND_COLOR = "#9AA5B1", "#EEF1F4"
_ZOOM_POINTS = 15.0
_AXES = (("macs", "Against multiply-adds", "multiply-adds"), ("measured", "Against measured time", "measured time"))


def error_within(front: pd.DataFrame, column: str, limits: np.ndarray) -> np.ndarray:
    """Look up the test error of the member with the least search error among those within a limit.

    The test error has no part in the choice, so it may rise as well as fall with the limit.

    Args:
        front: Columns `search_error`, `test_error`, and that of the limits.
        column: Its name.
        limits: float (n,), largest values of the column.

    Returns:
        float (n,), shares; NaN where no member is within the limit.
    """
    members = front.sort_values([column, "search_error"], kind="stable")
    search = members["search_error"].to_numpy(dtype=float)
    best = np.minimum.accumulate(search)
    # The first of all members so far that is as good as the best of them.
    first = np.array([int(np.flatnonzero(search[: i + 1] == best[i])[0]) for i in range(len(search))], dtype=np.int64)
    position = np.searchsorted(members[column].to_numpy(dtype=float), limits, side="right") - 1
    errors = members["test_error"].to_numpy(dtype=float)[first]
    return np.where(position >= 0, errors[np.maximum(position, 0)], np.nan)


def draw_errors_by_time(latencies: pd.DataFrame, dense_error: float, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw test error against multiply-adds, and against measured time beside it.

    Args:
        latencies: Columns `method`, `seed`, `macs`, `measured`, `search_error`, `test_error`; at least one row.
        dense_error: Test error of the dense network, a share, mean over seeds.
        styles: From `styles.method_styles`.
    """
    figure = Figure(figsize=(10.5, 4.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (column, title, what) in zip(panels, _AXES, strict=True):
        for method, style in styles.items():
            _draw_method(axes, latencies[latencies["method"] == method], column, method, style)
        axes.axhline(100 * dense_error, zorder=2, label="dense network", **DENSE_LINE)
        axes.axvline(100, zorder=2, **DENSE_LINE)
        axes.set(title=title, xlabel=f"{what} (% of the dense network's)")
        axes.set_xlim(0, 104 * max(1.0, float(latencies[column].max())))
    panels[0].set_ylabel("test error (%)")
    top = min(100 * dense_error + _ZOOM_POINTS, 103 * max(dense_error, float(latencies["test_error"].max())))
    panels[0].set_ylim(max(0.0, 100 * min(dense_error, float(latencies["test_error"].min())) - 1), top)
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return despined(figure)


def _draw_method(axes: Axes, rows: pd.DataFrame, column: str, method: str, style: MethodStyle) -> None:
    """The members as marks, and a line for each seed through those that the search errors choose."""
    seeds = [front for _, front in rows.groupby("seed")]
    for i, front in enumerate(seeds):
        limits = np.append(np.unique(front[column].to_numpy(dtype=float)), max(1.0, float(rows[column].max())))
        errors = error_within(front, column, limits)
        line = style.line | {"lw": style.width if len(seeds) == 1 else 1.4}
        label = method if i == 0 else None
        axes.plot(100 * limits, 100 * errors, drawstyle="steps-post", label=label, alpha=0.9, **line)
        axes.plot(
            100 * front[column], 100 * front["test_error"], ls="none", marker=style.marker, ms=7.5, color=style.color,
            mec="white", mew=0.5, alpha=0.7, zorder=5,
        )  # fmt: skip


def draw_predictions(latencies: pd.DataFrame, checked: Checked | None, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw predicted against measured times, relative to the dense network, with the band of small errors.

    Args:
        latencies: Columns `method`, `predicted` (NaN where there is none), `measured`.
        checked: Predictions for random networks; None where there are none.
        styles: From `styles.method_styles`.
    """
    known = latencies[latencies["predicted"].notna()]
    values = [known["predicted"], known["measured"]]
    if checked:
        values += [pd.Series(checked.predicted), pd.Series(checked.measured)]
    end = 104 * max(1.0, *(float(value.max()) for value in values))
    figure = Figure(figsize=(6.6, 6.2), layout="constrained")
    axes = figure.subplots()
    line = np.array([0.0, end])
    axes.fill_between(
        line,
        (1 - GOOD) * line,
        (1 + GOOD) * line,
        color=_BAND_COLOR,
        lw=0,
        zorder=1,
        label=f"within {100 * GOOD:.0f} %",
    )
    axes.plot(line, line, zorder=2, color=DENSE_COLOR, lw=1)
    if checked:
        label = f"random networks: {checked.n_good} of {len(checked.errors)} within {100 * GOOD:.0f} %"
        axes.plot(
            100 * np.array(checked.measured), 100 * np.array(checked.predicted), ls="none", marker="o", ms=5.5,
            mfc="white", mec=_OTHER_COLOR, mew=1.4, zorder=3, label=label,
        )  # fmt: skip
    for method, style in styles.items():
        rows = known[known["method"] == method]
        if len(rows):
            n_good = int((np.abs(rows["predicted"] / rows["measured"] - 1) <= GOOD).sum())
            axes.errorbar(
                100 * rows["measured"], 100 * rows["predicted"], xerr=100 * rows["measured"] * rows["uncertainty"],
                ls="none", marker=style.marker, ms=7, color=style.color, mec="white", mew=0.6, elinewidth=1, zorder=4,
                label=f"members of {method}: {n_good} of {len(rows)} within {100 * GOOD:.0f} %",
            )  # fmt: skip
    axes.set(
        xlabel="measured time (% of the dense network's)", ylabel="predicted time (% of the dense network's)",
        xlim=(0, end), ylim=(0, end), aspect="equal",
    )  # fmt: skip
    axes.legend(loc="upper left")
    return despined(figure)
