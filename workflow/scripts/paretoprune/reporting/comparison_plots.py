"""Figures of `comparison`: fronts and searches with their spread over seeds, and differences to the reference.

As in `run_plots`, every `draw_*` function returns a `Figure`. Call them inside `styles.figure_style()`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from paretoprune.reporting.figures import despined, legend_below, panel_grid
from paretoprune.reporting.styles import DENSE_COLOR, DENSE_LINE, MethodStyle

_OTHER_COLOR = "#B9C1C9"
_RUN_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_RUN_MARKERS = ("o", "s", "^", "D", "v", "P")

_COLUMNS = 3
# Right edges of the numbers beside the paired differences, in points from the panel.
_TABLE_COLUMNS = (44, 104, 152)
_ZOOM_POINTS = 15.0
# A search climbs steeply at first. The vertical axis is fitted to what comes after this share of the evaluations.
_SETTLED = 0.15


def draw_attainment(
    surfaces: Mapping[str, Mapping[str, pd.DataFrame]],
    dense_errors: Mapping[str, float],
    styles: Mapping[str, MethodStyle],
) -> Figure:
    """Draw the attained test error against sparsity: median over seeds, and a band from the best to the worst.

    Args:
        surfaces: Per run and method, from `attainment.attainment_surfaces` on "test_error".
        dense_errors: Test error of the dense network per run, a share, mean over seeds.
        styles: From `styles.comparison_styles`; the methods drawn.
    """
    figure, panels = panel_grid(len(surfaces), width=4.3, height=3.9, max_columns=_COLUMNS)
    for axes, (run, methods) in zip(panels, surfaces.items(), strict=True):
        dense = 100 * dense_errors[run]
        for method, style in styles.items():
            stairs = _stairs(methods[method])
            if stairs is None:
                continue
            sparsity, best, median, worst = stairs
            axes.fill_between(sparsity, best, worst, step="pre", **style.band)
            axes.plot(sparsity, median, drawstyle="steps-pre", **style.line)
        axes.axhline(dense, zorder=2, **DENSE_LINE)
        axes.set(title=run, xlabel="sparsity: at least this removed (%)")
        axes.set_ylim(max(0.0, dense - 2), dense + _ZOOM_POINTS)
        window = _window([methods[method] for method in styles], dense_errors[run])
        if window is not None:
            axes.set_xlim(window)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("test error attained (%)")
    handles: list[Artist] = [Line2D([], [], label=method, **style.line) for method, style in styles.items()]
    handles.append(Line2D([], [], label="dense network", **DENSE_LINE))
    handles.append(Patch(color=_OTHER_COLOR, alpha=0.6, lw=0, label="best to worst seed"))
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    return despined(figure)


def _stairs(surface: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Sparsity, best, median and worst error in %, by ascending sparsity; None for a front without members."""
    if not len(surface):
        return None
    # The densest member's error holds up to density 1, too: it keeps no more than is allowed there.
    ends = pd.concat([surface, surface.iloc[[-1]].assign(density=1.0)]).iloc[::-1]
    sparsity = 100 * (1 - ends["density"].to_numpy(dtype=float))
    best, median, worst = (
        100 * ends[column].where(np.isfinite(ends[column])).to_numpy(dtype=float)
        for column in ("best", "median", "worst")
    )
    return sparsity, best, median, worst


def _window(surfaces: Sequence[pd.DataFrame], dense_error: float) -> tuple[float, float] | None:
    """The range of sparsities in % in which errors rise above the dense network's; None if no method comes near it."""

    def sparsest(surface: pd.DataFrame, column: str, points: float) -> float:
        near = surface.loc[surface[column] <= dense_error + points / 100, "density"]
        return 100 * (1 - float(near.min())) if len(near) else np.nan

    right = np.array([sparsest(surface, "best", _ZOOM_POINTS) for surface in surfaces])
    left = np.array([sparsest(surface, "median", 1.0) for surface in surfaces])
    if np.isnan(right).all():
        return None
    end = float(np.nanmax(right))
    start = end if np.isnan(left).all() else float(np.nanmedian(left))
    return max(0.0, min(start, end) - 15), min(100.0, end + 2)


def draw_hypervolume_bands(
    bands: Mapping[str, Mapping[str, pd.DataFrame]],
    ends: Mapping[str, Mapping[str, float]],
    styles: Mapping[str, MethodStyle],
) -> Figure:
    """Draw hypervolume against evaluations: median over seeds, and a band from the smallest to the largest.

    Args:
        bands: Per run and method, from `attainment.hypervolume_bands`, every method on the run's own grid.
        ends: Per run and method, evaluations at its end, the largest over seeds.
        styles: From `styles.comparison_styles`: the methods with colour and band. All others are thin and grey.
    """
    figure, panels = panel_grid(len(bands), width=4.3, height=3.9, max_columns=_COLUMNS)
    for axes, (run, methods) in zip(panels, bands.items(), strict=True):
        for method in methods:
            if method not in styles:
                band = methods[method]
                axes.plot(band["evaluations"], band["median"], drawstyle="steps-post", color=_OTHER_COLOR, lw=0.9)
        for method, style in styles.items():
            band, end = methods[method], ends[run][method]
            axes.fill_between(band["evaluations"], band["low"], band["high"], step="post", **style.band)
            axes.plot(band["evaluations"], band["median"], drawstyle="steps-post", **style.line)
            last = float(band["median"].iloc[-1])
            axes.plot(end, last, marker=style.marker, ms=6, color=style.color, mec="white", zorder=5, clip_on=False)
        axes.set(title=run, xlabel="evaluations")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlim(0, 1.03 * max(ends[run].values()))
        shown = [methods[method] for method in styles]
        settled = [band[band["evaluations"] >= _SETTLED * band["evaluations"].max()] for band in shown]
        low = min(float(band["low"].min()) for band in settled)
        high = max(float(band["high"].max()) for band in settled)
        margin = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("hypervolume, search split")
    handles: list[Artist] = [
        Line2D([], [], label=method, marker=style.marker, ms=5.5, mec="white", **style.line)
        for method, style in styles.items()
    ]
    if any(method not in styles for methods in bands.values() for method in methods):
        handles.append(Line2D([], [], color=_OTHER_COLOR, lw=0.9, label="other methods"))
    handles.append(Patch(color=_OTHER_COLOR, alpha=0.6, lw=0, label="least to largest over seeds"))
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    return despined(figure)


