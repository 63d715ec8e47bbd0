"""A guide that depends on the candidate: its bits are ranked by what a drop costs and a grow gains in its mask.

The score `elimination` (`importance.curvature`) follows one path from the trained layer down, but a search leaves that
path. Here costs and gains are computed anew for the groups that a move is about to change.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from paretoprune.masks.packed import WORD_BITS, unpack_row
from paretoprune.masks.units import Units
from paretoprune.search.groups import SearchedGroup

# From the name of a group and which of its units are kept, bool (n_units of the group,), to the cost of dropping each
# kept unit and the gain of growing each other one, float32 (n_units of the group,).
FlipCosts = Callable[[str, np.ndarray], np.ndarray]


class CandidateGuide:
    """Ranks the searched bits of a candidate's groups by what a drop costs and a grow gains.

    Args:
        costs: Computes costs and gains for one group.
        units: The groups of a mask.
        groups: Those with searched bits.
        cache_size: Number of orders that are cached, as parents are varied more than once.
    """

    def __init__(
        self, costs: FlipCosts, units: Units, groups: Sequence[SearchedGroup], *, cache_size: int = 64
    ) -> None:
        self._costs, self._groups, self._cache_size = costs, groups, cache_size
        index_of_start = {int(start): i for i, start in enumerate(units.offsets[:-1])}
        indices = [index_of_start[group.start] for group in groups]
        self._names = [units.names[i] for i in indices]
        self._sizes = [int(units.sizes[i]) for i in indices]
        # The least recently used comes first.
        self._orders: OrderedDict[tuple[int, bytes], np.ndarray] = OrderedDict()

    def __call__(self, words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """The order of the searched bits of some groups by the index of the group, see `SearchedGroup.rank`."""
        return {k: self._order(words, k) for k in chosen}

    def _order(self, words: np.ndarray, k: int) -> np.ndarray:
        group, size = self._groups[k], self._sizes[k]
        # The group's first word may begin with bits of the group before.
        offset = group.word_slice.start * WORD_BITS
        start = group.start - offset
        kept = unpack_row(words[group.word_slice], group.n_bits)[start : start + size]
        key = (k, kept.tobytes())
        if key in self._orders:
            self._orders.move_to_end(key)
            return self._orders[key]
        scores = np.zeros(offset + group.n_bits, dtype=np.float32)
        scores[group.start : group.start + size] = self._costs(self._names[k], kept)
        order = group.rank(scores)
        self._orders[key] = order
        if len(self._orders) > self._cache_size:
            self._orders.popitem(last=False)
        return order
