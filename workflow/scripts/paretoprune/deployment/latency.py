"""A table of measured times of a network's blocks, and what it predicts for networks that were never built.

Data and arithmetic only, without torch: a search reads the table, `deployment/measuring.py` makes it.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Self

import numpy as np

from paretoprune.deployment.machines import Machine
from paretoprune.files import read_json, write_json

# What errors of predictions are called small.
GOOD = 0.1
FORMAT, VERSION = "paretoprune latency table", 1
BETWEEN = ("linear", "step")

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Correction:
    """A straight line from what a table predicts to what whole networks take: slope * prediction + offset.

    Attributes:
        slope: Without unit.
        offset: Seconds.
    """

    slope: float = 1.0
    offset: float = 0.0

    def of(self, seconds: np.ndarray) -> np.ndarray:
        """Corrected times; float64 of the same shape."""
        return self.slope * seconds + self.offset


@dataclass(frozen=True)
class Grid:
    """Times of one block at every combination of some widths.

    Attributes:
        axes: The widths measured, ascending; one array of int64 for each of the block's widths.
        seconds: float64 (n_1, ..., n_axes), in their order.
    """

    axes: tuple[np.ndarray, ...]
    seconds: np.ndarray

    @classmethod
    def of(cls, name: str, times: Mapping[Widths, float]) -> Self:
        """Arrange measured times.

        Raises:
            ValueError: There is none, widths differ in number, a combination is missing, or a time is no positive
                number (0 is one: what takes none).
        """
        n_axes = {len(point) for point in times}
        if len(n_axes) != 1 or n_axes == {0}:
            raise ValueError(
                f"block '{name}': expected times at widths that are equally many and at least one, found "
                f"{', '.join(str(point) for point in times) or 'none'}"
            )
        axes = tuple(np.unique(values) for values in zip(*times, strict=True))
        missing = [point for point in product(*(axis.tolist() for axis in axes)) if point not in times]
        if missing:
            raise ValueError(
                f"block '{name}': expected a time at every combination of its widths, found none at {missing[0]} and "
                f"{len(missing) - 1} more; measure these too"
            )
        for point, time in times.items():
            if not (math.isfinite(time) and time >= 0):
                raise ValueError(
                    f"block '{name}' at {point}: expected seconds of at least 0, found {time}; measure again"
                )
        seconds = np.zeros([len(axis) for axis in axes])
        for position, point in zip(np.ndindex(seconds.shape), product(*(axis.tolist() for axis in axes)), strict=True):
            seconds[position] = times[point]
        return cls(axes, seconds)

    def between(self, widths: np.ndarray, how: str) -> np.ndarray:
        """Times at any widths inside the measured ones.

        Args:
            widths: int (n, n_axes).
            how: "linear", multilinear between the neighbours measured; "step", that of the next wider ones measured:
                hardware that computes in steps takes as long for less than a whole one.

        Returns:
            float64 (n,), seconds.
        """
        uppers, shares = [], []
        for axis, values in zip(self.axes, widths.T, strict=True):
            upper = np.searchsorted(axis, values)
            lower = np.maximum(upper - 1, 0)
            gap = axis[upper] - axis[lower]
            share = np.where(gap > 0, (values - axis[lower]) / np.maximum(gap, 1), 1.0)
            uppers.append(upper)
            shares.append(share if how == "linear" else np.ones(len(values)))
        total = np.zeros(len(widths))
        for corner in product((0, 1), repeat=len(self.axes)):
            weight = np.ones(len(widths))
            for down, share in zip(corner, shares, strict=True):
                weight = weight * (1 - share if down else share)
            position = tuple(np.maximum(upper - down, 0) for down, upper in zip(corner, uppers, strict=True))
            total += weight * self.seconds[position]
        return total

    def holds(self, widths: np.ndarray) -> np.ndarray:
        """Which widths, int (n, n_axes), lie inside the measured ones; bool (n,)."""
        least, most = (np.array([axis[end] for axis in self.axes]) for end in (0, -1))
        inside: np.ndarray = np.all((widths >= least) & (widths <= most), axis=1)
        return inside


@dataclass(frozen=True)
class Checked:
    """Predictions for networks that a table was not fitted to, beside the times that they took.

    Attributes:
        predicted: Relative to the whole network.
        measured: Likewise; as many, at least one.
        uncertainty: Largest standard error of a measured time, as a share of it.

    Raises:
        ValueError: They are not equally many, or a measured time is not positive.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    uncertainty: float = 0.0

    def __post_init__(self) -> None:
        _ = self.errors

    @property
    def errors(self) -> np.ndarray:
        """(predicted - measured) / measured, float64 (n_networks,)."""
        return prediction_error(np.array(self.predicted), np.array(self.measured))

    @property
    def n_good(self) -> int:
        """Networks that are predicted with a small error, see `GOOD`."""
        return int((np.abs(self.errors) <= GOOD).sum())

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return {"predicted": list(self.predicted), "measured": list(self.measured), "uncertainty": self.uncertainty}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Undo `plain`."""
        predicted, measured = (tuple(_number(one) for one in values[key]) for key in ("predicted", "measured"))
        return cls(predicted, measured, _number(values["uncertainty"]))


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of blocks, on one machine.

    A block of which some width is 0 is dropped: it takes no time, unless a time was measured for that width.

    Attributes:
        machine: Where they were measured.
        blocks: Seconds of each block by its widths, without the overhead of a call.
        constant: Seconds of all that is in no block; negative where blocks take longer alone than together.
        correction: From sums of blocks to whole networks, see `fit`.
        uncertainty: Largest standard error of a time beside the yardstick's, as a share of it
            (`Timings.uncertainties`).
        bound: What that was to be at most; None where nothing was asked for.
        checked: How well the table predicts; None where that was not looked at.

    Raises:
        ValueError: There is no block, or the times of one are not as `Grid.of` needs them.
    """

    machine: Machine
    blocks: Mapping[str, Mapping[Widths, float]]
    constant: float = 0.0
    correction: Correction = Correction()
    uncertainty: float = 0.0
    bound: float | None = None
    checked: Checked | None = None

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a latency table: expected blocks, found none; measure at least one")
        # The times are arranged now, so that what is wrong with them is said where they come from.
        _ = self.grids

    @property
    def is_noisy(self) -> bool:
        """Whether times are known less well than was asked for, those of the networks for the check included."""
        worst = max(self.uncertainty, self.checked.uncertainty if self.checked else 0.0)
        return self.bound is not None and worst > self.bound

    def report(self, log: logging.Logger) -> None:
        """Say how well times are known, and how good predictions are."""
        if self.is_noisy:
            networks = f", of whole networks to {100 * self.checked.uncertainty:.1f} %" if self.checked else ""
            log.warning(
                "the machine was noisy: times of layers are known to %.1f %%%s, expected %.1f %%; stop what else runs "
                "here and measure again, or allow more rounds",
                100 * self.uncertainty, networks, 100 * (self.bound or 0.0),
            )  # fmt: skip
        if self.checked:
            errors = np.abs(self.checked.errors)
            log.info(
                "predicted latency of %d random networks: %d within %.0f %%, median error %.1f %%, largest %.1f %%",
                len(errors), self.checked.n_good, 100 * GOOD, 100 * np.median(errors), 100 * errors.max(),
            )  # fmt: skip

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The times of each block, arranged."""
        return {name: Grid.of(name, times) for name, times in self.blocks.items()}

    def predict(self, widths: Mapping[str, Sequence[int]], between: str = "linear") -> float:
        """Seconds of one network; arguments and errors are those of `predict_all`."""
        return float(self.predict_all({name: np.array([one]) for name, one in widths.items()}, between)[0])

    def predict_all(self, widths: Mapping[str, np.ndarray], between: str = "linear") -> np.ndarray:
        """Seconds of several networks: the sum over their blocks and the constant, corrected.

        Args:
            widths: Of every block, int (n_networks, n_axes).
            between: What is read between the widths measured, "linear" or "step" (`Grid.between`).

        Returns:
            float64 (n_networks,).

        Raises:
            ValueError: Blocks are missing or unknown, or widths lie outside those that were measured.
        """
        if between not in BETWEEN:
            raise ValueError(f"between: expected one of {', '.join(BETWEEN)}, found '{between}'")
        if set(widths) != set(self.blocks):
            missing, unknown = sorted(set(self.blocks) - set(widths)), sorted(set(widths) - set(self.blocks))
            raise ValueError(
                f"expected widths of each block of the table, found none of {_named(missing)} and some of unknown "
                f"{_named(unknown)}; a dropped block has width 0"
            )
        total = np.full(len(next(iter(widths.values()))), self.constant)
        for name, of_block in widths.items():
            total = total + self._of_block(name, np.asarray(of_block), between)
        return self.correction.of(total)

    def _of_block(self, name: str, widths: np.ndarray, between: str) -> np.ndarray:
        grid = self.grids[name]
        if widths.ndim != 2 or widths.shape[1] != len(grid.axes):
            raise ValueError(
                f"block '{name}': expected {len(grid.axes)} widths a network, found an array {widths.shape}"
            )
        inside = grid.holds(widths)
        dropped = (widths == 0).any(axis=1) & ~inside
        if not (inside | dropped).all():
            first = tuple(widths[~(inside | dropped)][0].tolist())
            ranges = " x ".join(f"{axis[0]} to {axis[-1]}" for axis in grid.axes)
            raise ValueError(
                f"block '{name}': expected widths from {ranges}, found {first}; measure the block there too"
            )
        seconds = np.zeros(len(widths))
        seconds[inside] = grid.between(widths[inside], between)
        return seconds

    def useful_widths(self, name: str, tolerance: float = 0.02) -> tuple[Widths, ...]:
        """Measured widths of a block that are worth choosing: nothing wider takes as long, or only `tolerance` longer.

        Args:
            name: The block.
            tolerance: Least share of the time that narrowing has to save.

        Returns:
            From the widest; the steps that the hardware likes.

        Raises:
            KeyError: There is no such block.
        """
        times = self.blocks[name]
        useful: list[Widths] = []
        for point in sorted(times, key=lambda point: (sum(point), point), reverse=True):
            wider = (one for one in useful if all(a >= b for a, b in zip(one, point, strict=True)))
            if all(times[point] < (1 - tolerance) * times[one] for one in wider):
                useful.append(point)
        return tuple(useful)

    def corrected(self, predicted: np.ndarray, measured: np.ndarray) -> Self:
        """The same table after `fit` to whole networks that it predicted and that were timed; see there."""
        line, before = fit(predicted, measured), self.correction
        correction = Correction(line.slope * before.slope, line.slope * before.offset + line.offset)
        return replace(self, correction=correction)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        blocks = {
            name: [{"widths": list(point), "seconds": seconds} for point, seconds in times.items()]
            for name, times in self.blocks.items()
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine.plain(),
            "uncertainty": self.uncertainty,
            "bound": self.bound,
            "checked": self.checked.plain() if self.checked else None,
            "constant_seconds": self.constant,
            "correction": {"slope": self.correction.slope, "offset_seconds": self.correction.offset},
            "blocks": blocks,
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is no latency table, one of another version, or damaged.
        """
        remedy = "measure anew"
        try:
            content = read_json(path)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a latency table as JSON, found none ({error}); {remedy}") from error
        found = content.get("format"), content.get("version")
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: expected a {FORMAT} of version {VERSION}, found {found[0]} {found[1]}; {remedy}")
        try:
            correction = content["correction"]
            return cls(
                machine=Machine.of(content["machine"]),
                blocks={name: _times(entries) for name, entries in content["blocks"].items()},
                constant=_number(content["constant_seconds"]),
                correction=Correction(_number(correction["slope"]), _number(correction["offset_seconds"])),
                uncertainty=_number(content["uncertainty"]),
                # Tables from before there was a check have neither.
                bound=None if content.get("bound") is None else _number(content["bound"]),
                checked=None if content.get("checked") is None else Checked.of(content["checked"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: expected a whole latency table, found a damaged one ({told}); {remedy}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def fit(predicted: np.ndarray, measured: np.ndarray) -> Correction:
    """The line from predicted to measured times that makes the relative errors smallest, in least squares.

    Args:
        predicted: float (n_networks,), seconds.
        measured: float (n_networks,), seconds, positive.

    Raises:
        ValueError: There are fewer than two networks, they are not equally many, or predictions do not differ.
    """
    predicted, measured = _pair(predicted, measured)
    if np.ptp(predicted) == 0:
        raise ValueError(
            f"expected two or more networks with different predictions, found {len(predicted)} of "
            f"{len(set(predicted.tolist()))} predictions; time networks of different widths"
        )
    # Columns in units of the mean prediction: seconds beside ones would be badly conditioned.
    unit = np.abs(predicted).mean()
    rows = np.stack([predicted, np.full_like(predicted, unit)], axis=1) / measured[:, None]
    (slope, offset), *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    return Correction(float(slope), float(offset * unit))


def prediction_error(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Relative errors of predictions, (predicted - measured) / measured; float64 (n_networks,).

    Raises:
        ValueError: They are not equally many, or a measured time is not positive.
    """
    predicted, measured = _pair(predicted, measured)
    return (predicted - measured) / measured


def _pair(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predicted, measured = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != measured.shape or not len(predicted):
        raise ValueError(
            f"expected as many predicted as measured times, found shapes {predicted.shape} and {measured.shape}"
        )
    if not (measured > 0).all() or not np.isfinite(measured).all():
        raise ValueError(f"expected measured times above 0, found {measured.min()}; measure again")
    return predicted, measured


def _times(entries: Sequence[Mapping[str, Any]]) -> dict[Widths, float]:
    times = {tuple(int(width) for width in one["widths"]): _number(one["seconds"]) for one in entries}
    if len(times) != len(entries):
        raise ValueError("expected each width once, found some twice; measure anew")
    return times


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value!r}; measure anew")
    return float(value)


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
