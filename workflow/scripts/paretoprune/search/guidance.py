"""A guide that depends on the candidate: its bits ranked by what a drop costs and a grow gains as it stands.

The order of elimination (`importance.curvature`) is that of one path from the trained layer down. A search leaves that
path; here the costs are asked for anew for the groups that a move is about to touch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from paretoprune.masks.packed import WORD_BITS, unpack_row
from paretoprune.masks.units import Units
from paretoprune.search.groups import SearchedGroup

# From the name of a group and which of its units are kept, bool (n_units of the group,), to the cost of dropping
# each kept one and the gain of growing each other one, float32 (n_units of the group,).
Costs = Callable[[str, np.ndarray], np.ndarray]


class CandidateGuide:
    """Ranks the searched bits of a candidate's groups by what a drop costs and a grow gains.

    Args:
        costs: Says so, for one group.
        units: The groups of a mask.
        groups: Those with searched bits.
        n_remembered: Groups whose order is remembered: parents are varied more than once.
    """

    def __init__(self, costs: Costs, units: Units, groups: Sequence[SearchedGroup], *, n_remembered: int = 64) -> None:
        self._costs, self._groups, self._n_remembered = costs, groups, n_remembered
        starts = {int(start): i for i, start in enumerate(units.offsets[:-1])}
        places = [starts[group.start] for group in groups]
        self._names = [units.names[i] for i in places]
        self._sizes = [int(units.sizes[i]) for i in places]
        self._known: OrderedDict[tuple[int, bytes], np.ndarray] = OrderedDict()

    def __call__(self, words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """The order of the searched bits of some groups, least important first, see `SearchedGroup.rank`."""
        return {k: self._order(words, k) for k in chosen}

    def _order(self, words: np.ndarray, k: int) -> np.ndarray:
        group, size = self._groups[k], self._sizes[k]
        # The group's first word may begin with bits of the group before.
        offset = group.at.start * WORD_BITS
        start = group.start - offset
        kept = unpack_row(words[group.at], group.n_bits)[start : start + size]
        key = (k, kept.tobytes())
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        scores = np.zeros(offset + group.n_bits, dtype=np.float32)
        scores[group.start : group.start + size] = self._costs(self._names[k], kept)
        order = group.rank(scores)
        self._known[key] = order
        if len(self._known) > self._n_remembered:
            self._known.popitem(last=False)
        return order
