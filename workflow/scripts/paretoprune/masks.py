"""Pruning masks: where each prunable weight lies in a flat mask, and many masks as packed bits."""

import fnmatch
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from paretoprune.files import read_npz, write_npz

if TYPE_CHECKING:
    from torch import nn

WORD_BITS = 64


@dataclass(frozen=True)
class MaskLayout:
    """Where each prunable tensor lies in the flat mask.

    Attributes:
        names: Parameter names in the order in which they lie in the mask.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, network: "nn.Module", exclude: Sequence[str] = ()) -> "MaskLayout":
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


def n_words_for(n_bits: int) -> int:
    """Number of 64-bit words that hold `n_bits`."""
    return -(-n_bits // WORD_BITS)


def pack_rows(rows: np.ndarray) -> np.ndarray:
    """Pack booleans into words, 64 to a word, low bit first, padding 0.

    Args:
        rows: bool (n, n_bits).

    Returns:
        uint64 (n, n_words).
    """
    n, n_bits = rows.shape
    packed = np.packbits(rows, axis=1, bitorder="little")
    if n_bits % WORD_BITS:
        octets, packed = packed, np.zeros((n, n_words_for(n_bits) * 8), dtype=np.uint8)
        packed[:, : octets.shape[1]] = octets
    return packed.view("<u8").astype(np.uint64, copy=False)


def unpack_row(words: np.ndarray, n_bits: int) -> np.ndarray:
    """Undo `pack_rows` for one row: uint64 (n_words,) to bool (n_bits,)."""
    octets = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    return np.unpackbits(octets, count=n_bits, bitorder="little").view(bool)


def fingerprint(words: np.ndarray) -> bytes:
    """A 128-bit fingerprint of one row of words; equal rows have equal fingerprints.

    It is no cryptographic hash, but among the millions of masks of a long search two different ones share a fingerprint
    with a probability below 1e-24.
    """
    return xxhash.xxh3_128_digest(np.ascontiguousarray(words).data)


class Genome:
    """One mask as an individual of an evolutionary search, handed around by reference and never changed.

    Attributes:
        words: uint64 (n_words,), one row of `PackedMasks`; read-only, except in a draft.
    """

    __slots__ = ("_fingerprint", "words")

    def __init__(self, words: np.ndarray, *, draft: bool = False) -> None:
        """Take over `words`.

        Args:
            words: uint64 (n_words,). A view is copied: it would keep alive the whole array that it looks into, for
                instance all masks of a generation of which only one survives.
            draft: The words may still be changed by the next operator, see `edit`.
        """
        self.words = words if words.flags.owndata else words.copy()
        self.words.flags.writeable = draft
        self._fingerprint: bytes | None = None

    def edit(self) -> np.ndarray:
        """Words to change and to make a new genome of: a draft's own, which is then used up, otherwise a copy."""
        return self.words if self.words.flags.writeable else self.words.copy()

    @property
    def fingerprint(self) -> bytes:
        """Fingerprint of the words, computed once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.words)
        return self._fingerprint


@dataclass(frozen=True)
class PackedMasks:
    """Many pruning masks, one bit a weight.

    Attributes:
        words: uint64 (n_masks, n_words); bit 1 = the weight is kept; padding bits are 0.
        n_weights: Number of weights a mask covers.
    """

    words: np.ndarray
    n_weights: int

    def __post_init__(self) -> None:
        expected = n_words_for(self.n_weights)
        if self.words.dtype != np.uint64 or self.words.ndim != 2 or self.words.shape[1] != expected:
            raise ValueError(
                f"expected uint64 words of shape (n_masks, {expected}) for {self.n_weights} weights, "
                f"found {self.words.dtype} {self.words.shape}"
            )
        used = self.n_weights % WORD_BITS
        if used and len(self.words) and np.any(self.words[:, -1] >> np.uint64(used)):
            raise ValueError("padding bits beyond the last weight must be 0; build masks with PackedMasks.pack")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def pack(cls, masks: np.ndarray) -> "PackedMasks":
        """Pack boolean masks (n_masks, n_weights)."""
        masks = np.atleast_2d(np.asarray(masks, dtype=bool))
        return cls(pack_rows(masks), masks.shape[1])

    @classmethod
    def pack_each(cls, masks: Iterable[np.ndarray], n_weights: int) -> "PackedMasks":
        """Pack boolean masks, each (n_weights,), one by one as they come: no more than one is ever held as booleans."""
        rows = [pack_rows(mask[None])[0] for mask in masks]
        return cls(np.array(rows, dtype=np.uint64).reshape(len(rows), n_words_for(n_weights)), n_weights)

    @classmethod
    def of_genomes(cls, genomes: Iterable[Genome], n_weights: int) -> "PackedMasks":
        """The masks of genomes, in their order."""
        rows = [genome.words for genome in genomes]
        return cls(np.array(rows, dtype=np.uint64).reshape(len(rows), n_words_for(n_weights)), n_weights)

    @classmethod
    def empty(cls, n_weights: int) -> "PackedMasks":
        """No masks at all, over `n_weights` weights."""
        return cls(np.zeros((0, n_words_for(n_weights)), dtype=np.uint64), n_weights)

    def unpack(self, index: int) -> np.ndarray:
        """Mask number `index` as bool (n_weights,)."""
        return unpack_row(self.words[index], self.n_weights)

    def select(self, indices: np.ndarray | Sequence[int]) -> "PackedMasks":
        """The masks at `indices` (integers or booleans), in that order."""
        rows = np.asarray(indices)
        # An empty list has no integer type of its own.
        return PackedMasks(self.words[rows if rows.size else rows.astype(np.int64)], self.n_weights)

    def concatenate(self, other: "PackedMasks") -> "PackedMasks":
        """These masks followed by the other's.

        Raises:
            ValueError: The two cover different numbers of weights.
        """
        if other.n_weights != self.n_weights:
            raise ValueError(f"expected masks over {self.n_weights} weights, found {other.n_weights}")
        return PackedMasks(np.concatenate([self.words, other.words]), self.n_weights)

    @property
    def n_kept(self) -> np.ndarray:
        """Number of kept weights per mask, int64 (n_masks,)."""
        return np.bitwise_count(self.words).sum(axis=1, dtype=np.int64)

    @property
    def density(self) -> np.ndarray:
        """Share of kept weights per mask, float64 (n_masks,)."""
        return self.n_kept / self.n_weights

    def fingerprints(self) -> list[bytes]:
        """One fingerprint per mask."""
        return [fingerprint(row) for row in self.words]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an npz file with arrays `words` and `n_weights`."""
        write_npz(path, {"words": self.words, "n_weights": np.array(self.n_weights)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PackedMasks":
        """Read what `save` wrote."""
        arrays = read_npz(path)
        return cls(arrays["words"], int(arrays["n_weights"]))


def ranks_within_layers(scores: np.ndarray, layout: MaskLayout) -> np.ndarray:
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


def keep_top(ranks: np.ndarray, n_keep: Iterable[int], layout: MaskLayout) -> np.ndarray:
    """The mask that keeps exactly the `n_keep` best-ranked weights of each layer.

    Args:
        ranks: int (n_weights,) from `ranks_within_layers`.
        n_keep: Number to keep per layer, (n_layers,).
        layout: The layers.

    Returns:
        bool (n_weights,).
    """
    return ranks < np.repeat(np.asarray(n_keep, dtype=np.int32), layout.sizes)
