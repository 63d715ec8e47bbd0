"""Statistical tests and effect sizes against hand-computed, brute-force and scipy's answers."""

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from paretoprune.reporting.statistical_tests import holm, rank_biserial, signed_rank_test, vargha_delaney
from scipy import stats

# Fertilisation of maize, Darwin 1876: the differences on which scipy's documentation shows the test.
DARWIN = np.array([6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75], dtype=float)


def test_signed_rank_is_scipys_exact_test() -> None:
    assert signed_rank_test(DARWIN) == (float(stats.wilcoxon(DARWIN, method="exact").pvalue), True)
    # Rank sum 24 of the two negative differences, as in scipy's documentation.
    assert signed_rank_test(DARWIN)[0] == pytest.approx(0.041259765625)


def test_signed_rank_of_all_signs_equal_is_the_share_of_that_outcome() -> None:
    assert signed_rank_test(np.arange(1.0, 7.0)) == pytest.approx((2 / 2**6, True))
    assert signed_rank_test(-np.arange(1.0, 6.0)) == pytest.approx((2 / 2**5, True))


def exact_by_enumeration(differences: np.ndarray) -> float:
    """Two-sided p over all signs of the midranks, zeros left out."""
    differences = differences[differences != 0]
    ranks = stats.rankdata(np.abs(differences))
    centre = ranks.sum() / 2
    found = abs(ranks[differences > 0].sum() - centre)
    sums = np.array([np.dot(signs, ranks) for signs in product((0, 1), repeat=len(ranks))])
    return float(np.mean(np.abs(sums - centre) >= found - 1e-9))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_signed_rank_is_exact_with_ties_and_zeros(differences: list[int]) -> None:
    assume(any(differences))
    p_value, exact = signed_rank_test(np.array(differences, dtype=float))
    assert exact
    assert p_value == pytest.approx(exact_by_enumeration(np.array(differences)), abs=1e-12)


def test_signed_rank_says_when_it_is_approximate() -> None:
    rng = np.random.default_rng(0)
    assert signed_rank_test(rng.normal(size=50))[1]
    many = rng.normal(0.3, 1, size=51)
    assert signed_rank_test(many) == (float(stats.wilcoxon(many, method="asymptotic").pvalue), False)
    tied = np.repeat([1.0, -2.0], 7)
    assert signed_rank_test(tied) == (float(stats.wilcoxon(tied, method="asymptotic").pvalue), False)


def test_equal_methods_do_not_differ() -> None:
    assert signed_rank_test(np.zeros(10)) == (1.0, True)
    # A difference in the last bits is none, and has no rank.
    assert signed_rank_test(np.array([1e-16, -1e-15, 0.0])) == (1.0, True)
    assert rank_biserial(np.array([1e-16, 0.0])) == 0.0


def test_holm_on_the_textbook_example() -> None:
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, and none below the one before it.
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert len(holm(np.array([]))) == 0


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.1])
def test_holm_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"expected p-values between 0 and 1, found .*; leave"):
        holm(np.array([0.5, wrong]))


def test_rank_biserial_by_hand() -> None:
    # Ranks 1, 2, 3, 4 of which the second is negative: (1 + 3 + 4 - 2) / 10. The zero has no rank.
    assert rank_biserial(np.array([0.1, -0.2, 0.3, 0.4, 0.0])) == pytest.approx(0.6)
    # Midranks 1.5, 1.5 and 3.
    assert rank_biserial(np.array([-1.0, 1.0, -2.0])) == pytest.approx(-3 / 6)
    assert rank_biserial(np.array([1.0, 2.0])) == 1.0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a12_by_brute_force(first: list[int], second: list[int]) -> None:
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in first for y in second)
    expected = wins / (len(first) * len(second))
    assert vargha_delaney(np.array(first), np.array(second)) == pytest.approx(expected)


def test_a12_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected values in both samples, found 1 and 0; compare"):
        vargha_delaney(np.array([1.0]), np.array([]))
