"""Parts of a network that can be built at several widths, to be timed one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from paretoprune.deployment.latency import Widths

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Block:
    """A part of a network that can be built at several widths.

    Attributes:
        name: By which the table knows it.
        points: Widths to measure at, every combination of some for each axis.
        make: Builds it at given widths, with an example of its inputs (1 or more images).
        kind: Blocks of one kind take equally long: the first is measured for all. Empty for a block of its own kind.
        is_dense: Whether the dense network has it, at its widest; where it has not, another block is in its place.
    """

    name: str
    points: tuple[Widths, ...]
    make: Callable[[Widths], tuple["nn.Module", Any]] = field(repr=False)
    kind: str = ""
    is_dense: bool = True

    @classmethod
    def over(
        cls,
        name: str,
        axes: Sequence[Sequence[int]],
        make: Callable[[Widths], tuple["nn.Module", Any]],
        kind: str = "",
    ) -> Self:
        """A block at every combination of the widths of its axes."""
        return cls(name, tuple(product(*axes)), make, kind)

    @property
    def widest(self) -> Widths:
        """The largest width of every axis."""
        return tuple(max(widths) for widths in zip(*self.points, strict=True))
