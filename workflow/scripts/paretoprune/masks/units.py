"""Where each prunable weight lies in a flat mask."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from paretoprune.masks.packed import PackedMasks


@dataclass(frozen=True)
class WeightUnits:
    """Where each prunable tensor lies in the flat mask.

    Attributes:
        names: Parameter names in the order in which they lie in the mask.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: "nn.Module", exclude: Sequence[str] = ()) -> "WeightUnits":
        """Lay out the weights of every convolution and linear layer of `network`.

        Biases and normalisation parameters are never pruned. A weight shared by several modules appears once.

        Args:
            network: Any module.
            exclude: Shell patterns of parameter names that stay dense, for instance `conv1.weight` or `linear.*`.

        Raises:
            ValueError: Nothing is left to prune, a pattern matches no prunable weight, or a weight is no plain
                parameter.
        """
        # Imported here so that figures and reports, which only read masks, never wait for torch.
        from torch import nn

        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        parameters = dict(network.named_parameters())
        prunable: dict[int, tuple[str, tuple[int, ...]]] = {}
        for prefix, module in network.named_modules():
            if isinstance(module, kinds):
                name = f"{prefix}.weight" if prefix else "weight"
                if id(module.weight) not in prunable and name not in parameters:
                    raise ValueError(
                        f"'{name}' is computed from other tensors (weight norm, another pruning) and cannot be masked; "
                        "make it a plain parameter first, for instance with "
                        "torch.nn.utils.parametrize.remove_parametrizations"
                    )
                prunable.setdefault(id(module.weight), (name, tuple(module.weight.shape)))
        found = list(prunable.values())
        for pattern in exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in found):
                raise ValueError(
                    f"exclude pattern '{pattern}' matches none of the prunable weights "
                    f"({', '.join(name for name, _ in found) or 'there are none'}); correct or remove it"
                )
        kept = [(n, s) for n, s in found if not any(fnmatch.fnmatchcase(n, pattern) for pattern in exclude)]
        if not kept:
            raise ValueError(
                "expected at least one convolution or linear layer to prune, found none"
                + (f" outside exclude={list(exclude)}; exclude less" if found else " in this network; give another one")
            )
        return cls(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of weights per tensor, int64 (n_layers,)."""
        return np.array([prod(shape) for shape in self.shapes], dtype=np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Start of each tensor in the flat mask and, last, its end; int64 (n_layers + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def n_weights(self) -> int:
        """Number of prunable weights."""
        return int(self.offsets[-1])

    @property
    def n_layers(self) -> int:
        """Number of prunable tensors."""
        return len(self.names)

    @cached_property
    def layer_of(self) -> np.ndarray:
        """Index of the tensor that each weight belongs to, int32 (n_weights,)."""
        return np.repeat(np.arange(self.n_layers, dtype=np.int32), self.sizes)

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Concatenate one array per tensor, in layout order.

        Args:
            tensors: An array of the layout's shape for each of its names; others are ignored.

        Returns:
            Array (n_weights,).

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(f"expected '{name}' of shape {shape}, found {found}; was it made for another network?")
        return np.concatenate([np.asarray(tensors[name]).reshape(-1) for name in self.names])

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Cut a flat array (n_weights,) back into one view per tensor."""
        return {
            name: flat[start:stop].reshape(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True
            )
        }

    def n_kept(self, masks: "PackedMasks") -> np.ndarray:
        """Number of kept weights per mask and layer, int64 (n_masks, n_layers)."""
        counts = [np.add.reduceat(masks.unpack(i), self.offsets[:-1], dtype=np.int64) for i in range(len(masks))]
        return np.array(counts, dtype=np.int64).reshape(len(masks), self.n_layers)


def ranks_within_groups(scores: np.ndarray, layout: WeightUnits) -> np.ndarray:
    """Rank every weight inside its own layer; ties are broken by position.

    Args:
        scores: float (n_weights,), higher = keep.
        layout: The layers.

    Returns:
        int32 (n_weights,): 0 for the most important weight of a layer.
    """
    ranks = np.empty(layout.n_weights, dtype=np.int32)
    for start, stop in pairwise(layout.offsets):
        order = np.argsort(-scores[start:stop], kind="stable")
        ranks[start:stop][order] = np.arange(stop - start, dtype=np.int32)
    return ranks


def keep_top(ranks: np.ndarray, n_keep: Iterable[int], layout: WeightUnits) -> np.ndarray:
    """The mask that keeps exactly the `n_keep` best-ranked weights of each layer.

    Args:
        ranks: int (n_weights,) from `ranks_within_groups`.
        n_keep: Number to keep per layer, (n_layers,).
        layout: The layers.

    Returns:
        bool (n_weights,).
    """
    return ranks < np.repeat(np.asarray(n_keep, dtype=np.int32), layout.sizes)
