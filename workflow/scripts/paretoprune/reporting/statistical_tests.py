"""Statistical tests and effect sizes for paired and unpaired samples: pure functions on arrays."""

import numpy as np
from scipy import stats

# Hypervolumes of equal fronts may differ in their last bits. Such a difference counts as 0.
DECIMALS = 12
# Largest samples for an exact p-value. Without equal ranks scipy counts the patterns of signs by recursion; with equal
# ranks it must go through all 2^n of them.
_MOST_EXACT, _MOST_EXACT_TIED = 50, 13


def signed_rank_test(differences: np.ndarray) -> tuple[float, bool]:
    """Test whether differences lie symmetrically about 0: the two-sided Wilcoxon signed-rank test.

    Differences of 0 are left out, as Wilcoxon did. If no other difference is left, p is 1.

    Args:
        differences: float (n_pairs,).

    Returns:
        The p-value, and whether it is exact: from all patterns of signs, and not from the normal approximation.

    Source:
        Wilcoxon, "Individual comparisons by ranking methods", 1945; as `scipy.stats.wilcoxon` computes it.
    """
    differences = _nonzero(differences)
    n = len(differences)
    if not n:
        return 1.0, True
    tied = len(np.unique(np.abs(differences))) < n
    exact = n <= (_MOST_EXACT_TIED if tied else _MOST_EXACT)
    # With equal ranks, scipy's "exact" would use the distribution for distinct ranks, which does not hold.
    how = ("exact" if not tied else stats.PermutationMethod(n_resamples=np.inf)) if exact else "asymptotic"
    return float(stats.wilcoxon(differences, method=how).pvalue), exact


def _nonzero(differences: np.ndarray) -> np.ndarray:
    """The differences that are not 0 after rounding to `DECIMALS`."""
    rounded = np.round(np.asarray(differences, dtype=float), DECIMALS)
    return rounded[rounded != 0]


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values for multiple comparisons by Holm's step-down procedure.

    Rejecting the hypotheses whose adjusted p-value is at most a level keeps the probability of any false rejection at
    that level or below.

    Args:
        p_values: float (n_tests,), 0 to 1.

    Returns:
        float (n_tests,), adjusted p-values, 0 to 1, in the order given.

    Raises:
        ValueError: A value lies outside 0 to 1, or is NaN.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p_values = np.asarray(p_values, dtype=float)
    wrong = ~((p_values >= 0) & (p_values <= 1))
    if wrong.any():
        raise ValueError(f"expected p-values between 0 and 1, found {p_values[wrong][0]}; leave that test out")
    # The k-th smallest of n is multiplied by n - k + 1. An adjusted value is at least those of all smaller p-values.
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted


def rank_biserial(differences: np.ndarray) -> float:
    """Compute the matched-pairs rank-biserial correlation, the effect size of the signed-rank test.

    It is the share of the rank sum of positive differences minus that of negative ones. Differences of 0 have no rank.

    Args:
        differences: float (n_pairs,).

    Returns:
        From -1 (all differences negative) to 1 (all positive); 0 if every difference is 0.

    Source:
        Kerby, "The simple difference formula: an approach to teaching nonparametric correlation", 2014.
    """
    differences = _nonzero(differences)
    if not len(differences):
        return 0.0
    ranks = stats.rankdata(np.abs(differences))
    return float(np.sum(np.sign(differences) * ranks) / np.sum(ranks))


def vargha_delaney(first: np.ndarray, second: np.ndarray) -> float:
    """Compute A12, an unpaired effect size: how often a value of the first sample exceeds one of the second.

    Args:
        first: float (n_first,).
        second: float (n_second,).

    Returns:
        Share of all n_first x n_second combinations in which the first value is larger; equal values count half. 0.5
        is no effect, 1 means that the first is always larger.

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
