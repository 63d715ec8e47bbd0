"""Timing in turn, on clocks that tests move; one test on a real one."""

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from paretoprune.deployment.timing import Timings, measure_interleaved

MS = 1_000_000


class Clock:
    """A clock that functions move by their cost, on a machine that gets slower, or noisier, as time goes by."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self.now = 0.0
        self.drift, self.noise = drift, noise
        self.generator = np.random.default_rng(seed)
        self.calls: list[str] = []

    def __call__(self) -> int:
        return int(self.now)

    def costing(self, milliseconds: float, name: str = "") -> Callable[[], None]:
        def function() -> None:
            slow = 1 + self.drift * self.now / 1e9
            self.now += milliseconds * MS * slow * np.exp(self.noise * self.generator.standard_normal())
            self.calls.append(name)

        return function


def test_times_and_ratios_are_those_of_the_functions() -> None:
    clock = Clock()
    timings = measure_interleaved([clock.costing(8), clock.costing(4), clock.costing(12)], clock=clock)
    np.testing.assert_allclose(timings.medians, [8e-3, 4e-3, 12e-3], rtol=1e-6)
    np.testing.assert_allclose(timings.relative(), [1, 0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(timings.relative(to=1), [2, 1, 3], rtol=1e-6)
    np.testing.assert_allclose(timings.spreads, 0, atol=1e-6)
    assert timings.n_rounds == 20


def test_functions_are_measured_in_turn_and_every_other_round_backwards() -> None:
    clock = Clock()
    functions = [clock.costing(2, name) for name in "abc"]
    measure_interleaved(functions, repeats=2, warmup=0, clock=clock)
    # One call that is not timed before each that is; before that, two to find out how many calls are needed.
    assert "".join(clock.calls) == "aabbcc" + "aabbcc" + "ccbbaa"


def test_interleaving_cancels_a_drift_that_measuring_one_after_the_other_does_not() -> None:
    """A machine that takes three times as long at the end."""
    clock = Clock(drift=5.0)
    timings = measure_interleaved([clock.costing(4), clock.costing(2)], bound=1, clock=clock)
    assert timings.seconds[-1, 0] > 2 * timings.seconds[0, 0]
    assert timings.relative()[1] == pytest.approx(0.5, rel=0.01)
    clock = Clock(drift=5.0)
    alone = [measure_interleaved([clock.costing(ms)], bound=1, clock=clock).medians[0] for ms in (4, 2)]
    assert alone[1] / alone[0] > 0.7


def test_a_round_that_something_else_slowed_down_leaves_the_ratio_alone() -> None:
    seconds = np.array([[2.0, 1.0], [2.0, 1.0], [9.0, 4.5], [2.0, 1.0], [7.0, 3.5]])
    timings = Timings(seconds)
    np.testing.assert_array_equal(timings.relative(), [1, 0.5])
    np.testing.assert_array_equal(timings.relative_spreads(), [0, 0])
    np.testing.assert_allclose(timings.spreads, 2.5 / 2)  # quartiles 2 and 7 of a median of 2


def test_a_relative_time_is_the_median_ratio_not_the_ratio_of_the_medians() -> None:
    timings = Timings(np.array([[1.0, 1.0], [2.0, 4.0], [10.0, 5.0]]))
    np.testing.assert_array_equal(timings.medians, [2, 4])
    np.testing.assert_array_equal(timings.relative(), [1, 1])


def test_a_spread_is_half_the_interquartile_range_over_the_median() -> None:
    timings = Timings(np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert timings.medians == [3]
    assert timings.spreads == [1 / 3]


def test_the_uncertainty_is_the_standard_error_of_the_median_ratio() -> None:
    generator = np.random.default_rng(0)
    seconds = np.exp(0.05 * generator.standard_normal((400, 30, 2)))
    found = np.array([Timings(one).relative()[1] for one in seconds])
    told = np.array([Timings(one).uncertainties()[1] for one in seconds])
    assert np.median(told) == pytest.approx(found.std(), rel=0.2)


def test_a_quiet_machine_needs_no_more_rounds_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(noise=0.01)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        timings = measure_interleaved([clock.costing(4), clock.costing(2)], clock=clock)
    assert timings.n_rounds == 20
    assert not caplog.records


def test_a_noisy_machine_gets_more_rounds_until_the_bound_is_met(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(noise=0.1)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        timings = measure_interleaved([clock.costing(4), clock.costing(2)], bound=0.02, most_repeats=2000, clock=clock)
    assert 20 < timings.n_rounds < 2000
    assert timings.uncertainties().max() <= 0.02
    assert timings.relative()[1] == pytest.approx(0.5, rel=0.06)
    assert not caplog.records


@pytest.mark.parametrize("n_functions", [1, 2])
def test_a_machine_too_noisy_for_the_limit_is_said_to_be(caplog: pytest.LogCaptureFixture, n_functions: int) -> None:
    clock = Clock(noise=1.0)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        timings = measure_interleaved([clock.costing(4)] * n_functions, most_repeats=50, clock=clock)
    assert timings.n_rounds == 50
    (record,) = caplog.records
    assert "the machine is noisy: after 50 rounds" in record.message
    assert "expected 2.0 %" in record.message
    assert "measure again" in record.message


def test_noise_is_not_told_to_whoever_sums_it_up(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(noise=1.0)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        timings = measure_interleaved([clock.costing(4)] * 2, most_repeats=20, clock=clock, says_noise=False)
    assert timings.uncertainties().max() > 0.02
    assert not caplog.records


def test_quick_functions_are_called_often_enough_for_the_clock() -> None:
    clock = Clock()
    functions = [clock.costing(0.03, "a"), clock.costing(5, "b")]
    timings = measure_interleaved(functions, repeats=2, warmup=0, clock=clock)
    np.testing.assert_allclose(timings.medians, [0.03e-3, 5e-3], rtol=1e-3)
    last = "".join(clock.calls)[-67:]
    assert last == "bb" + "a" * 65  # backwards; 64 calls of 0.03 ms are the first power of two above 1 ms


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretoprune.deployment.timing.MOST_CALLS", 8)
    with pytest.raises(RuntimeError, match="expected a clock that moves"):
        measure_interleaved([lambda: None], clock=lambda: 0)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_timing_and_the_collector_is_put_back(enabled: bool) -> None:
    clock, states = Clock(), []
    cost = clock.costing(2)

    def function() -> None:
        states.append(gc.isenabled())
        cost()

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        measure_interleaved([function], repeats=2, warmup=0, clock=clock)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert states
    assert not any(states)


def test_the_collector_comes_back_after_an_error_too() -> None:
    def broken() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        measure_interleaved([broken], warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "expected functions to time"),
        (2, {"reference": 2}, "found 2 and reference 2"),
        (1, {"repeats": 1}, "expected at least 2 repeats"),
        (1, {"repeats": 30, "most_repeats": 20}, "found 30 of 20"),
    ],
)
def test_what_cannot_be_measured_is_refused(n: int, options: dict[str, Any], message: str) -> None:
    clock = Clock()
    with pytest.raises(ValueError, match=message):
        measure_interleaved([clock.costing(2)] * n, clock=clock, **options)


def test_on_a_real_clock_twice_the_work_takes_twice_as_long() -> None:
    def work(n: int) -> Callable[[], None]:
        def function() -> None:
            sum(range(n))

        return function

    # The time of this process alone: what else the machine does is no part of it.
    timings = measure_interleaved([work(20_000), work(40_000)], repeats=10, clock=time.process_time_ns)
    assert 1.6 < timings.relative()[1] < 2.5
