"""Activations that are kept, so that a candidate which differs from an earlier one only later on starts there.

The memory is anonymous and shared: processes forked later read and write the same activations, and it vanishes with the
last of them, however they end.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from paretoprune.masks.packed import fingerprint, pack_rows
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.tracing import Cut


@dataclass(frozen=True)
class Plan:
    """Where a candidate starts, and what is kept of it.

    Attributes:
        start: Number of a cut and of the slot with the activations there; None to start from the images.
        keep: Slots to write into, by number of the cut.
        keys: Fingerprints of the candidate up to each cut.
    """

    start: tuple[int, int] | None = None
    keep: dict[int, int] = field(default_factory=dict)
    keys: tuple[bytes, ...] = ()


NO_PLAN = Plan()


class PrefixCache:
    """Keeps the activations of candidates at the cuts of a network, the latest used ones.

    Args:
        cuts: Where activations are kept, first to last.
        layout: The layers of a mask.
        n_images: Images that candidates are evaluated on.
        n_calibration: Images that candidates are repaired on.
        dtype: Type of the activations.
        budget: Bytes to spend; too few for two candidates, and nothing is kept.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        layout: WeightUnits,
        n_images: int,
        n_calibration: int,
        dtype: torch.dtype,
        budget: int,
    ) -> None:
        self.cuts = tuple(cuts)
        self._n_images = n_images
        n_rows = n_images + n_calibration
        sizes = [n_rows * prod(cut.shape) * dtype.itemsize for cut in cuts]
        self.n_slots = budget // sum(sizes) if sizes else 0
        self.hits = self.misses = 0
        if self.n_slots < 2:
            self.n_slots, self.cuts = 0, ()
        self._n_rows, self._dtype, self._sizes = n_rows, dtype, sizes
        self._tensors: list[Tensor]
        self._before = [
            pack_rows(np.isin(layout.names, list(cut.parameters))[layout.group_of][None])[0] for cut in self.cuts
        ]
        self._found: list[OrderedDict[bytes, int]]
        self._free: list[list[int]]
        self._readers: dict[tuple[int, int], int]
        self.forget()

    def allocate(self) -> None:
        """Take the memory, unless it is there; before processes are forked that shall share it.

        Pages are taken when they are first written, so an idle cache costs nothing.
        """
        for cut, size in list(zip(self.cuts, self._sizes, strict=False))[len(self._tensors) :]:
            channels, *space = cut.shape
            memory = mmap.mmap(-1, size * self.n_slots)
            rows = torch.frombuffer(memory, dtype=self._dtype).view(self.n_slots, self._n_rows, *space, channels)
            self._tensors.append(rows.movedim(-1, 2))

    def tensors(self, cut: int, slot: int) -> tuple[Tensor, Tensor]:
        """Views of the activations in a slot: of the images (n_images, c, h, w), and of the calibration images."""
        self.allocate()
        rows = self._tensors[cut][slot]
        return rows[: self._n_images], rows[self._n_images :]

    def plan(self, words: np.ndarray) -> Plan:
        """Where the candidate uint64 (n_words,) can start, and which slots it fills; to be closed by `close`."""
        if not self.n_slots:
            return NO_PLAN
        keys = tuple(fingerprint(words & before) for before in self._before)
        start = None
        for cut in reversed(range(len(self.cuts))):
            slot = self._found[cut].get(keys[cut])
            if slot is not None:
                start = (cut, slot)
                # What lies before it is as good as used.
                for earlier in range(cut + 1):
                    if keys[earlier] in self._found[earlier]:
                        self._found[earlier].move_to_end(keys[earlier])
                self._readers[start] = self._readers.get(start, 0) + 1
                break
        self.hits, self.misses = self.hits + (start is not None), self.misses + (start is None)
        keep = {}
        for cut in range(0 if start is None else start[0] + 1, len(self.cuts)):
            free = self._take(cut)
            if free is not None:
                keep[cut] = free
        return Plan(start, keep, keys)

    def _take(self, cut: int) -> int | None:
        """A slot that nobody uses: a free one, or that of the candidate that has been of no use the longest."""
        if self._free[cut]:
            return self._free[cut].pop()
        for key, slot in self._found[cut].items():
            if not self._readers.get((cut, slot)):
                del self._found[cut][key]
                return slot
        return None

    def forget(self) -> None:
        """Drop everything, the memory too, and the plans that were never closed."""
        self._tensors = []
        self._found = [OrderedDict() for _ in self.cuts]
        self._free = [list(range(self.n_slots)) for _ in self.cuts]
        self._readers = {}

    def close(self, plan: Plan, complete: bool) -> None:
        """Note that a candidate is done; with `complete`, that the slots of its plan hold all of its activations."""
        if plan.start is not None:
            self._readers[plan.start] -= 1
        for cut, slot in plan.keep.items():
            if complete and plan.keys[cut] not in self._found[cut]:
                self._found[cut][plan.keys[cut]] = slot
            else:
                self._free[cut].append(slot)
