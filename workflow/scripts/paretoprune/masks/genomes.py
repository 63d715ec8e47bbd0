"""One mask as an individual of an evolutionary search."""

import numpy as np

from paretoprune.masks.packed import fingerprint


class Genome:
    """One mask as an individual of an evolutionary search, passed by reference and never changed.

    Attributes:
        words: uint64 (n_words,), one row of `PackedMasks`; read-only, except in a draft.
    """

    __slots__ = ("_fingerprint", "words")

    def __init__(self, words: np.ndarray, *, draft: bool = False) -> None:
        """Take over `words`.

        Args:
            words: uint64 (n_words,). A view is copied. Otherwise it would keep its whole array in memory, for instance
                all masks of a generation of which only one survives.
            draft: Whether the next operator may change the words in place, see `edit`.
        """
        self.words = words if words.flags.owndata else words.copy()
        self.words.flags.writeable = draft
        self._fingerprint: bytes | None = None

    def edit(self) -> np.ndarray:
        """Words to change and to make a new genome of: a copy, or those of a draft, which must not be used again."""
        return self.words if self.words.flags.writeable else self.words.copy()

    @property
    def fingerprint(self) -> bytes:
        """Fingerprint of the words, computed once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.words)
        return self._fingerprint
