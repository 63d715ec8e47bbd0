"""SparseEA and MSKEA, two published evolutionary algorithms for sparse problems, adapted to networks.

Before they start, both evaluate every decision variable once, alone, and give it a score. With 1e5 to 1e7 weights and a
few hundred evaluations, three things have to differ:

- Groups of whole output filters are evaluated instead of weights, with a share of the budget. A weight has the score of
  its group.
- A group is evaluated by the network that lacks only this group, since a network that has nothing else guesses. So the
  order of the scores is reversed: if the network without a group is on the first front, that group is the least worth
  keeping. Accordingly, samples are cut down from the dense network instead of built up from nothing.
- A step flips many bits where the originals flip one: a share that is log-uniform between a smallest one and all. Each
  bit is still the winner of a binary tournament on scores. Ties, as between all weights of a group, are broken at
  random.

Neither method uses weight magnitudes. Breaking ties by them would make a third method, so they are not used here.

Masks are rows of `masks.packed.pack_rows`. The papers' scores are called *penalties* here: a weight with a lower
penalty is better to keep.
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

# Tournaments that are held at a time; more would take more than a few megabytes.
TOURNAMENTS_AT_ONCE = 2**18
# The first and the second of MSKEA's three stages end at these shares of the budget.
PRIOR_UNTIL, BOTH_UNTIL = 0.618**2, 0.618


# Scores


def n_groups_within(evaluations: int, share: float) -> int:
    """Number of groups to evaluate: `share` of the evaluations, at least two."""
    return max(2, int(share * evaluations))


def cut_into_groups(units: WeightUnits, n_groups: int) -> np.ndarray:
    """Cut the flat mask into groups of similar size: successive whole output filters of one layer.

    If there are fewer groups than layers, a group consists of successive whole layers.

    Args:
        units: The layers; the first axis of a tensor counts its output filters.
        n_groups: Largest number of groups; there are fewer where the network has fewer filters.

    Returns:
        int64 (n_groups + 1,), where each group starts and, last, where the last one ends.

    Raises:
        ValueError: There is a single output filter or a single group; a mask without it would keep nothing.
    """
    filters = np.array([shape[0] for shape in units.shapes], dtype=np.int64)
    n_groups = min(n_groups, int(filters.sum()))
    if n_groups < 2:
        raise ValueError(f"expected at least two groups of whole output filters to compare, found {n_groups}")
    offsets = units.offsets.tolist()
    while len(offsets) - 1 > n_groups:
        # The two neighbours that are smallest together become one group.
        joint_sizes = [after - before for before, after in zip(offsets[:-2], offsets[2:], strict=True)]
        del offsets[joint_sizes.index(min(joint_sizes)) + 1]
    # Each further group comes from the layer whose parts are largest so far, if it has more filters than parts.
    n_parts = np.ones(units.n_groups, dtype=np.int64)
    for _ in range(n_groups - (len(offsets) - 1)):
        n_parts[np.argmax(np.where(n_parts < filters, units.sizes / n_parts, 0))] += 1
    for start, size, rows, parts in zip(units.offsets[:-1], units.sizes, filters, n_parts, strict=True):
        # Cuts at whole rows: a row is one filter of size // rows weights.
        offsets.extend((start + np.arange(1, parts) * rows // parts * (size // rows)).tolist())
    return np.array(sorted(offsets), dtype=np.int64)


def masks_without_each(offsets: np.ndarray) -> PackedMasks:
    """For each group, the mask that keeps everything else; `offsets` are those of `cut_into_groups`."""
    n_weights = int(offsets[-1])

    def without(start: int, stop: int) -> np.ndarray:
        mask = np.ones(n_weights, dtype=bool)
        mask[start:stop] = False
        return mask

    return PackedMasks.pack_each((without(start, stop) for start, stop in pairwise(offsets.tolist())), n_weights)


def penalties_of_weights(offsets: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The penalty of each weight.

    Args:
        offsets: int (n_groups + 1,), from `cut_into_groups`.
        ranks: int (n_groups,), the non-dominated rank, from 0, of the mask without each group.

    Returns:
        float32 (n_weights,): 1 for the groups of the last rank, which are missed most; one more for each rank before.
    """
    penalties = (ranks.max() + 1 - ranks).astype(np.float32)
    return np.repeat(penalties, np.diff(offsets))


# Choosing bits


def win_tournaments(
    candidates: np.ndarray, values: np.ndarray, n: int, rng: Generator, *, prefer: Literal["low", "high"]
) -> np.ndarray:
    """Choose bits by binary tournaments; ties are broken at random.

    Args:
        candidates: int (n_candidates,), distinct bits.
        values: (n_bits,), what the tournaments compare, of all bits.
        n: How many to choose.
        rng: Random generator.
        prefer: Which of two values wins.

    Returns:
        int (min(n, n_candidates),), distinct.
    """
    chosen = []
    # In rounds: as many tournaments as bits are still to be chosen, among those that are not chosen yet. A bit may win
    # several times in a round, so that a round chooses too few, but never too many. The work is linear in the number of
    # candidates.
    while 0 < n < len(candidates):
        won = np.zeros(len(candidates), dtype=bool)
        for start in range(0, n, TOURNAMENTS_AT_ONCE):
            pairs = rng.integers(len(candidates), size=(2, min(TOURNAMENTS_AT_ONCE, n - start)))
            first, second = values[candidates[pairs]]
            won[np.where(second < first if prefer == "low" else second > first, pairs[1], pairs[0])] = True
        chosen.append(candidates[won])
        candidates = candidates[~won]
        n -= len(chosen[-1])
    return np.concatenate([*chosen, candidates[:n]])


