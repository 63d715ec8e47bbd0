"""Methods compared with a reference over datasets, networks and seeds.

A pair is one dataset, network and seed on which two methods were both run. Every function is a pure function of the
tables that `read_results` makes. A difference is always reference − method, so above 0 the reference is better.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from paretoprune.reporting.read_results import RunResults, rows_of
from paretoprune.reporting.statistical_tests import DECIMALS, holm, rank_biserial, signed_rank_test, vargha_delaney

MEASURE_TITLES = {"hypervolume_test": "Hypervolume, test split", "hypervolume_search": "Hypervolume, search split"}
MEASURES = tuple(MEASURE_TITLES)
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SIGNIFICANCE_LEVEL = 0.05

RUN = ["dataset", "network"]
PAIR = [*RUN, "seed"]
COMPARISON_COLUMNS = (
    "measure",
    "reference",
    "method",
    "n_pairs",
    "wins",
    "ties",
    "losses",
    "median_difference",
    "p_value",
    "p_holm",
    "exact",
    "rank_biserial",
    "a12",
    "note",
)
SPARSITY_COLUMNS = (
    *RUN,
    "method",
    "at_least_sparsity",
    "n_seeds",
    "n_found",
    "sparsity_mean",
    "test_error_mean",
    "test_error_std",
    "points_over_dense_mean",
    "points_over_dense_std",
)
GAIN_COLUMNS = (*RUN, "method", "n_searches", "n_positive", "min", "median", "max")
# Stands for dataset and network in the rows over all of them.
ALL_RUNS = "all"

# A sparsity is 1 - density in floating point. A member with exactly the required sparsity must not fail by rounding.
_ROUNDING = 1e-9


def paired_differences(summary: pd.DataFrame, reference: str, measure: str) -> pd.DataFrame:
    """Subtract the values of every other method from those of the reference, pair by pair.

    Args:
        summary: Columns `dataset`, `network`, `seed`, `method` and `measure`; larger values are better.
        reference: The method that the others are compared with.
        measure: Column of `summary`, for instance one of `MEASURES`.

    Returns:
        One row per other method (in the order of `summary`) and pair that it shares with the reference: `dataset`,
        `network`, `seed`, `method`, `reference_value`, `value`, and `difference` = `reference_value` − `value`.

    Raises:
        ValueError: A value is not finite; a method has two rows for one pair; the reference was not run; or a method
            has no pair in common with it.
    """
    table = summary[[*PAIR, "method", measure]]
    finite = np.isfinite(table[measure].to_numpy(dtype=float))
    if not finite.all():
        row = table[~finite].iloc[0]
        raise ValueError(
            f"expected a finite {measure} in every row, found {row[measure]} for method '{row['method']}' on "
            f"{_name(row)}; leave the method out, or run it again"
        )
    twice = table.duplicated([*PAIR, "method"])
    if twice.any():
        row = table[twice].iloc[0]
        raise ValueError(
            f"expected one row per method and pair, found several for method '{row['method']}' on {_name(row)}; "
            "give each run its own dataset, network or seed"
        )
    methods = list(dict.fromkeys(table["method"]))
    if reference not in methods:
        raise ValueError(
            f"expected the reference to be one of {', '.join(methods)}, found '{reference}'; name one that was run"
        )
    own = table[table["method"] == reference].rename(columns={measure: "reference_value"}).drop(columns="method")
    parts = []
    for method in methods:
        if method == reference:
            continue
        both = own.merge(table[table["method"] == method].rename(columns={measure: "value"}), on=PAIR)
        if not len(both):
            raise ValueError(
                f"expected runs that '{reference}' and '{method}' both have, found none; run both on the same dataset, "
                "network and seed"
            )
        parts.append(both.assign(difference=both["reference_value"] - both["value"]))
    columns = [*PAIR, "method", "reference_value", "value", "difference"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _name(row: pd.Series) -> str:
    return f"{row['dataset']}/{row['network']}, seed {row['seed']}"


def compare_methods(summary: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Test every other method against the reference on each of `MEASURES`.

    Args:
        summary: From `read_results.summarise`, of all runs.
        reference: The method that the others are compared with.

    Returns:
        Columns `COMPARISON_COLUMNS`, one row per measure and other method. `wins` counts the pairs on which the
        reference is better. `p_holm` is adjusted for the number of methods, within the measure. `note` says where p
        could not be significant however clear the differences are. All but `a12` is paired.

    Raises:
        ValueError: As for `paired_differences`.
    """
    rows: list[dict[str, Any]] = []
    for measure in MEASURES:
        differences = paired_differences(summary, reference, measure)
        block: list[dict[str, Any]] = [
            {"measure": measure, "reference": reference, "method": method, **_paired_test(pairs)}
            for method, pairs in differences.groupby("method", sort=False)
        ]
        corrected = holm(np.array([row["p_value"] for row in block]))
        notes = _power_notes(block)
        rows += [row | {"p_holm": p, "note": note} for row, p, note in zip(block, corrected, notes, strict=True)]
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def _paired_test(pairs: pd.DataFrame) -> dict[str, Any]:
    """The columns of `COMPARISON_COLUMNS` that follow from the pairs of one method."""
    differences = np.round(pairs["difference"].to_numpy(dtype=float), DECIMALS)
    p_value, exact = signed_rank_test(differences)
    # A12 compares unpaired values, which makes sense only where they share a scale. So it is computed within each
    # dataset and network, and averaged with the number of pairs as weight.
    within_runs = [
        (vargha_delaney(run["reference_value"].to_numpy(), run["value"].to_numpy()), len(run))
        for _, run in pairs.groupby(RUN, sort=False)
    ]
    effects, weights = zip(*within_runs, strict=True)
    return {
        "n_pairs": len(pairs),
        "wins": int(np.sum(differences > 0)),
        "ties": int(np.sum(differences == 0)),
        "losses": int(np.sum(differences < 0)),
        "median_difference": float(np.median(differences)),
        "p_value": p_value,
        "exact": exact,
        "rank_biserial": rank_biserial(differences),
        "a12": float(np.average(effects, weights=weights)),
    }