def draw_paired_differences(
    differences: Mapping[str, pd.DataFrame], tests: pd.DataFrame, titles: Mapping[str, str]
) -> Figure:
    """Draw the hypervolume of the reference minus that of every other method, pair by pair, sorted by median.

    Args:
        differences: Per measure, from `comparison.paired_differences`; the first measure sorts the methods.
        tests: From `comparison.compare_methods`.
        titles: What each measure is called.
    """
    first = next(iter(differences.values()))
    order = list(first.groupby("method", sort=False)["difference"].median().sort_values(kind="stable").index)
    runs = list(dict.fromkeys(zip(first["dataset"], first["network"], strict=True)))
    figure = Figure(figsize=(6.3 * len(differences), 1.7 + 0.36 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(differences), sharey=True, squeeze=False)[0]
    for axes, (measure, table) in zip(panels, differences.items(), strict=True):
        _draw_differences(axes, table, order, runs)
        _annotate_row(axes, -0.85, ("median", "+ / = / −", "p, Holm"))
        for row in tests[tests["measure"] == measure].to_dict("records"):
            p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
            median = f"{row['median_difference']:+.4f}".replace("-", "−")
            counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
            _annotate_row(axes, order.index(row["method"]), (median, counts, p))
        axes.set(title=titles[measure], xlabel="reference − method")
    panels[0].set_yticks(range(len(order)), order)
    panels[0].set_ylim(len(order) - 0.4, -1.2)
    handles: list[Artist] = [
        Line2D([], [], ls="none", marker=marker, ms=5, color=color, alpha=0.75, label=f"{dataset} / {network}")
        for (dataset, network), color, marker in _run_marks(runs)
    ]
    handles.append(Line2D([], [], ls="none", marker="|", ms=13, mew=2.4, color=DENSE_COLOR, label="median"))
    handles.append(Line2D([], [], lw=3, color="#8A949E", label="middle half"))
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    return despined(figure)


def _annotate_row(axes: Axes, y: float, texts: Sequence[str]) -> None:
    """Write a row of a table to the right of `axes`, its columns aligned on the right."""
    for text, offset in zip(texts, _TABLE_COLUMNS, strict=True):
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "annotation_clip": False,
        }
        axes.annotate(text, (1.0, y), (offset, 0), ha="right", va="center", fontsize=8.5, **place)


def _run_marks(runs: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], str, str]]:
    """Each run with its colour and marker; markers change once all colours are used."""
    return [
        (run, _RUN_COLORS[i % len(_RUN_COLORS)], _RUN_MARKERS[i // len(_RUN_COLORS) % len(_RUN_MARKERS)])
        for i, run in enumerate(runs)
    ]


def _draw_differences(axes: Axes, table: pd.DataFrame, order: Sequence[str], runs: Sequence[tuple[str, str]]) -> None:
    largest = float(table["difference"].abs().max())
    # Small and large differences share one axis: it is linear where half of them lie, and logarithmic beyond.
    threshold = max(float(table["difference"].abs().median()), 1e-3)
    if largest > 5 * threshold:
        axes.set_xscale("symlog", linthresh=threshold)
        axes.set_xticks([0.0, *_round_numbers(table["difference"].to_numpy(dtype=float), threshold / 2)])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.axvline(0, color=DENSE_COLOR, lw=1.1, zorder=2)
    lanes = np.linspace(-0.24, 0.24, len(runs)) if len(runs) > 1 else np.zeros(1)
    for y, method in enumerate(order):
        rows = table[table["method"] == method]
        low, middle, high = np.quantile(rows["difference"], (0.25, 0.5, 0.75))
        axes.plot([low, high], [y, y], color="#8A949E", lw=3, zorder=3, solid_capstyle="butt")
        for lane, ((dataset, network), color, marker) in zip(lanes, _run_marks(runs), strict=True):
            own = rows.loc[(rows["dataset"] == dataset) & (rows["network"] == network), "difference"]
            axes.plot(own, np.full(len(own), y + lane), ls="none", marker=marker, ms=4.5, color=color, alpha=0.75)
        axes.plot(middle, y, marker="|", ms=15, mew=2.4, color=DENSE_COLOR, zorder=5)
    axes.grid(axis="y", visible=False)


def _round_numbers(values: np.ndarray, smallest: float) -> list[float]:
    """1 and 3 times powers of ten on either side of 0, from `smallest` to the farthest of `values` on that side."""
    numbers = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 3)]
    return [
        sign * number for sign in (-1, 1) for number in numbers if smallest <= number <= float(np.max(sign * values))
    ]
