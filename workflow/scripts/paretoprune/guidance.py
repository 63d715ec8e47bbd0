"""Guidance by curvature as it stands for one candidate: what a drop costs and a grow gains after re-fitting.

The order of elimination (`paretoprune.curvature`) is that of one path from the trained layer down. A search leaves that
path; here the costs are worked out anew for the layers that a move is about to touch.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from paretoprune.corridor import Corridor
from paretoprune.devices import repeatable
from paretoprune.evaluation import PopulationEvaluator
from paretoprune.masks import MaskLayout, unpack_row
from paretoprune.operators import SearchedLayer
from paretoprune.reconstruction import Reconstruction
from paretoprune.statistics import LayerStatistics

# Layers whose costs are remembered: parents are varied more than once.
_N_REMEMBERED = 64


class CurvatureGuide:
    """Ranks the searched bits of a candidate's layers by what a drop costs and a grow gains.

    Args:
        reconstruction: Re-fits candidates.
        statistics: Of the layers.
        layout: The layers of a mask.
        layers: Those with searched bits.
    """

    def __init__(
        self,
        reconstruction: Reconstruction,
        statistics: Mapping[str, LayerStatistics],
        layout: MaskLayout,
        layers: Sequence[SearchedLayer],
    ) -> None:
        self._reconstruction, self._layout, self._layers = reconstruction, layout, layers
        self._sensitivity = {name: layer.sensitivity for name, layer in statistics.items()}
        starts = {int(start): name for start, name in zip(layout.offsets[:-1], layout.names, strict=True)}
        self._names = [starts[layer.start] for layer in layers]
        self._known: OrderedDict[tuple[int, bytes], np.ndarray] = OrderedDict()

    def __call__(self, words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        """The order of the searched bits of some layers, least important first, see `SearchedLayer.rank`."""
        return {k: self._order(words, k) for k in chosen}

    def _order(self, words: np.ndarray, k: int) -> np.ndarray:
        layer, name = self._layers[k], self._names[k]
        i = self._layout.names.index(name)
        start, size = layer.start, int(self._layout.sizes[i])
        offset = layer.at.start * 64
        kept = unpack_row(words[layer.at], layer.n_bits)[start - offset : start - offset + size]
        key = (k, kept.tobytes())
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        scores = np.zeros(offset + layer.n_bits, dtype=np.float32)
        scores[start : start + size] = self._scores(name, kept.reshape(self._layout.shapes[i]))
        order = layer.rank(scores)
        self._known[key] = order
        if len(self._known) > _N_REMEMBERED:
            self._known.popitem(last=False)
        return order

    def _scores(self, name: str, kept: np.ndarray) -> np.ndarray:
        """float32 (n_weights of the layer,); by magnitude where the layer has no statistics."""
        with repeatable(), torch.inference_mode():
            mask = torch.from_numpy(kept.copy())
            costs = self._reconstruction.costs(name, mask)
            if name in self._sensitivity:
                costs = costs * self._sensitivity[name].to(costs).view(-1, *[1] * (costs.ndim - 1))
            scores: np.ndarray = costs.cpu().reshape(-1).numpy()
        return scores


def curvature_guide(evaluate: PopulationEvaluator) -> Callable[[Corridor], CurvatureGuide]:
    """Makes the guide of each corridor, with what an evaluator re-fits its candidates by.

    Raises:
        ValueError: The evaluator does not re-fit.
    """
    reconstruction = evaluate.reconstruction
    if reconstruction is None:
        raise ValueError("a guide by re-fitted costs needs repair 'reconstruct'; choose it, or other guides")
    return lambda corridor: CurvatureGuide(reconstruction, evaluate.statistics, evaluate.layout, corridor.layers)
