"""Members of a front that the experiment `faster-resnet56` has found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paretoprune.fronts import Front
from paretoprune.search.recorder import read_history

from benchmarks.channels.choices import OURS, Choice
from benchmarks.channels.subject import Subject

# Costs that are larger than a limit by no more than this count as equal to it.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Published:
    """A front as the workflow writes it.

    Attributes:
        front: Masks and objectives.
        n_evaluations: Candidates that were evaluated for it; None where there is no history.
    """

    front: Front
    n_evaluations: int | None

    @classmethod
    def read(cls, folder: Path, subject: Subject) -> "Published":
        """Read a folder with `masks.npz` and perhaps `history.csv`.

        Raises:
            ValueError: The front is not one of this subject.
        """
        front = Front.load(folder / "masks.npz")
        if front.masks.n_units != subject.units.n_units or "macs" not in front.names:
            raise ValueError(
                f"expected a front with masks of {subject.units.n_units} units and the objective macs in '{folder}', "
                f"found {front.masks.n_units} units and {', '.join(front.names)}"
            )
        history = folder / "history.csv"
        return cls(front, read_history(history)[-1]["evaluations"] if history.is_file() else None)

    def member(self, level: float) -> int | None:
        """The member that removes at least a share of the multiply-adds, and of these the least; None without one."""
        costs = self.front.objectives[:, self.front.names.index("macs")]
        able = np.flatnonzero(costs <= 1 - level + ROUNDING)
        return int(able[np.argmax(costs[able])]) if len(able) else None

    def choices(self, levels: Sequence[float]) -> Iterator[Choice]:
        """The member for each level that the front reaches, and its channels."""
        for level in levels:
            member = self.member(level)
            if member is not None:
                bits = self.front.masks.unpack(member)
                tried = self.n_evaluations or len(self.front)
                yield Choice(OURS, "elimination", "searched", level, bits, tried=tried)
