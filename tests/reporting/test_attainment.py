"""Attainment surfaces and hypervolume bands against brute force and by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.reporting.attainment import attained_errors, attainment_surfaces, hypervolume_at, hypervolume_bands

FRONTS = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=6)


@given(st.lists(FRONTS, min_size=1, max_size=5))
def test_attainment_by_brute_force(fronts: list[list[tuple[int, int]]]) -> None:
    rows = [(seed, d / 10, e / 10, 0.0) for seed, front in enumerate(fronts) for d, e in front]
    table = pd.DataFrame(rows, columns=["seed", "density", "test_error", "search_error"]).astype({"seed": int})
    surfaces = attainment_surfaces(table, range(len(fronts)), "test_error")
    assert list(surfaces["density"]) == sorted({d / 10 for front in fronts for d, _ in front})
    for row in surfaces.to_dict("records"):
        reached = sorted(
            min([e / 10 for d, e in front if d / 10 <= row["density"]], default=np.inf) for front in fronts
        )
        assert row["best"] == reached[0]
        assert row["worst"] == reached[-1]
        # The least error that at least half of the seeds reach.
        enough = [e for e in reached if sum(other <= e for other in reached) * 2 >= len(reached)]
        assert row["median"] == enough[0]


def test_attained_error_is_a_step_down_in_density() -> None:
    front = pd.DataFrame({"density": [0.5, 0.2, 0.8], "search_error": [0.1, 0.3, 0.2], "test_error": [0.4, 0.3, 0.2]})
    at = np.array([0.1, 0.2, 0.49, 0.5, 0.8, 1.0])
    np.testing.assert_array_equal(attained_errors(front, at, "search_error"), [np.inf, 0.3, 0.3, 0.1, 0.1, 0.1])
    np.testing.assert_array_equal(attained_errors(front, at, "test_error"), [np.inf, 0.3, 0.3, 0.3, 0.2, 0.2])


def test_a_seed_with_an_empty_front_attains_nothing() -> None:
    fronts = pd.DataFrame({"seed": [0], "density": [0.5], "test_error": [0.1]})
    (row,) = attainment_surfaces(fronts, [0, 1], "test_error").to_dict("records")
    assert (row["best"], row["median"], row["worst"]) == (0.1, 0.1, np.inf)


def test_attainment_over_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one seed, found none; name"):
        attainment_surfaces(pd.DataFrame(columns=["seed", "density", "test_error"]), [], "test_error")


# Hypervolume over evaluations


def test_hypervolume_at_is_a_step_that_holds() -> None:
    history = pd.DataFrame({"evaluations": [10, 20], "hypervolume": [0.4, 0.6]})
    values = hypervolume_at(history, np.array([9, 10, 19.9, 20, 100]))
    np.testing.assert_array_equal(values, [np.nan, 0.4, 0.4, 0.6, 0.6])


def test_bands_carry_the_last_value_on() -> None:
    histories = pd.DataFrame(
        {
            "seed": [0, 0, 1, 1, 2],
            "evaluations": [10, 20, 12, 30, 10],
            "hypervolume": [0.2, 0.5, 0.3, 0.4, 0.1],
        }
    )
    bands = hypervolume_bands(histories, np.array([11.0, 12.0, 20.0, 30.0, 99.0]))
    np.testing.assert_allclose(bands["low"], [np.nan, 0.1, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(bands["median"], [np.nan, 0.2, 0.3, 0.4, 0.4])
    np.testing.assert_allclose(bands["high"], [np.nan, 0.3, 0.5, 0.5, 0.5])