def sample_by_tournaments(penalties: np.ndarray, n_samples: int, rng: Generator) -> Iterator[np.ndarray]:
    """Draw masks of any density, which keep all weights but those that tournaments on penalties choose.

    Args:
        penalties: float32 (n_weights,), lower = keep.
        n_samples: Number of masks.
        rng: Random generator.

    Yields:
        uint64 (n_words,), one mask after the other; each keeps at least one weight.

    Source:
        Initialisation of SparseEA, see `TournamentVariation`. SparseEA sets the weights of lowest penalty. We clear
        those of highest penalty, which spares the layers that no network works without. Its tournaments may have the
        same winner twice, so that none of its masks is denser than 0.6. Ours choose as many different weights as are
        drawn, up to all but one.
    """
    all_bits = np.arange(len(penalties))
    for _ in range(n_samples):
        n = min(ceil(rng.random() * len(penalties)), len(penalties) - 1)
        cleared = win_tournaments(all_bits, penalties, n, rng, prefer="high")
        yield _words_with(all_bits, len(penalties)) ^ _words_with(cleared, len(penalties))


def _words_with(bits: np.ndarray, n_bits: int) -> np.ndarray:
    """Words in which exactly the given bits are 1, uint64 (n_words,)."""
    row = np.zeros((1, n_bits), dtype=bool)
    row[0, bits] = True
    return pack_rows(row)[0]


# Variation


