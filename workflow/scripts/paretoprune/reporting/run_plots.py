"""Figures of one run, drawn from tables.

Every `draw_*` function returns a matplotlib `Figure` that is made without pyplot. So no backend is chosen and no figure
stays open. Call them, and `figures.save_figure`, inside `styles.figure_style()`. Shares are drawn in %.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from paretoprune.reporting.attainment import hypervolume_at
from paretoprune.reporting.figures import despined, legend_below, panel_grid
from paretoprune.reporting.styles import DENSE_LINE, MethodStyle

_STAGE_COLORS = {"start": "#6B7683", "phase1": "#2F7EBB", "reselected": "#2E9E6B", "phase2": "#E4572E"}
_OTHER_STAGE_COLORS = ("#12805C", "#7B3FA0", "#A6761D")
_STAGE_NAMES = {"start": "first population", "phase1": "Phase 1", "reselected": "chosen anew", "phase2": "Phase 2"}
_CORRIDOR_PARTS = (
    ("n_always_kept", "always kept", "#274060"),
    ("n_corridor", "searched in Phase 2", "#F2A541"),
    ("n_always_dropped", "always dropped", "#DDE2E8"),
)

_ZOOM_POINTS = 15.0
_MAX_COLUMNS = 2
# Beyond this many rows, tick labels would overlap at the tallest figure that is still readable on a page.
_MAX_LAYER_LABELS = 60


def error_at_sparsity(front: pd.DataFrame, sparsities: np.ndarray) -> np.ndarray:
    """Look up the test error of the densest member that removes at least a given share of the weights.

    The test error has no part in the choice, so it may fall as well as rise with the sparsity.

    Args:
        front: Columns `sparsity` and `test_error`, shares.
        sparsities: float (n,), least shares of weights removed, 0 to 1.

    Returns:
        float (n,), shares; NaN beyond the sparsest member.
    """
    members = front.sort_values("sparsity", kind="stable")
    position = np.searchsorted(members["sparsity"].to_numpy(dtype=float), sparsities, side="left")
    return np.append(members["test_error"].to_numpy(dtype=float), np.nan)[position]


def draw_fronts(fronts: pd.DataFrame, dense_error: float, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw test error against sparsity: the whole range, and a panel close to the dense network.

    Args:
        fronts: Columns `method`, `seed`, `sparsity`, `test_error`, shares; at least one row.
        dense_error: Test error of the dense network, a share, mean over seeds.
        styles: From `styles.method_styles`; a method without members is left out.
    """
    # The grid has the sparsities of all seeds' members, so every step is where it belongs. A mean over the seeds that
    # are left would jump where one of them ends. So the mean stops there, since its values are NaN beyond.
    grids, curves, means = {}, {}, {}
    for method, rows in _by_method(fronts, styles):
        grids[method] = np.union1d([0.0], rows["sparsity"].to_numpy(dtype=float))
        curves[method] = np.stack([error_at_sparsity(front, grids[method]) for _, front in rows.groupby("seed")])
        means[method] = curves[method].mean(axis=0)
    window = _zoom_window(grids, means, dense_error)
    figure = Figure(figsize=(10.5 if window else 7.0, 5.0), layout="constrained")
    panels = figure.subplots(1, 2 if window else 1, squeeze=False)[0]
    for axes in panels:
        for method, seeds in curves.items():
            style, sparsity = styles[method], 100 * grids[method]
            for seed in seeds if len(seeds) > 1 else ():
                alpha = 0.3 if style.bold else 0.18
                axes.plot(sparsity, 100 * seed, color=style.color, lw=0.7, alpha=alpha, drawstyle="steps-pre")
            axes.plot(sparsity, 100 * means[method], label=method, drawstyle="steps-pre", **style.line)
        axes.axhline(100 * dense_error, zorder=2, label="dense network", **DENSE_LINE)
        axes.set(xlabel="sparsity: weights removed (%)")
    panels[0].set(ylabel="test error (%)", title="Whole range")
    panels[0].set_xlim(100 * fronts["sparsity"].min() - 1, 100 * fronts["sparsity"].max() + 1)
    panels[0].set_ylim(bottom=0)
    if window:
        panels[1].set(title=f"Close to the dense network: up to {_ZOOM_POINTS:.0f} points more error")
        panels[1].set(xlim=(100 * window[0], 100 * window[1]))
        panels[1].set_ylim(max(0.0, 100 * dense_error - 2), 100 * dense_error + _ZOOM_POINTS)
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return despined(figure)


