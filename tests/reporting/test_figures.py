"""What every figure shares: a legend that fits."""

import pytest
from matplotlib.figure import Figure
from paretoprune.reporting.figures import legend_below
from paretoprune.reporting.styles import figure_style

NAMES = [f"a_method_with_a_long_name_{i:02d}" for i in range(15)]


@pytest.mark.parametrize("width", [6.0, 9.0, 13.0])
def test_a_legend_of_many_methods_is_inside_the_figure(width: float) -> None:
    with figure_style():
        figure = Figure(figsize=(width, 5), layout="constrained")
        axes = figure.subplots()
        for name in NAMES:
            axes.plot([0, 1], [0, 1], label=name)
        legend_below(figure, *axes.get_legend_handles_labels())
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    # As wide as it may be: short names stand side by side.
    assert box.width > 0.4 * figure.bbox.width
