"""Timing of several functions in turn, so that a noisy machine hits all of them alike."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

_LOGGER = logging.getLogger("paretoprune")
# A measurement is at least this long (ns), so that neither the clock's steps nor the loop around the calls count.
LEAST_NS = 1_000_000
# How well times are known that are called known: the largest standard error of a ratio, as a share of it.
BOUND = 0.02
REPEATS, MOST_REPEATS = 20, 100
# More calls than that in one measurement say that the clock stands still.
MOST_CALLS = 2**24


@dataclass(frozen=True, eq=False)
class Timings:
    """How long each of several functions took, round by round.

    Attributes:
        seconds: float64 (n_rounds, n_functions), mean of one call within a measurement.
    """

    seconds: np.ndarray

    @property
    def n_rounds(self) -> int:
        """How often each function was measured."""
        return len(self.seconds)

    @property
    def medians(self) -> np.ndarray:
        """Seconds of a call; float64 (n_functions,)."""
        return np.median(self.seconds, axis=0)

    @property
    def spreads(self) -> np.ndarray:
        """How noisy single measurements are: half the interquartile range over the median; float64 (n_functions,)."""
        return _spreads(self.seconds)

    def ratios(self, to: int = 0) -> np.ndarray:
        """Each measurement over that of function `to` in the same round; float64 (n_rounds, n_functions)."""
        return self.seconds / self.seconds[:, [to]]

    def relative(self, to: int = 0) -> np.ndarray:
        """Times relative to function `to`, median of the ratios of all rounds; float64 (n_functions,).

        What slows a whole round down leaves these alone, unlike the ratios of medians.
        """
        return np.median(self.ratios(to), axis=0)

    def relative_spreads(self, to: int = 0) -> np.ndarray:
        """Spreads of the ratios of single rounds; float64 (n_functions,), 0 for `to` itself."""
        return _spreads(self.ratios(to))

    def uncertainties(self, to: int = 0) -> np.ndarray:
        """Standard errors of `relative(to)`, as shares of it; float64 (n_functions,). More rounds make them smaller.

        Source:
            A median of n normal numbers has a standard error of sqrt(pi / 2 / n) standard deviations, and half an
            interquartile range is 0.6745 of them. Rounds are taken as independent, which a slow drift of the ratio
            would belie.
        """
        return self.relative_spreads(to) * np.sqrt(np.pi / 2 / self.n_rounds) / 0.6745


def measure_interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    repeats: int = REPEATS,
    warmup: int = 3,
    reference: int = 0,
    bound: float = BOUND,
    most_repeats: int = MOST_REPEATS,
    least_ns: int = LEAST_NS,
    clock: Callable[[], int] = time.perf_counter_ns,
    progress: Callable[[str], object] | None = None,
    says_noise: bool = True,
) -> Timings:
    """Time functions in turn: A B C, then C B A, then A B C, so that a drift during a round cancels too.

    Each measurement follows one call that is not timed, which brings the function's own weights back into the caches,
    and repeats the call until it takes `least_ns`. Garbage is collected before, not during the measurement.

    Args:
        functions: What to time; `deployment.running.prepare` makes them of networks.
        repeats: Rounds at first, at least 2.
        warmup: Calls of each function before anything is measured.
        reference: The function that all are compared with, usually the dense network.
        bound: Largest uncertainty of a ratio to the reference (`Timings.uncertainties`) that is good enough. Above it,
            `repeats` more rounds are measured, again and again.
        most_repeats: Rounds at most. If the bound is not met by then, a warning says so.
        least_ns: Shortest measurement (nanoseconds).
        clock: Tells the time (nanoseconds).
        progress: Called between measurements, with words that say how far they are.
        says_noise: Whether to warn; False for whoever sums several measurements up in one warning.

    Raises:
        ValueError: There is no function, no such reference, or fewer than 2 repeats.
        RuntimeError: The clock does not move.
    """
    if not functions or not 0 <= reference < len(functions):
        raise ValueError(
            f"expected functions to time and a reference among them, found {len(functions)} and reference {reference}"
        )
    if repeats < 2 or most_repeats < repeats:
        raise ValueError(
            f"expected at least 2 repeats and at most `most_repeats`, found {repeats} of {most_repeats}; a spread "
            "needs several"
        )
    tell = progress or (lambda how_far: None)
    for function in functions:
        tell(f"warming up {len(functions)} functions")
        for _ in range(warmup):
            function()
    with _no_collection():
        n_calls = [_calls_needed(function, least_ns, clock) for function in functions]
        rows: list[np.ndarray] = []
        while True:
            for _ in range(min(repeats, most_repeats - len(rows))):
                told = partial(tell, f"round {len(rows) + 1} of {len(functions)} functions")
                rows.append(_measure_round(functions, n_calls, clock, told, backwards=len(rows) % 2 == 1))
            timings = Timings(np.array(rows))
            uncertainty = _worst(timings, reference)
            if uncertainty <= bound or len(rows) >= most_repeats:
                break
    if uncertainty > bound and says_noise:
        _LOGGER.warning(
            "the machine is noisy: after %d rounds times are known to %.1f %%, expected %.1f %% (single measurements "
            "spread by %.1f %%); stop what else runs here and measure again",
            timings.n_rounds,
            100 * uncertainty,
            100 * bound,
            100 * timings.spreads.max(),
        )
    return timings


def _worst(timings: Timings, reference: int) -> float:
    """Largest uncertainty of what is compared; a function alone is compared with nothing, so that its own counts."""
    if timings.seconds.shape[1] > 1:
        return float(timings.uncertainties(reference).max())
    return float(timings.spreads[0] * np.sqrt(np.pi / 2 / timings.n_rounds) / 0.6745)


def _spreads(values: np.ndarray) -> np.ndarray:
    low, middle, high = np.percentile(values, [25, 50, 75], axis=0)
    return (high - low) / 2 / middle


def _measure(function: Callable[[], object], n_calls: int, clock: Callable[[], int]) -> int:
    """Nanoseconds of `n_calls` calls."""
    start = clock()
    for _ in range(n_calls):
        function()
    return clock() - start


def _measure_round(
    functions: Sequence[Callable[[], object]],
    n_calls: Sequence[int],
    clock: Callable[[], int],
    told: Callable[[], object],
    *,
    backwards: bool,
) -> np.ndarray:
    """Seconds of one call of each function; float64 (n_functions,)."""
    order = range(len(functions))
    seconds = np.zeros(len(functions))
    for i in reversed(order) if backwards else order:
        told()
        functions[i]()
        seconds[i] = _measure(functions[i], n_calls[i], clock) / n_calls[i] * 1e-9
    # A clock that steps may see nothing of a measurement; ratios must stay finite.
    return np.maximum(seconds, 1e-12)


def _calls_needed(function: Callable[[], object], least_ns: int, clock: Callable[[], int]) -> int:
    """How many calls take `least_ns`, by doubling; measured twice, as a hiccup makes a single call look long enough."""
    n_calls = 1
    while n_calls <= MOST_CALLS:
        if _measure(function, n_calls, clock) >= least_ns and _measure(function, n_calls, clock) >= least_ns:
            return n_calls
        n_calls *= 2
    raise RuntimeError(
        f"expected a clock that moves, found less than {least_ns} ns for {MOST_CALLS} calls; measure with another clock"
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside; before and after as it was."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
