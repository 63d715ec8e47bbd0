"""Samples for a first population: masks drawn along a ranking, or without any guide."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.random import Generator

from paretoprune.masks.packed import WORD_BITS, n_words_for
from paretoprune.search.groups import Ranking, SearchedGroup, words_with

# Precision of the probabilities in `random_words`, in binary digits.
PROBABILITY_BITS = 24


def keep_probabilities(n_bits: int, density: float, softness: float) -> np.ndarray:
    """Probability of each bit of a group to be 1: a logistic function of its coordinate whose mean is `density`.

    Args:
        n_bits: Number of searched bits of the group.
        density: Expected share of ones, 0 to 1.
        softness: Width of the logistic step in coordinates. Near 0 the most important bits are 1 for sure; with large
            values the ranking does not matter.

    Returns:
        float32 (n_bits,), in the order of the ranking, rising.
    """
    density = float(np.clip(density, 1e-9, 1 - 1e-9))
    # The centre c that solves: integral over x from 0 to 1 of 1 / (1 + exp((c - x) / softness)) = density.
    centre = 1 - density + softness * np.log(np.expm1(-(1 - density) / softness) / np.expm1(-density / softness))
    coordinate = (np.arange(n_bits, dtype=np.float32) + 0.5) / n_bits
    return 1 / (1 + np.exp(np.clip((centre - coordinate) / softness, -50, 50)))


def sample_bernoulli(
    groups: Sequence[SearchedGroup],
    ranking: Ranking,
    lower: np.ndarray,
    densities: Sequence[float],
    softness: float,
    rng: Generator,
) -> Iterator[np.ndarray]:
    """Draw one mask per density, each searched bit by its own probability, which rises with importance.

    Args:
        groups: The groups with searched bits.
        ranking: The order of their bits.
        lower: uint64 (n_words,), the bits that are 1 in any case.
        densities: Expected share of ones among the searched bits, 0 to 1.
        softness: Width of the logistic step, see `keep_probabilities`.
        rng: Random generator.

    Yields:
        uint64 (n_words,), one mask after the other.
    """
    for density in densities:
        words = lower.copy()
        for group, order in zip(groups, ranking, strict=True):
            drawn = rng.random(len(order), dtype=np.float32) < keep_probabilities(len(order), density, softness)
            words[group.word_slice] |= words_with(group, order[drawn])
        yield words


def random_words(n_bits: int, probability: float, rng: Generator) -> np.ndarray:
    """Draw words whose bits are 1 with `probability`.

    Args:
        n_bits: Number of bits.
        probability: 0 to 1, rounded to `PROBABILITY_BITS` binary digits.
        rng: Random generator.

    Returns:
        uint64 (n_words,), padding 0.
    """
    digits = round(probability * 2**PROBABILITY_BITS)
    if digits == 2**PROBABILITY_BITS:
        words = np.full(n_words_for(n_bits), ~np.uint64(0))
    else:
        words = np.zeros(n_words_for(n_bits), dtype=np.uint64)
        # With fair coins, "or" turns the probability p of a 1 into (1 + p) / 2, and "and" turns it into p / 2. So from
        # the lowest binary digit up, each digit moves in front of those before it: 0.d becomes 0.1d or 0.0d.
        for place in range(PROBABILITY_BITS):
            digit = digits >> place & 1
            # Below the lowest digit that is 1, all words are still 0 and need no coins.
            if digits & ((2 << place) - 1):
                coins = rng.integers(0, 2**64, size=len(words), dtype=np.uint64)
                (np.bitwise_or if digit else np.bitwise_and)(words, coins, out=words)
    words[-1] &= ~np.uint64(0) >> np.uint64(-n_bits % WORD_BITS)
    return words


def sample_unguided(n_bits: int, densities: Sequence[float], rng: Generator) -> Iterator[np.ndarray]:
    """Draw one mask per density, with the same probability for all bits; yields uint64 (n_words,)."""
    return (random_words(n_bits, density, rng) for density in densities)
