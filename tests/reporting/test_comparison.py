"""Methods against a reference, by hand and by brute force."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.reporting import comparison
from paretoprune.reporting.comparison import (
    COMPARISON_COLUMNS,
    GAIN_COLUMNS,
    SPARSITY_COLUMNS,
    compare_methods,
    errors_at_sparsities,
    leading_methods,
    member_at_sparsity,
    paired_differences,
    phase2_gains,
)
from paretoprune.reporting.read_results import RunResults
from paretoprune.reporting.statistical_tests import holm
from paretoprune.reporting.subject import Run


def summary_of(
    values: Mapping[str, Sequence[float] | np.ndarray], runs: Sequence[tuple[str, str]] = (("digits", "a"),)
) -> pd.DataFrame:
    """A summary with one value per method and pair, used for both hypervolumes; seeds count up within each run."""
    rows = []
    for method, own in values.items():
        n_seeds = len(own) // len(runs)
        for i, value in enumerate(own):
            dataset, network = runs[i // n_seeds]
            rows.append(
                {
                    "dataset": dataset,
                    "network": network,
                    "seed": i % n_seeds,
                    "method": method,
                    "hypervolume_test": value,
                    "hypervolume_search": value,
                    "phase2_gain": np.nan,
                }
            )
    return pd.DataFrame(rows)


# Methods against the reference


def test_differences_are_of_the_same_pair() -> None:
    summary = summary_of({"ours": [0.5, 0.6, 0.7], "other": [0.4, 0.65, 0.7]})
    shuffled = summary.sample(frac=1, random_state=3)
    table = paired_differences(shuffled, "ours", "hypervolume_test").sort_values("seed")
    np.testing.assert_allclose(table["difference"], [0.1, -0.05, 0.0])
    assert list(table["method"]) == ["other"] * 3


def test_only_common_pairs_count() -> None:
    summary = summary_of({"ours": [0.5, 0.6, 0.7], "other": [0.4, 0.65]})
    assert sorted(paired_differences(summary, "ours", "hypervolume_test")["seed"]) == [0, 1]
    tests = compare_methods(summary, "ours")
    assert list(tests["n_pairs"]) == [2, 2]


def test_compare_methods_hand_computed() -> None:
    ours = [0.10, 0.20, 0.30, 0.40, 0.50, 0.60]
    values: dict[str, list[float]] = {
        "worse": [value - 0.01 * (i + 1) for i, value in enumerate(ours)],
        "ours": ours,
        "mixed": [0.09, 0.22, 0.27, 0.36, 0.50, 0.60],
    }
    summary = summary_of(values)
    summary["hypervolume_search"] = -summary["hypervolume_search"]
    tests = compare_methods(summary, "ours")
    assert tuple(tests.columns) == COMPARISON_COLUMNS
    assert list(zip(tests["measure"], tests["method"], strict=True)) == [
        ("hypervolume_test", "worse"),
        ("hypervolume_test", "mixed"),
        ("hypervolume_search", "worse"),
        ("hypervolume_search", "mixed"),
    ]
    worse, mixed, _, mirrored = tests.to_dict("records")
    assert (worse["wins"], worse["ties"], worse["losses"], worse["n_pairs"]) == (6, 0, 0, 6)
    assert worse["median_difference"] == pytest.approx(0.035)
    assert worse["p_value"] == pytest.approx(2 / 64)
    assert worse["p_holm"] == pytest.approx(4 / 64)
    assert worse["rank_biserial"] == 1.0
    # 0.1 i exceeds 0.09 j in the 21 of 36 couples with i >= j, both from 1 to 6.
    assert worse["a12"] == pytest.approx(21 / 36)
    assert (mixed["wins"], mixed["ties"], mixed["losses"]) == (3, 2, 1)
    # Ranks 1, 3, 4 above and 2 below 0.
    assert mixed["rank_biserial"] == pytest.approx((8 - 2) / 10)
    assert mirrored["rank_biserial"] == pytest.approx((2 - 8) / 10)
    assert (mirrored["wins"], mirrored["losses"]) == (1, 3)
    # Of the 16 sets of ranks 1 to 4, those with a sum of at least 8 (1 3 4, 2 3 4 and all) or at most 2.
    assert mixed["p_value"] == pytest.approx(6 / 16)


def test_each_measure_is_corrected_for_its_own_methods() -> None:
    rng = np.random.default_rng(1)
    summary = summary_of({name: rng.random(8) + 0.2 * i for i, name in enumerate("abcd")})
    summary["hypervolume_search"] = summary["hypervolume_test"] + 0.3 * rng.random(len(summary))
    tests = compare_methods(summary, "a")
    for _, group in tests.groupby("measure"):
        np.testing.assert_allclose(group["p_holm"], holm(group["p_value"].to_numpy()))
    assert not np.allclose(tests["p_holm"], holm(tests["p_value"].to_numpy()))


def test_a12_is_averaged_within_runs() -> None:
    # Pooled over two runs of different scale, the reference would win only 12 of 16 couples.
    runs = [("digits", "a"), ("cifar10", "b")]
    summary = summary_of({"ours": [0.11, 0.12, 0.91, 0.92], "other": [0.01, 0.02, 0.81, 0.82]}, runs)
    assert compare_methods(summary, "ours")["a12"].tolist() == [1.0, 1.0]
    uneven = pd.concat(
        [
            summary_of({"ours": [0.5], "other": [0.4]}),
            summary_of({"ours": [0.1, 0.2, 0.3], "other": [0.4, 0.5, 0.6]}, [("cifar10", "b")]),
        ]
    )
    assert compare_methods(uneven, "ours")["a12"].iloc[0] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("n_pairs", "n_tied", "n_others", "note"),
    [
        (5, 0, 1, "too few pairs"),
        (6, 0, 1, ""),
        (8, 3, 1, "too few pairs that differ"),
        (8, 2, 1, ""),
        # 2 x 2 / 2^6 is above 0.05, 2 x 2 / 2^7 below.
        (6, 0, 2, "too few pairs for so many methods"),
        (7, 0, 2, ""),
    ],
)
def test_tests_that_cannot_succeed_are_flagged(n_pairs: int, n_tied: int, n_others: int, note: str) -> None:
    ours = np.linspace(0.5, 0.6, n_pairs)
    loss = np.where(np.arange(n_pairs) < n_tied, 0.0, 0.01 * np.arange(1, n_pairs + 1))
    values: dict[str, np.ndarray] = {"ours": ours, **{f"other{i}": ours - loss for i in range(n_others)}}
    tests = compare_methods(summary_of(values), "ours")
    assert set(tests["note"]) == {note}
    # The clearest differences possible: significant exactly where nothing is flagged.
    assert bool((tests["p_holm"] < 0.05).all()) == (note == "")


def test_one_method_has_nothing_to_be_compared_with() -> None:
    tests = compare_methods(summary_of({"ours": [0.5, 0.6]}), "ours")
    assert tuple(tests.columns) == COMPARISON_COLUMNS
    assert not len(tests)


def test_a_value_that_is_not_finite_is_refused() -> None:
    summary = summary_of({"ours": [0.5, 0.6], "other": [0.5, np.nan]})
    with pytest.raises(
        ValueError, match=r"finite hypervolume_test .*found nan for method 'other' on digits/a, seed 1;"
    ):
        compare_methods(summary, "ours")


def test_methods_without_common_pairs_are_refused() -> None:
    summary = summary_of({"ours": [0.5], "other": [0.4]})
    summary.loc[summary["method"] == "other", "dataset"] = "cifar10"
    with pytest.raises(ValueError, match="expected runs that 'ours' and 'other' both have, found none; run both"):
        compare_methods(summary, "ours")


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference to be one of ours, other, found 'theirs'; name"):
        compare_methods(summary_of({"ours": [0.5], "other": [0.4]}), "theirs")


def test_two_rows_for_a_pair_are_refused() -> None:
    summary = summary_of({"ours": [0.5], "other": [0.4]})
    with pytest.raises(ValueError, match="one row per method and pair, found several for method 'ours' on digits/a"):
        compare_methods(pd.concat([summary, summary]), "ours")


def test_leading_methods_are_of_best_mean_rank() -> None:
    # Over two pairs of unlike scale: b is 1st and 2nd, c 2nd and 1st with the larger mean, d always 3rd.
    summary = summary_of({"a": [0.1, 0.1], "d": [0.3, 0.5], "b": [0.5, 0.6], "c": [0.4, 0.9]})
    assert leading_methods(summary, "a", 3) == ["a", "b", "c"]
    assert leading_methods(summary, "a", 9) == ["a", "b", "c", "d"]
    assert leading_methods(summary, "d", 1) == ["d"]


# Fixed sparsities


def run_of(members: Sequence[tuple[int, float, float, float]], accuracies: Sequence[float]) -> RunResults:
    """One method "ours"; members as (seed, sparsity, search error, test error), dense test accuracy per seed."""
    fronts = pd.DataFrame(members, columns=["seed", "sparsity", "search_error", "test_error"])
    dense: dict[int, dict[str, Any]] = {seed: {"accuracy": {"test": a}} for seed, a in enumerate(accuracies)}
    none = pd.DataFrame()
    return RunResults(
        Run("digits", "a", tuple(dense), "error"),
        {"ours": "flat"},
        dense,
        fronts.assign(method="ours", density=1 - fronts["sparsity"]),
        histories=none,
        layers=none,
        finetuned=none,
        anchors={},
    )


def test_errors_at_sparsities_hand_computed() -> None:
    run = run_of(
        [(0, 0.5, 0.10, 0.12), (0, 0.8, 0.20, 0.18), (1, 0.6, 0.10, 0.14), (1, 0.95, 0.6, 0.5)],
        accuracies=[0.9, 0.92],
    )
    table = errors_at_sparsities(run, (0.5, 0.8, 0.9, 0.99))
    assert tuple(table.columns) == SPARSITY_COLUMNS
    half, most, sparse, none = table.to_dict("records")
    assert (half["n_found"], half["n_seeds"]) == (2, 2)
    assert half["sparsity_mean"] == pytest.approx(0.55)
    assert half["test_error_mean"] == pytest.approx(0.13)
    assert half["test_error_std"] == pytest.approx(np.std([0.12, 0.14], ddof=1))
    # Against each seed's own dense network: 2 points and 6 points.
    assert half["points_over_dense_mean"] == pytest.approx(4.0)
    assert half["points_over_dense_std"] == pytest.approx(np.std([2, 6], ddof=1))
    assert most["test_error_mean"] == pytest.approx((0.18 + 0.5) / 2)
    assert (sparse["n_found"], sparse["test_error_mean"]) == (1, 0.5)
    assert np.isnan(sparse["test_error_std"])
    assert none["n_found"] == 0
    assert np.isnan(none["test_error_mean"])
    assert np.isnan(none["sparsity_mean"])


@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=8),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.integers(0, 10),
)
def test_the_member_at_a_sparsity_does_not_depend_on_the_test(
    members: list[tuple[int, int]], tests: list[float], least: int
) -> None:
    front = pd.DataFrame(members, columns=["sparsity", "search_error"]) / 10
    chosen = member_at_sparsity(front.assign(test_error=tests[: len(front)]), least / 10)
    enough = [(error, -sparsity) for sparsity, error in members if sparsity >= least]
    if not enough:
        assert chosen is None
        return
    assert chosen is not None
    assert (chosen["search_error"], chosen["sparsity"]) == (min(enough)[0] / 10, -min(enough)[1] / 10)
    other = member_at_sparsity(front.assign(test_error=tests[: len(front)][::-1]), least / 10)
    assert other is not None
    assert other.name == chosen.name


def test_of_members_with_equal_search_error_the_sparsest_is_taken() -> None:
    front = pd.DataFrame({"sparsity": [0.5, 0.7, 0.6], "search_error": 0.1, "test_error": [0.1, 0.3, 0.2]})
    chosen = member_at_sparsity(front, 0.5)
    assert chosen is not None
    assert chosen["sparsity"] == 0.7


def test_a_share_met_exactly_counts_in_spite_of_rounding() -> None:
    front = pd.DataFrame({"sparsity": [1 - 0.1 - 1e-16], "search_error": [0.1], "test_error": [0.2]})
    assert member_at_sparsity(front, 0.9) is not None
    assert member_at_sparsity(front, 0.901) is None


# Phase 2


def test_phase2_gains_hand_computed() -> None:
    summary = summary_of({"ours": [0.5] * 4, "flat": [0.4] * 4}, [("digits", "a"), ("cifar10", "b")])
    summary.loc[summary["method"] == "ours", "phase2_gain"] = [0.03, 0.01, 0.0, -0.02]
    gains = phase2_gains(summary)
    assert tuple(gains.columns) == GAIN_COLUMNS
    assert [tuple(row) for row in gains.itertuples(index=False)] == [
        (comparison.ALL_RUNS, comparison.ALL_RUNS, "ours", 4, 2, -0.02, pytest.approx(0.005), 0.03),
        ("digits", "a", "ours", 2, 2, 0.01, pytest.approx(0.02), 0.03),
        ("cifar10", "b", "ours", 2, 0, -0.02, pytest.approx(-0.01), 0.0),
    ]


def test_without_phases_there_is_no_gain() -> None:
    gains = phase2_gains(summary_of({"flat": [0.4]}))
    assert tuple(gains.columns) == GAIN_COLUMNS
    assert not len(gains)