def _power_notes(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each test of a measure, why it could not have been significant; empty where it could."""
    # The smallest two-sided p of the signed-rank test: one of the 2^n equally likely patterns of signs on either side,
    # with n the number of pairs that differ.
    smallest_p = [min(1.0, 2.0 ** (1 - (test["n_pairs"] - test["ties"]))) for test in tests]
    notes = []
    for test, own in zip(tests, smallest_p, strict=True):
        if 2.0 ** (1 - test["n_pairs"]) >= SIGNIFICANCE_LEVEL:
            notes.append("too few pairs")
        elif own >= SIGNIFICANCE_LEVEL:
            notes.append("too few pairs that differ")
        # Holm multiplies the smallest p by the number of tests, and adjusts no other to a value below that.
        elif len(tests) * min(smallest_p) >= SIGNIFICANCE_LEVEL:
            notes.append("too few pairs for so many methods")
        else:
            notes.append("")
    return notes


def leading_methods(summary: pd.DataFrame, reference: str, size: int) -> list[str]:
    """Choose the reference and its strongest rivals: the best by mean rank in test hypervolume over all pairs.

    Args:
        summary: From `read_results.summarise`, of all runs.
        reference: The method that the others are compared with.
        size: Largest number of methods.

    Returns:
        At most `size` methods, the reference first, then by ascending mean rank.
    """
    ranks = summary.groupby(PAIR)["hypervolume_test"].rank(ascending=False)
    means = ranks.groupby(summary["method"], sort=False).mean().drop(reference)
    return [reference, *means.sort_values(kind="stable").index[: size - 1]]


def member_at_sparsity(front: pd.DataFrame, sparsity: float) -> pd.Series | None:
    """Choose the member that a user would take to remove at least a given share of the weights.

    It is the member of least `search_error`, and the sparsest of equal ones. The test error has no part in the choice.

    Args:
        front: Columns `sparsity` and `search_error`, among others.
        sparsity: Least share of weights removed, 0 to 1.

    Returns:
        The row of the member; None if no member is that sparse.
    """
    enough = front[front["sparsity"] >= sparsity - _ROUNDING]
    if not len(enough):
        return None
    return enough.sort_values(["search_error", "sparsity"], ascending=[True, False], kind="stable").iloc[0]


def errors_at_sparsities(run: RunResults, sparsities: Sequence[float] = SPARSITIES) -> pd.DataFrame:
    """Measure the test error of each method at given sparsities, with `member_at_sparsity`.

    Args:
        run: Results of one dataset and network.
        sparsities: Least shares of weights removed.

    Returns:
        Columns `SPARSITY_COLUMNS`, one row per method and sparsity: means and sample standard deviations over the
        `n_found` of `n_seeds` seeds that have a member that sparse. Errors and sparsities are shares. The distance from
        the same seed's dense network is in percentage points, and positive where the pruned network is worse.
    """
    rows = []
    for method in run.kinds:
        fronts = {seed: rows_of(run.fronts, method, seed) for seed in run.about.seeds}
        for sparsity in sparsities:
            chosen = {seed: member_at_sparsity(front, sparsity) for seed, front in fronts.items()}
            found = {seed: member for seed, member in chosen.items() if member is not None}
            errors = pd.Series({seed: member["test_error"] for seed, member in found.items()}, dtype=float)
            dense = pd.Series({seed: 1 - run.dense[seed]["accuracy"]["test"] for seed in found}, dtype=float)
            points = 100 * (errors - dense)
            rows.append(
                {
                    "dataset": run.about.dataset,
                    "network": run.about.network,
                    "method": method,
                    "at_least_sparsity": sparsity,
                    "n_seeds": len(run.about.seeds),
                    "n_found": len(found),
                    "sparsity_mean": float(np.mean([member["sparsity"] for member in found.values()] or [np.nan])),
                    "test_error_mean": errors.mean(),
                    "test_error_std": errors.std(),
                    "points_over_dense_mean": points.mean(),
                    "points_over_dense_std": points.std(),
                }
            )
    return pd.DataFrame(rows, columns=list(SPARSITY_COLUMNS))


def phase2_gains(summary: pd.DataFrame) -> pd.DataFrame:
    """Summarise how much hypervolume Phase 2 added in the searches of each method.

    Args:
        summary: From `read_results.summarise`, of all runs; a method without phases has no `phase2_gain`.

    Returns:
        Columns `GAIN_COLUMNS`, on the search split. First one row per two-phase method over all runs, with `ALL_RUNS`
        for dataset and network, then one per run and method. `n_positive` counts the searches that gained.
    """
    gains = summary.dropna(subset="phase2_gain")
    rows = [
        {"dataset": dataset, "network": network, "method": method, **_gain(own["phase2_gain"])}
        for (dataset, network), group in [((ALL_RUNS, ALL_RUNS), gains), *gains.groupby(RUN, sort=False)]
        for method, own in group.groupby("method", sort=False)
    ]
    return pd.DataFrame(rows, columns=list(GAIN_COLUMNS))


def _gain(gains: pd.Series) -> dict[str, float | int]:
    return {
        "n_searches": len(gains),
        "n_positive": int((gains.round(DECIMALS) > 0).sum()),
        "min": float(gains.min()),
        "median": float(gains.median()),
        "max": float(gains.max()),
    }
