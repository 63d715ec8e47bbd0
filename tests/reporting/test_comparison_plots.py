"""Figures of the comparison: limits, order and what is written beside the points."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from paretoprune.reporting import comparison_plots
from paretoprune.reporting.comparison import MEASURES, compare_methods, paired_differences
from paretoprune.reporting.styles import comparison_styles, figure_style

NAMES = [f"a_method_with_a_long_name_{i:02d}" for i in range(15)]


def summary() -> pd.DataFrame:
    """15 methods, 2 runs, 4 seeds; each method is behind the one before it, the last far behind."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset in ("digits", "cifar10"):
        for seed in range(4):
            for i, method in enumerate(NAMES):
                value = 0.8 - 0.004 * i - (0.4 if method == NAMES[-1] else 0) + 1e-4 * rng.random()
                row = {"dataset": dataset, "network": "resnet8", "seed": seed, "method": method}
                rows.append(row | dict.fromkeys(MEASURES, value))
    return pd.DataFrame(rows)


def drawn_differences(table: pd.DataFrame, reference: str) -> Figure:
    differences = {measure: paired_differences(table, reference, measure) for measure in MEASURES}
    with figure_style():
        figure = comparison_plots.draw_paired_differences(
            differences, compare_methods(table, reference), dict.fromkeys(MEASURES, "title")
        )
        figure.draw_without_rendering()
    return figure


def test_differences_are_sorted_by_their_median() -> None:
    shuffled = summary().sample(frac=1, random_state=1)
    axes = drawn_differences(shuffled, NAMES[3]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*NAMES[:3], *NAMES[4:]]
    # The input's first row lies on top.
    assert axes.yaxis_inverted()
    assert axes.get_xscale() == "symlog"


def test_differences_of_one_size_are_on_a_linear_axis() -> None:
    table = summary()
    near = table[table["method"].isin(NAMES[:4])]
    assert drawn_differences(near, NAMES[0]).axes[0].get_xscale() == "linear"


def test_equal_methods_can_be_drawn() -> None:
    table = summary()
    table[list(MEASURES)] = 0.5
    texts = {text.get_text() for text in drawn_differences(table, NAMES[0]).axes[0].texts}
    assert {"+0.0000", "0 / 8 / 0", "1.000"} <= texts


def test_what_stands_beside_the_differences_is_inside_the_figure() -> None:
    figure = drawn_differences(summary(), NAMES[0])
    for axes in figure.axes:
        for text in axes.texts:
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_attainment_is_drawn_in_percent_up_to_where_it_is_reached() -> None:
    surface = pd.DataFrame(
        {"density": [0.1, 0.5], "best": [0.2, 0.1], "median": [np.inf, 0.12], "worst": [np.inf, 0.14]}
    )
    with figure_style():
        styles = comparison_styles(["ours"])
        figure = comparison_plots.draw_attainment({"digits": {"ours": surface}}, {"digits": 0.1}, styles)
    (line, dense) = figure.axes[0].lines
    np.testing.assert_allclose(np.asarray(line.get_xdata(), dtype=float), [0, 50, 90])
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [12, 12, np.nan])
    assert line.get_drawstyle() == "steps-pre"
    np.testing.assert_allclose(np.asarray(dense.get_ydata(), dtype=float), [10, 10])


def test_attainment_of_no_members_is_an_empty_panel() -> None:
    empty = pd.DataFrame(columns=["density", "best", "median", "worst"], dtype=float)
    with figure_style():
        styles = comparison_styles(["ours"])
        figure = comparison_plots.draw_attainment({"digits": {"ours": empty}}, {"digits": 0.1}, styles)
    assert len(figure.axes[0].lines) == 1


def test_other_methods_are_grey_lines_without_a_band() -> None:
    grid = np.array([0.0, 10.0, 20.0])
    band = pd.DataFrame({"evaluations": grid, "low": [np.nan, 0.2, 0.3], "median": [np.nan, 0.3, 0.4], "high": 0.5})
    with figure_style():
        styles = comparison_styles(["ours"])
        figure = comparison_plots.draw_hypervolume_bands(
            {"digits": {"ours": band, "other": band}}, {"digits": {"ours": 20.0, "other": 10.0}}, styles
        )
    (axes,) = figure.axes
    assert len(axes.collections) == 1
    assert len(axes.lines) == 3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ours", "other methods", "least to largest over seeds"]