def draw_hypervolume(histories: pd.DataFrame, styles: Mapping[str, MethodStyle], *, largest: float = 1.0) -> Figure:
    """Draw hypervolume against evaluations: mean and one standard deviation over seeds.

    A search ends at a marker. An allocation, which evaluates only its few densities, continues as a level line.

    Args:
        histories: Columns `method`, `seed`, `evaluations`, `hypervolume`, `stage`.
        styles: From `styles.method_styles`.
        largest: Largest possible hypervolume, of a network without loss and cost.
    """
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    end = float(histories["evaluations"].max())
    for method, rows in _by_method(histories, styles):
        style = styles[method]
        seeds = [history for _, history in rows.groupby("seed")]
        last = float(rows["evaluations"].max())
        grid = np.unique(rows["evaluations"].to_numpy(dtype=float))
        values = np.stack([hypervolume_at(history, grid) for history in seeds])
        mean = values.mean(axis=0)
        axes.plot(grid, mean, drawstyle="steps-post", label=method, **style.line)
        if len(seeds) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(grid, mean - spread, mean + spread, step="post", color=style.color, alpha=0.13, lw=0)
        if style.searches:
            axes.plot(last, mean[-1], marker=style.marker, ms=6, color=style.color, mec="white", zorder=5)
        else:
            axes.plot([last, end], [mean[-1]] * 2, **style.line)
        starts = [
            history.loc[history["stage"] != "phase2", "evaluations"].max()
            for history in seeds
            if {"phase1", "phase2"} <= set(history["stage"])
        ]
        if starts:
            start = float(np.mean(starts))
            height = float(np.mean([hypervolume_at(history, np.array([start]))[0] for history in seeds]))
            axes.plot(start, height, marker="o", ms=7, mfc="white", mec=style.color, mew=1.8, zorder=5)
    axes.set(
        xlabel="evaluations: pruned networks measured", ylabel=f"hypervolume on the search split (0 to {largest:.4g})"
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, 1.03 * end)
    handles, labels = axes.get_legend_handles_labels()
    if (histories["stage"] == "phase2").any():
        handles.append(Line2D([], [], ls="none", marker="o", ms=7, mfc="white", mec="#5A6572", mew=1.8))
        labels.append("Phase 2 begins")
    legend_below(figure, handles, labels)
    return despined(figure)