@dataclass
class TournamentVariation:
    """SparseEA's crossover and mutation: clear the weights least worth keeping, or set those most worth it.

    Attributes:
        penalties: float32 (n_weights,), lower = keep, from `penalties_of_weights`.
        least_share: The smallest step, above 0 and up to 1: in mutation a share of the kept weights, in crossover a
            share of the weights that one parent keeps and the other does not.

    Source:
        Tian, Zhang, Wang and Jin, "An evolutionary algorithm for large-scale sparse multiobjective optimization
        problems", IEEE Transactions on Evolutionary Computation 24(2), 2020. See the module for what differs.
    """

    penalties: np.ndarray
    least_share: float

    def cross(self, first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
        """Take the first parent without some bits that the second lacks, or with some that the second has.

        Args:
            first: uint64 (n_words,).
            second: uint64 (n_words,).
            rng: Random generator.

        Returns:
            uint64 (n_words,).
        """
        child = first.copy()
        if rng.random() < 0.5:
            only_first = self._ones(first & ~second)
            self._clear(child, only_first, self._step_size(len(only_first), rng), rng)
        else:
            only_second = self._ones(second & ~first)
            self._set(child, only_second, self._step_size(len(only_second), rng), rng)
        return child

    def vary(self, genomes: Sequence[Genome], rng: Generator) -> list[Genome]:
        """Mutate each genome by itself; each one keeps at least one weight."""
        varied = []
        for genome in genomes:
            words = genome.edit()
            self._mutate(words, rng)
            varied.append(Genome(words))
        return varied

    def _mutate(self, words: np.ndarray, rng: Generator) -> None:
        kept = self._ones(words)
        n = self._step_size(len(kept), rng)
        if rng.random() < 0.5:
            self._clear(words, kept, n, rng)
        else:
            # As many as the other branch would have cleared: otherwise steps up would be larger than steps down in
            # sparse masks, and smaller in dense ones.
            self._set(words, self._zeros(words), n, rng)

    def _step_size(self, n_bits: int, rng: Generator) -> int:
        """Draw the number of bits to flip: a log-uniform share of `n_bits`."""
        return ceil(n_bits * exp(rng.uniform(log(self.least_share), 0)))

    def _clear(self, words: np.ndarray, candidates: np.ndarray, n: int, rng: Generator) -> None:
        """Clear up to `n` candidates of high penalty, all of them ones, in place; the last one of a mask stays."""
        n = min(n, int(np.bitwise_count(words).sum()) - 1)
        words ^= self._words(win_tournaments(candidates, self.penalties, n, rng, prefer="high"))

    def _set(self, words: np.ndarray, candidates: np.ndarray, n: int, rng: Generator) -> None:
        """Set up to `n` candidates of low penalty, all of them zeros, in place."""
        words ^= self._words(win_tournaments(candidates, self.penalties, n, rng, prefer="low"))

    def _words(self, bits: np.ndarray) -> np.ndarray:
        return _words_with(bits, len(self.penalties))

    def _ones(self, words: np.ndarray) -> np.ndarray:
        return np.flatnonzero(unpack_row(words, len(self.penalties)))

    def _zeros(self, words: np.ndarray) -> np.ndarray:
        return np.flatnonzero(~unpack_row(words, len(self.penalties)))


Guide = Literal["prior", "front", "statistics"]


@dataclass
class StagedVariation(TournamentVariation):
    """MSKEA's crossover and mutation: first they follow penalties, later what non-dominated members keep.

    - Up to 38 % of the budget, crossover follows the penalties. Mutation follows, for a whole generation, either the
      penalties or the current front: it sets bits that many members keep, or clears bits that none keeps. The more of
      the budget is spent, the less likely it follows the front.
    - From 62 % on, bits are drawn anew: in crossover all bits in which the parents differ, in mutation some picked
      ones. Each becomes 1 with the frequency at which members of this and earlier fronts keep it.
    - In between, each generation takes either way.

    Up to 62 %, the penalty of weights that fronts rarely keep rises.

    Attributes:
        guide: What the next generation follows: `prior`, penalties alone; `front`, penalties in crossover and the front
            in mutation; `statistics`, frequencies.

    Source:
        Ding, Chen, Sun and Zhang, "A multi-stage knowledge-guided evolutionary algorithm for large-scale sparse
        multi-objective optimization problems", Swarm and Evolutionary Computation 73, 2022, and the authors' program
        in PlatEMO for what the paper leaves open. In its last stage, mutation picks one bit in D; ours picks
        as many as a step draws. Penalties grow by factors, and are kept as logarithms
        so that they do not overflow in a long search.
    """

    guide: Guide = field(default="prior", init=False)

    def __post_init__(self) -> None:
        self.penalties = np.log(self.penalties)
        self._frequency = np.zeros(len(self.penalties), dtype=np.float32)
        self._votes = np.zeros(len(self.penalties), dtype=np.int32)
        self._n_voters = 0

    def learn(self, front: Sequence[Genome], spent: float, rng: Generator) -> None:
        """Learn from the current front, before each generation.

        Args:
            front: The non-dominated members of the population.
            spent: Share of the budget that is spent, 0 to 1.
            rng: Draws the guide of the generation.
        """
        self._votes[:] = 0
        for genome in front:
            self._votes += unpack_row(genome.words, len(self.penalties))
        # The mean of the frequency so far and that of this front, weighted by the sizes of the last and of this front.
        self._frequency *= self._n_voters
        self._frequency += self._votes
        self._frequency /= self._n_voters + len(front)
        self._n_voters = len(front)
        if spent < BOTH_UNTIL:
            self.penalties += np.log1p((1 - self._frequency) * np.float32(sqrt(spent)))
        if spent >= BOTH_UNTIL or (spent >= PRIOR_UNTIL and rng.random() < 0.5):
            self.guide = "statistics"
        else:
            self.guide = "front" if rng.random() < 1 - spent else "prior"

    def cross(self, first: np.ndarray, second: np.ndarray, rng: Generator) -> np.ndarray:
        """Cross as `TournamentVariation` does, or draw the bits in which the parents differ by their frequency."""
        if self.guide != "statistics":
            return super().cross(first, second, rng)
        child = first & second
        child |= self._words(self._draw_by_frequency(self._ones(first ^ second), rng))
        return child if child.any() else first.copy()

    def _mutate(self, words: np.ndarray, rng: Generator) -> None:
        if self.guide == "prior":
            super()._mutate(words, rng)
        elif self.guide == "front":
            self._approach_front(words, rng)
        else:
            self._redraw(words, rng)

    def _approach_front(self, words: np.ndarray, rng: Generator) -> None:
        """Set bits that members of the front keep, preferring those that most keep, or clear bits that none keeps."""
        n = self._step_size(int(np.bitwise_count(words).sum()), rng)
        used = pack_rows((self._votes > 0)[None])[0]
        if rng.random() < 0.5:
            missing = self._ones(used & ~words)
            words ^= self._words(win_tournaments(missing, self._votes, n, rng, prefer="high"))
        else:
            # None of them has a vote, so that all tournaments are ties.
            unused = self._ones(words & ~used)
            n = min(n, int(np.bitwise_count(words).sum()) - 1)
            words ^= self._words(win_tournaments(unused, self._votes, n, rng, prefer="low"))

    def _redraw(self, words: np.ndarray, rng: Generator) -> None:
        """Draw some bits anew by their frequency, unless the mask would become empty."""
        n = self._step_size(len(self.penalties), rng)
        picked = self._words(rng.integers(len(self.penalties), size=n))
        drawn = (words & ~picked) | self._words(self._draw_by_frequency(self._ones(picked), rng))
        if drawn.any():
            words[:] = drawn

    def _draw_by_frequency(self, bits: np.ndarray, rng: Generator) -> np.ndarray:
        """Select each of the bits with its frequency as probability."""
        return bits[rng.random(len(bits), dtype=np.float32) < self._frequency[bits]]
