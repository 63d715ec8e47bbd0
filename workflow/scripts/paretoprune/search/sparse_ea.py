"""What two published evolutionary algorithms for sparse problems know of the weights, and how it leads their steps.

SparseEA and MSKEA evaluate every decision variable once, alone, before they start. At 1e5 to 1e7 weights and a few
hundred evaluations three things have to differ, for both:

- Weights are evaluated in groups of whole output filters, a share of the budget in all; a weight has its group's score.
- A group is evaluated by the network that lacks this group only, since one that has nothing else guesses. So the order
  is turned round: a group whose loss is in the first front is the least worth keeping. Likewise the first population is
  not built up from nothing but cut down from the dense network, where the scores come from.
- A step flips many bits where theirs flips one: a share, log-uniform between a least one and all. Each bit is still the
  winner of a binary tournament on scores; ties, and so all weights of a group, are settled by chance.

Weight magnitudes are no part of either method, so none enter; to break ties by them would be a third method.

Masks are rows of `masks.pack_rows`. Costs are those of keeping a weight: the lower, the better to keep it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, exp, log, sqrt
from typing import Literal

import numpy as np
from numpy.random import Generator

from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks, pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits

# Tournaments held at a time, so that they never take more than a few megabytes.
TOURNAMENTS_AT_ONCE = 2**18
# MSKEA's stages end at these shares of the budget.
PRIOR_UNTIL, BOTH_UNTIL = 0.618**2, 0.618


# Knowledge


def n_groups_within(evaluations: int, share: float) -> int:
    """How many groups to evaluate: `share` of the evaluations, at least two."""
    return max(2, int(share * evaluations))


def cut_into_groups(units: WeightUnits, n_groups: int) -> np.ndarray:
    """Cut the flat mask into groups of similar size: runs of whole output filters of a layer.

    Where there are fewer groups than layers, a group is a run of whole layers.

    Args:
        units: The layers; the first axis of a tensor counts its output filters.
        n_groups: Largest number of groups; there are fewer where the network has fewer filters.

    Returns:
        int64 (n_groups + 1,), where each group starts and, last, where the last one ends.

    Raises:
        ValueError: There is a single output filter or a single group, so that to lack it would be to keep nothing.
    """
    filters = np.array([shape[0] for shape in units.shapes], dtype=np.int64)
    n_groups = min(n_groups, int(filters.sum()))
    if n_groups < 2:
        raise ValueError(f"expected at least two groups of whole output filters to compare, found {n_groups}")
    bounds = units.offsets.tolist()
    while len(bounds) - 1 > n_groups:
        # The smallest two neighbours together become one.
        joint = [after - before for before, after in zip(bounds[:-2], bounds[2:], strict=True)]
        del bounds[joint.index(min(joint)) + 1]
    n_cuts = np.ones(units.n_groups, dtype=np.int64)
    for _ in range(n_groups - (len(bounds) - 1)):
        n_cuts[np.argmax(np.where(n_cuts < filters, units.sizes / n_cuts, 0))] += 1
    for start, size, rows, cuts in zip(units.offsets[:-1], units.sizes, filters, n_cuts, strict=True):
        bounds.extend((start + np.arange(1, cuts) * rows // cuts * (size // rows)).tolist())
    return np.array(sorted(bounds), dtype=np.int64)


def masks_without_each(bounds: np.ndarray) -> PackedMasks:
    """One mask per group that keeps everything else; `bounds` as from `cut_into_groups`."""
    n_weights = int(bounds[-1])

    def without(start: int, stop: int) -> np.ndarray:
        mask = np.ones(n_weights, dtype=bool)
        mask[start:stop] = False
        return mask

    return PackedMasks.pack_each((without(start, stop) for start, stop in pairwise(bounds.tolist())), n_weights)


def costs_of_weights(bounds: np.ndarray, fronts: np.ndarray) -> np.ndarray:
    """The score of each weight.

    Args:
        bounds: int (n_groups + 1,), from `cut_into_groups`.
        fronts: int (n_groups,), the number of the front, from 0, that the mask without this group is in.

    Returns:
        float32 (n_weights,), 1 for the groups whose loss does most harm, and 1 more for each front before theirs.
    """
    costs = (fronts.max() + 1 - fronts).astype(np.float32)
    return np.repeat(costs, np.diff(bounds))


# Choosing bits


def win_tournaments(
    candidates: np.ndarray, costs: np.ndarray, n: int, rng: Generator, *, prefer: Literal["low", "high"]
) -> np.ndarray:
    """Choose bits by binary tournaments; equals are settled by chance.

    Tournaments are held in rounds, one for each bit still to be chosen, among those not chosen yet: the work is linear
    in the number of candidates however many are chosen.

    Args:
        candidates: int (n_candidates,), distinct bits.
        costs: (n_bits,), of all bits.
        n: How many to choose.
        rng: Random generator.
        prefer: Which of two costs wins.

    Returns:
        int (min(n, n_candidates),), distinct.
    """
    chosen = []
    while 0 < n < len(candidates):
        won = np.zeros(len(candidates), dtype=bool)
        for start in range(0, n, TOURNAMENTS_AT_ONCE):
            pairs = rng.integers(len(candidates), size=(2, min(TOURNAMENTS_AT_ONCE, n - start)))
            first, second = costs[candidates[pairs]]
            won[np.where(second < first if prefer == "low" else second > first, pairs[1], pairs[0])] = True
        chosen.append(candidates[won])
        candidates = candidates[~won]
        n -= len(chosen[-1])
    return np.concatenate([*chosen, candidates[:n]])


def sample_by_tournaments(costs: np.ndarray, n_samples: int, rng: Generator) -> Iterator[np.ndarray]:
    """Draw masks of any density, which lack what tournaments on costs choose.

    Args:
        costs: float32 (n_weights,), lower = keep.
        n_samples: How many masks.
        rng: Random generator.

    Yields:
        uint64 (n_words,), one mask after the other; each keeps something.

    Source:
        Initialisation of SparseEA, see `TournamentVariation`. It sets the cheapest where we clear the costliest, which
        leaves layers that nothing works without alone. Its tournaments may have the same winner twice, and with it no
        mask is denser than 0.6; ours choose as many different weights as it draws, up to all but one.
    """
    everything = np.arange(len(costs))
    for _ in range(n_samples):
        n = min(ceil(rng.random() * len(costs)), len(costs) - 1)
        cleared = win_tournaments(everything, costs, n, rng, prefer="high")
        yield _words_with(everything, len(costs)) ^ _words_with(cleared, len(costs))


def _words_with(bits: np.ndarray, n_bits: int) -> np.ndarray:
    """Words in which the given bits are 1."""
    marks = np.zeros((1, n_bits), dtype=bool)
    marks[0, bits] = True
    return pack_rows(marks)[0]


# Variation


@dataclass
class TournamentVariation:
    """SparseEA's crossover and mutation: clear what is least worth keeping, or set what is most.

    Attributes:
        costs: float32 (n_weights,), lower = keep, from `costs_of_weights`.
        least_share: The smallest step, as a share of the kept weights (in a crossover of those that one parent keeps
            and the other does not), above 0 and up to 1.

    Source:
        Tian, Zhang, Wang and Jin, "An evolutionary algorithm for large-scale sparse multiobjective optimization
        problems", IEEE Transactions on Evolutionary Computation 24(2), 2020. See the module for what differs.
    """

    costs: np.ndarray
    least_share: float

    def cross(self, first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
        """The first parent without some bits that the second lacks, or with some that the second has.

        Args:
            first: uint64 (n_words,).
            second: uint64 (n_words,).
            rng: Random generator.

        Returns:
            uint64 (n_words,).
        """
        child = first.copy()
        if rng.random() < 0.5:
            only = self._ones(first & ~second)
            self._clear(child, only, self._step(len(only), rng), rng)
        else:
            only = self._ones(second & ~first)
            self._set(child, only, self._step(len(only), rng), rng)
        return child

    def vary(self, genomes: Sequence[Genome], rng: Generator) -> list[Genome]:
        """Mutate genomes, each on its own; none ends with no weight at all."""
        varied = []
        for genome in genomes:
            words = genome.edit()
            self._mutate(words, rng)
            varied.append(Genome(words))
        return varied

    def _mutate(self, words: np.ndarray, rng: Generator) -> None:
        kept = self._ones(words)
        n = self._step(len(kept), rng)
        if rng.random() < 0.5:
            self._clear(words, kept, n, rng)
        else:
            # As many as it might have cleared, so that steps up and down weigh the same at any density.
            self._set(words, self._zeros(words), n, rng)

    def _step(self, n_bits: int, rng: Generator) -> int:
        """How many bits to flip where `n_bits` are of interest."""
        return ceil(n_bits * exp(rng.uniform(log(self.least_share), 0)))

    def _clear(self, words: np.ndarray, candidates: np.ndarray, n: int, rng: Generator) -> None:
        """Clear up to `n` candidates, all of them ones, that cost most; the last one of a mask stays."""
        n = min(n, int(np.bitwise_count(words).sum()) - 1)
        words ^= self._words(win_tournaments(candidates, self.costs, n, rng, prefer="high"))

    def _set(self, words: np.ndarray, candidates: np.ndarray, n: int, rng: Generator) -> None:
        """Set up to `n` candidates, all of them zeros, that cost least."""
        words ^= self._words(win_tournaments(candidates, self.costs, n, rng, prefer="low"))

    def _words(self, bits: np.ndarray) -> np.ndarray:
        return _words_with(bits, len(self.costs))

    def _ones(self, words: np.ndarray) -> np.ndarray:
        return np.flatnonzero(unpack_row(words, len(self.costs)))

    def _zeros(self, words: np.ndarray) -> np.ndarray:
        return np.flatnonzero(~unpack_row(words, len(self.costs)))


Guide = Literal["prior", "front", "statistics"]


@dataclass
class StagedVariation(TournamentVariation):
    """MSKEA's crossover and mutation, led by scores at first and by what the non-dominated keep later on.

    Up to 38 % of the budget crossover follows the scores, and mutation follows in a generation either these or the
    current front: it sets what many members keep, or clears what none does; the front is the less likely, the more of
    the budget is spent. From 62 % on every bit in which the parents differ, and each one that a mutation picks, becomes
    1 with the frequency at which members of this and earlier fronts keep it. In between each generation takes the one
    or the other way. Meanwhile weights that fronts rarely keep become costlier.

    Attributes:
        guide: What leads the next generation: scores, scores and the front, or frequencies.

    Source:
        Ding, Chen, Sun and Zhang, "A multi-stage knowledge-guided evolutionary algorithm for large-scale sparse
        multi-objective optimization problems", Swarm and Evolutionary Computation 73, 2022, and the authors' program
        in PlatEMO for what the paper leaves open. Its mutation of the last stage picks 1 bit in D; ours picks each bit
        with the probability drawn for a step. Costs are kept as logarithms, or they would overflow in a long search.
    """

    guide: Guide = field(default="prior", init=False)

    def __post_init__(self) -> None:
        self.costs = np.log(self.costs)
        self._frequency = np.zeros(len(self.costs), dtype=np.float32)
        self._votes = np.zeros(len(self.costs), dtype=np.int32)
        self._n_voters = 0

    def learn(self, front: Sequence[Genome], spent: float, rng: Generator) -> None:
        """Take in the current front, before each generation.

        Args:
            front: The non-dominated of the population.
            spent: Share of the budget that is spent, 0 to 1.
            rng: Draws what leads the generation.
        """
        self._votes[:] = 0
        for genome in front:
            self._votes += unpack_row(genome.words, len(self.costs))
        # The mean of this front's and what was known, weighted by the sizes of this and the last front.
        self._frequency *= self._n_voters
        self._frequency += self._votes
        self._frequency /= self._n_voters + len(front)
        self._n_voters = len(front)
        if spent < BOTH_UNTIL:
            self.costs += np.log1p((1 - self._frequency) * np.float32(sqrt(spent)))
        if spent >= BOTH_UNTIL or (spent >= PRIOR_UNTIL and rng.random() < 0.5):
            self.guide = "statistics"
        else:
            self.guide = "front" if rng.random() < 1 - spent else "prior"

    def cross(self, first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
        """As in `TournamentVariation`, or bits in which the parents differ drawn by their frequency."""
        if self.guide != "statistics":
            return super().cross(first, second, rng)
        child = first & second
        child |= self._words(self._drawn(self._ones(first ^ second), rng))
        return child if child.any() else first.copy()

    def _mutate(self, words: np.ndarray, rng: Generator) -> None:
        if self.guide == "prior":
            super()._mutate(words, rng)
        elif self.guide == "front":
            self._approach_front(words, rng)
        else:
            self._redraw(words, rng)

    def _approach_front(self, words: np.ndarray, rng: Generator) -> None:
        """Set bits that some of the front keep, those of most members first, or clear such that none keeps."""
        n = self._step(int(np.bitwise_count(words).sum()), rng)
        used = pack_rows((self._votes > 0)[None])[0]
        if rng.random() < 0.5:
            wanted = self._ones(used & ~words)
            words ^= self._words(win_tournaments(wanted, self._votes, n, rng, prefer="high"))
        else:
            # None of them has a vote: the winners are drawn by chance.
            unused = self._ones(words & ~used)
            n = min(n, int(np.bitwise_count(words).sum()) - 1)
            words ^= self._words(win_tournaments(unused, self._votes, n, rng, prefer="low"))

    def _redraw(self, words: np.ndarray, rng: Generator) -> None:
        """Draw a few bits anew by their frequency, unless nothing would be left."""
        n = self._step(len(self.costs), rng)
        picked = self._words(rng.integers(len(self.costs), size=n))
        drawn = (words & ~picked) | self._words(self._drawn(self._ones(picked), rng))
        if drawn.any():
            words[:] = drawn

    def _drawn(self, bits: np.ndarray, rng: Generator) -> np.ndarray:
        """Those of the bits that a draw with their frequency keeps."""
        return bits[rng.random(len(bits), dtype=np.float32) < self._frequency[bits]]