def draw_phase2_gain(summary: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw the hypervolume after Phase 1 and at the end of the search, per seed.

    Args:
        summary: Columns `method`, `seed`, `hypervolume_phase1`, `phase2_gain`; one row per two-phase method and seed.
        styles: From `styles.method_styles`.
    """
    figure = Figure(figsize=(8.0, 1.2 + 0.32 * len(summary) + 0.15 * summary["method"].nunique()), layout="constrained")
    axes = figure.subplots()
    ticks, labels, y = [], [], 0.0
    for method, rows in _by_method(summary, styles):
        color = styles[method].color
        for seed, before, gain in zip(rows["seed"], rows["hypervolume_phase1"], rows["phase2_gain"], strict=True):
            axes.plot([before, before + gain], [y, y], color=color, lw=2.6, alpha=0.55, zorder=3)
            axes.plot(before, y, marker="o", ms=7, mfc="white", mec=color, mew=1.6, zorder=4)
            axes.plot(before + gain, y, marker="o", ms=7, color=color, zorder=5)
            axes.annotate(
                f"{gain:+.4f}", (before + gain, y), (10, 0), textcoords="offset points", va="center", fontsize=8.5
            )
            ticks.append(y)
            labels.append(f"{method}, seed {seed}")
            y += 1.0
        y += 0.5
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="hypervolume on the search split", ylim=(y - 1.0, -0.5))
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    grey = "#5A6572"
    handles = [
        Line2D([], [], ls="none", marker="o", ms=7, mfc="white", mec=grey, mew=1.6),
        Line2D([], [], ls="none", marker="o", ms=7, color=grey),
    ]
    figure.legend(handles, ["after Phase 1", "after Phase 2"], loc="outside upper right", ncols=2)
    return despined(figure)


def draw_stages(fronts: pd.DataFrame, methods: Sequence[str], error_label: str) -> Figure:
    """Draw the front on the search split, each member in the colour of the stage that found it.

    Args:
        fronts: One seed's members: columns `method`, `stage`, `sparsity`, `search_error`, shares.
        methods: Methods to draw, a panel each.
        error_label: What `search_error` is, with its unit in %.
    """
    figure, panels = panel_grid(len(methods), width=4.2, height=3.5)
    found = list(dict.fromkeys(fronts.loc[fronts["method"].isin(methods), "stage"]))
    order = [stage for stage in _STAGE_COLORS if stage in found] + [s for s in found if s not in _STAGE_COLORS]
    others = cycle(_OTHER_STAGE_COLORS)
    colors = {stage: _STAGE_COLORS.get(stage) or next(others) for stage in order}
    for axes, method in zip(panels, methods, strict=True):
        members = fronts[fronts["method"] == method].sort_values("sparsity")
        axes.plot(100 * members["sparsity"], 100 * members["search_error"], color="#C3CBD3", lw=1, zorder=2)
        for stage in order:
            rows = members[members["stage"] == stage]
            if len(rows):
                axes.scatter(
                    100 * rows["sparsity"],
                    100 * rows["search_error"],
                    s=22,
                    color=colors[stage],
                    lw=0.4,
                    ec="white",
                    zorder=3,
                    label=f"{_STAGE_NAMES.get(stage, stage)} ({len(rows)} of {len(members)})",
                )
        axes.set(title=method, xlabel="sparsity (%)", ylabel=error_label)
        # Fronts rise to the right: the upper left is free.
        axes.legend(loc="upper left", handletextpad=0.2)
    return despined(figure)


def draw_layer_densities(layers: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw the share of weights that each member of a front keeps in each layer.

    Args:
        layers: One seed's rows: columns `method`, `id`, `sparsity` (of the member, a share), `layer` (in network
            order), `n_weights`, `n_kept`.
        methods: Methods to draw, a panel each.
    """
    names = list(dict.fromkeys(layers["layer"]))
    figure, panels = _layer_panels(names, len(methods))
    percent = mpl.colors.Normalize(0, 100)
    for axes, method in zip(panels, methods, strict=True):
        rows = layers[layers["method"] == method].sort_values("sparsity", kind="stable")
        table = (
            rows.assign(share=100 * rows["n_kept"] / rows["n_weights"])
            .pivot_table(index="layer", columns="id", values="share", sort=False)
            .reindex(index=names)
        )
        sparsity = rows.drop_duplicates("id").set_index("id")["sparsity"].reindex(table.columns).to_numpy()
        axes.pcolormesh(table.to_numpy(), cmap="mako_r", norm=percent, rasterized=True)
        shown = np.unique(np.linspace(0, len(sparsity) - 1, min(6, len(sparsity))).round().astype(int))
        axes.set_xticks(shown + 0.5, [f"{100 * sparsity[i]:.0f}" for i in shown])
        axes.set(title=method, xlabel="members of the front, by sparsity (%)")
    bar = figure.colorbar(
        mpl.cm.ScalarMappable(percent, "mako_r"), ax=panels, label="weights kept (%)", fraction=0.04, pad=0.02
    )
    bar.outline.set_visible(False)
    return despined(figure)


def draw_corridor(anchors: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the share of each layer that is always kept, searched in Phase 2, and always dropped.

    Args:
        anchors: Content of one seed's anchors.json per two-phase method.
    """
    names = list(dict.fromkeys(layer["layer"] for content in anchors.values() for layer in content["layers"]))
    figure, panels = _layer_panels(names, len(anchors))
    for axes, (method, content) in zip(panels, anchors.items(), strict=True):
        rows = pd.DataFrame(content["layers"]).set_index("layer").reindex(names)
        left = np.zeros(len(names))
        for column, label, color in _CORRIDOR_PARTS:
            width = 100 * (rows[column] / rows["n_weights"]).to_numpy(dtype=float)
            axes.barh(np.arange(len(names)) + 0.5, width, left=left, height=0.82, color=color, label=label, lw=0)
            left = left + width
        share = 100 * content["n_corridor"] / content["n_weights"]
        light, heavy = (100 * (1 - content[anchor]["density"]) for anchor in ("light", "heavy"))
        axes.set_title(method, pad=32)
        details = (
            f"{content['n_corridor']:,} of {content['n_weights']:,} weights searched ({share:.1f} %)\n"
            f"between anchors at {light:.1f} % and {heavy:.1f} % sparsity"
        )
        axes.annotate(details, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8.5)
        axes.set(xlabel="share of the layer's weights (%)", xlim=(0, 100))
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return despined(figure)


def draw_finetuned(finetuned: pd.DataFrame, dense_error: float, styles: Mapping[str, MethodStyle]) -> Figure:
    """Draw test error before and after fine-tuning against sparsity: one mark per method and target, mean over seeds.

    Args:
        finetuned: Columns `method`, `seed`, `target`, `sparsity`, `test_error_pruned`, `test_error`, shares.
        dense_error: Test error of the dense network, a share, mean over seeds.
        styles: From `styles.method_styles`.
    """
    figure = Figure(figsize=(10.5, 4.9), layout="constrained")
    both, after = figure.subplots(1, 2)
    for method, rows in _by_method(finetuned, styles):
        style = styles[method]
        means = 100 * rows.groupby("target")[["sparsity", "test_error_pruned", "test_error"]].mean()
        means = means.sort_values("sparsity")
        both.vlines(
            means["sparsity"], means["test_error_pruned"], means["test_error"], color=style.color, lw=1, alpha=0.5
        )
        mark = {"marker": style.marker, "ls": "none", "ms": 6.5, "zorder": style.line["zorder"]}
        both.plot(means["sparsity"], means["test_error_pruned"], mfc="white", mec=style.color, mew=1.4, **mark)
        both.plot(means["sparsity"], means["test_error"], color=style.color, mec="white", mew=0.5, **mark)
        after.scatter(
            100 * rows["sparsity"], 100 * rows["test_error"], s=10, marker=style.marker, color=style.color, alpha=0.4
        )
        after.plot(means["sparsity"], means["test_error"], label=method, ms=6.5, marker=style.marker, **style.line)
    for axes in (both, after):
        axes.axhline(100 * dense_error, zorder=2, label="dense network", **DENSE_LINE)
        axes.set(xlabel="sparsity: weights removed (%)", ylabel="test error (%)")
    both.set(title="Before (hollow) and after (filled), logarithmic", yscale="log")
    for axis in (both.yaxis.set_major_formatter, both.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "12358" else ""))
    top = 100 * dense_error + _ZOOM_POINTS
    low, high = after.get_ylim()
    after.set_title(f"After, up to {_ZOOM_POINTS:.0f} points more error" if high > top else "After fine-tuning")
    after.set_ylim(max(0.0, low), min(top, high))
    legend_below(figure, *after.get_legend_handles_labels())
    return despined(figure)


def _by_method(table: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each method that has any, in the order of `styles`."""
    for method in styles:
        rows = table[table["method"] == method]
        if len(rows):
            yield method, rows


def _zoom_window(
    grids: Mapping[str, np.ndarray], means: Mapping[str, np.ndarray], dense_error: float
) -> tuple[float, float] | None:
    """The range of sparsities in which errors rise above the dense network's; None if no method comes near it."""
    # Means are NaN beyond a front's end, and a comparison with NaN is False.
    near = [grids[method][mean <= dense_error + _ZOOM_POINTS / 100] for method, mean in means.items()]
    equal = [grids[method][mean <= dense_error + 0.01] for method, mean in means.items()]
    if not any(len(sparsities) for sparsities in near):
        return None
    right = max(sparsities[-1] for sparsities in near if len(sparsities))
    left = float(np.median([sparsities[-1] if len(sparsities) else 0.0 for sparsities in equal]))
    return max(0.0, min(left, right) - 0.12), min(1.0, right + 0.02)


def _layer_panels(names: Sequence[str], n_panels: int) -> tuple[Figure, list[Axes]]:
    """Panels that share one axis of layer names, the input layer on top."""
    n_layers = len(names)
    height = 1.6 + min(10.5, 0.215 * max(6, n_layers))
    figure, panels = panel_grid(n_panels, width=4.9, height=height, share_y=True)
    every = -(-n_layers // _MAX_LAYER_LABELS)
    labels = [name.removesuffix(".weight") if i % every == 0 else "" for i, name in enumerate(names)]
    panels[0].set_yticks(np.arange(n_layers) + 0.5, labels)
    panels[0].set_ylim(n_layers, 0)
    for axes in panels:
        axes.tick_params(axis="y", length=0, labelsize=8.5 if n_layers <= 30 else 6.5)
        axes.grid(visible=False)
    for axes in panels[::_MAX_COLUMNS]:
        axes.set_ylabel("layer, input at the top")
    return figure, panels
