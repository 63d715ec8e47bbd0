"""Figures of one run: what is computed for them."""

import numpy as np
import pandas as pd
from paretoprune.reporting.run_plots import error_at_sparsity


def test_error_at_sparsity_takes_the_densest_member_that_is_sparse_enough() -> None:
    front = pd.DataFrame({"sparsity": [0.8, 0.5], "test_error": [0.3, 0.1]})
    errors = error_at_sparsity(front, np.array([0.0, 0.5, 0.51, 0.8, 0.81]))
    np.testing.assert_array_equal(errors, [0.1, 0.1, 0.3, 0.3, np.nan])
