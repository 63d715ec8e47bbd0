"""Tests and effect sizes for paired and unpaired samples: pure functions on arrays."""

import numpy as np
from scipy import stats

# Equal fronts may differ in the last bits of their hypervolumes; that is no win, and no rank.
DECIMALS = 12
# Up to here scipy counts every sign of every rank; with equal ranks it must try every combination of signs.
_MOST_EXACT, _MOST_EXACT_TIED = 50, 13


def signed_rank_test(differences: np.ndarray) -> tuple[float, bool]:
    """Two-sided Wilcoxon signed-rank test that differences lie evenly on both sides of 0.

    Differences of 0 are left out, as Wilcoxon did; without any other, nothing speaks against equality and p is 1.

    Args:
        differences: float (n_pairs,).

    Returns:
        The p-value, and whether it is exact: counted over all signs rather than taken from the normal approximation.

    Source:
        Wilcoxon, "Individual comparisons by ranking methods", 1945; as `scipy.stats.wilcoxon` computes it.
    """
    differences = _nonzero(differences)
    n = len(differences)
    if not n:
        return 1.0, True
    tied = len(np.unique(np.abs(differences))) < n
    exact = n <= (_MOST_EXACT_TIED if tied else _MOST_EXACT)
    # With equal ranks, scipy's "exact" would look them up in the distribution of distinct ones.
    how = ("exact" if not tied else stats.PermutationMethod(n_resamples=np.inf)) if exact else "asymptotic"
    return float(stats.wilcoxon(differences, method=how).pvalue), exact


def _nonzero(differences: np.ndarray) -> np.ndarray:
    rounded = np.round(np.asarray(differences, dtype=float), DECIMALS)
    return rounded[rounded != 0]


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values so that comparing each with a level keeps the chance of any false alarm below that level.

    Args:
        p_values: float (n_tests,), 0 to 1.

    Returns:
        float (n_tests,), in the order given.

    Raises:
        ValueError: A value lies outside 0 to 1, or is NaN.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p_values = np.asarray(p_values, dtype=float)
    wrong = ~((p_values >= 0) & (p_values <= 1))
    if wrong.any():
        raise ValueError(f"expected p-values between 0 and 1, found {p_values[wrong][0]}; leave that test out")
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted


def rank_biserial(differences: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation, the paired effect size that belongs to the signed-rank test.

    The share of the rank sum that lies above 0 minus the share below it; differences of 0 have no rank.

    Args:
        differences: float (n_pairs,).

    Returns:
        From -1 (all below 0) to 1 (all above); 0 where every difference is 0.

    Source:
        Kerby, "The simple difference formula: an approach to teaching nonparametric correlation", 2014.
    """
    differences = _nonzero(differences)
    if not len(differences):
        return 0.0
    ranks = stats.rankdata(np.abs(differences))
    return float(np.sum(np.sign(differences) * ranks) / np.sum(ranks))


def vargha_delaney(first: np.ndarray, second: np.ndarray) -> float:
    """A12, an unpaired effect size: how often a value of the first sample exceeds one of the second.

    Args:
        first: float (n_first,).
        second: float (n_second,).

    Returns:
        Share of all n_first x n_second couples, equal ones counting half: 0.5 for no effect, 1 if the first is always
        larger.

    Raises:
        ValueError: A sample is empty.

    Source:
        Vargha and Delaney, "A critique and improvement of the CL common language effect size statistics", 2000.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not len(first) or not len(second):
        raise ValueError(f"expected values in both samples, found {len(first)} and {len(second)}; compare what was run")
    margins = np.round(first[:, None] - second[None, :], DECIMALS)
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))
