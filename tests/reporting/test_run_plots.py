"""Figures of one run: what is computed for them, and labels."""

import numpy as np
import pandas as pd
from paretoprune.reporting.run_plots import draw_hypervolume, error_at_sparsity
from paretoprune.reporting.styles import figure_style, method_styles


def test_error_at_sparsity_takes_the_densest_member_that_is_sparse_enough() -> None:
    front = pd.DataFrame({"sparsity": [0.8, 0.5], "test_error": [0.3, 0.1]})
    errors = error_at_sparsity(front, np.array([0.0, 0.5, 0.51, 0.8, 0.81]))
    np.testing.assert_array_equal(errors, [0.1, 0.1, 0.3, 0.3, np.nan])


def test_the_axis_says_how_large_a_hypervolume_can_be() -> None:
    histories = pd.DataFrame(
        {"method": "a", "seed": 0, "evaluations": [1, 2], "hypervolume": [0.2, 1.1], "stage": "flat"}
    )
    with figure_style():
        styles = method_styles({"a": "flat"})
        labels = [
            draw_hypervolume(histories, styles).axes[0].get_ylabel(),
            draw_hypervolume(histories, styles, largest=1.1 * 1.1).axes[0].get_ylabel(),
        ]
    assert labels == [f"hypervolume on the search split (0 to {largest})" for largest in ("1", "1.21")]
