"""A guide that depends on the candidate: its bits ranked by what a drop costs and a grow gains as it stands.

The order of elimination (`importance.curvature`) is that of one path from the trained layer down. A search leaves that
path; here the costs are asked for anew for the layers that a move is about to touch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from paretoprune.masks.packed import WORD_BITS, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.search.operators import SearchedLayer

# From the name of a layer and which of its weights are kept, bool (n_weights of the layer,), to the cost of dropping
# each kept one and the gain of growing each other one, float32 (n_weights of the layer,).
Costs = Callable[[str, np.ndarray], np.ndarray]


class CandidateGuide:
    """Ranks the searched bits of a candidate's layers by what a drop costs and a grow gains.

    Args:
        costs: Says so, for one layer.
        layout: The layers of a mask.
        layers: Those with searched bits.
        n_remembered: Layers whose order is remembered: parents are varied more than once.
    """

    def __init__(
        self, costs: Costs, layout: WeightUnits, layers: Sequence[SearchedLayer], *, n_remembered: int = 64
    ) -> None:
        self._costs, self._layers, self._n_remembered = costs, layers, n_remembered
        starts = {int(start): i for i, start in enumerate(layout.offsets[:-1])}
        places = [starts[layer.start] for layer in layers]
        self._names = [layout.names[i] for i in places]
        self._sizes = [int(layout.sizes[i]) for i in places]
        self._known: OrderedDict[tuple[int, bytes], np.ndarray] = OrderedDict()

    def __call__(self, words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """The order of the searched bits of some layers, least important first, see `SearchedLayer.rank`."""
        return {k: self._order(words, k) for k in chosen}

    def _order(self, words: np.ndarray, k: int) -> np.ndarray:
        layer, size = self._layers[k], self._sizes[k]
        # The layer's first word may begin with bits of the layer before.
        offset = layer.at.start * WORD_BITS
        start = layer.start - offset
        kept = unpack_row(words[layer.at], layer.n_bits)[start : start + size]
        key = (k, kept.tobytes())
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        scores = np.zeros(offset + layer.n_bits, dtype=np.float32)
        scores[layer.start : layer.start + size] = self._costs(self._names[k], kept)
        order = layer.rank(scores)
        self._known[key] = order
        if len(self._known) > self._n_remembered:
            self._known.popitem(last=False)
        return order
