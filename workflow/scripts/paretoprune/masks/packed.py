"""Many masks as packed bits, 64 to a word."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from paretoprune.files import read_npz, write_npz

if TYPE_CHECKING:
    from paretoprune.masks.genomes import Genome

WORD_BITS = 64


def n_words_for(n_bits: int) -> int:
    """Number of 64-bit words that `n_bits` bits need."""
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

    It is not a cryptographic hash. Among the millions of masks of a long search, the probability that two different
    ones have the same fingerprint is below 1e-24.
    """
    return xxhash.xxh3_128_digest(np.ascontiguousarray(words).data)


@dataclass(frozen=True)
class PackedMasks:
    """Many pruning masks, one bit a unit.

    Attributes:
        words: uint64 (n_masks, n_words); a bit is 1 if the unit is kept; padding bits are 0.
        n_units: Number of units of a mask.

    Raises:
        ValueError: The words have another type or shape, or a padding bit is 1.
    """

    words: np.ndarray
    n_units: int

    def __post_init__(self) -> None:
        expected = n_words_for(self.n_units)
        if self.words.dtype != np.uint64 or self.words.ndim != 2 or self.words.shape[1] != expected:
            raise ValueError(
                f"expected uint64 words of shape (n_masks, {expected}) for {self.n_units} units, "
                f"found {self.words.dtype} {self.words.shape}"
            )
        used = self.n_units % WORD_BITS
        if used and len(self.words) and np.any(self.words[:, -1] >> np.uint64(used)):
            raise ValueError("padding bits beyond the last unit must be 0; build masks with PackedMasks.pack")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def pack(cls, masks: np.ndarray) -> "PackedMasks":
        """Pack boolean masks (n_masks, n_units), or a single one (n_units,)."""
        masks = np.atleast_2d(np.asarray(masks, dtype=bool))
        return cls(pack_rows(masks), masks.shape[1])

    @classmethod
    def pack_each(cls, masks: Iterable[np.ndarray], n_units: int) -> "PackedMasks":
        """Pack boolean masks, each (n_units,), one after the other, so that only one is in memory as booleans."""
        rows = [pack_rows(mask[None])[0] for mask in masks]
        return cls(np.array(rows, dtype=np.uint64).reshape(len(rows), n_words_for(n_units)), n_units)

    @classmethod
    def of_genomes(cls, genomes: "Iterable[Genome]", n_units: int) -> "PackedMasks":
        """The masks of genomes, in their order."""
        rows = [genome.words for genome in genomes]
        return cls(np.array(rows, dtype=np.uint64).reshape(len(rows), n_words_for(n_units)), n_units)

    @classmethod
    def empty(cls, n_units: int) -> "PackedMasks":
        """No masks, of `n_units` units."""
        return cls(np.zeros((0, n_words_for(n_units)), dtype=np.uint64), n_units)

    def unpack(self, index: int) -> np.ndarray:
        """Mask number `index` as bool (n_units,)."""
        return unpack_row(self.words[index], self.n_units)

    def select(self, indices: np.ndarray | Sequence[int]) -> "PackedMasks":
        """The masks at `indices` (integers or booleans), in that order."""
        rows = np.asarray(indices)
        # numpy makes an empty list an array of floats, which are no indices.
        return PackedMasks(self.words[rows if rows.size else rows.astype(np.int64)], self.n_units)

    def concatenate(self, other: "PackedMasks") -> "PackedMasks":
        """These masks followed by the other's.

        Raises:
            ValueError: The masks have different numbers of units.
        """
        if other.n_units != self.n_units:
            raise ValueError(f"expected masks of {self.n_units} units, found {other.n_units}")
        return PackedMasks(np.concatenate([self.words, other.words]), self.n_units)

    def without(self, absent: np.ndarray) -> "PackedMasks":
        """These masks without some units.

        Args:
            absent: uint64 (n_words,), packed like a mask; a bit is 1 if no mask shall keep the unit.
        """
        return PackedMasks(self.words & ~absent, self.n_units)

    @property
    def n_kept(self) -> np.ndarray:
        """Number of kept units per mask, int64 (n_masks,)."""
        return np.bitwise_count(self.words).sum(axis=1, dtype=np.int64)

    @property
    def density(self) -> np.ndarray:
        """Share of kept units per mask, float64 (n_masks,)."""
        return self.n_kept / self.n_units

    def fingerprints(self) -> list[bytes]:
        """One fingerprint per mask."""
        return [fingerprint(row) for row in self.words]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an npz file with the arrays `words` and `n_weights`, the number of units."""
        write_npz(path, {"words": self.words, "n_weights": np.array(self.n_units)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PackedMasks":
        """Read what `save` wrote."""
        arrays = read_npz(path)
        return cls(arrays["words"], int(arrays["n_weights"]))
