"""Latency tables: what they predict, files, and machines."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.deployment.latency import Checked, Correction, LatencyTable, fit, prediction_error
from paretoprune.deployment.machines import Machine
from scipy.interpolate import RegularGridInterpolator

MACHINE = Machine("a processor avx2", 2, "cpu", "onnxruntime", "1.30.0", 1, 64)
ONE: dict[tuple[int, ...], float] = {(8,): 1.0, (16,): 3.0, (32,): 4.0}
TWO: dict[tuple[int, ...], float] = {(a, b): 0.1 * a * b + a for a in (2, 4, 8) for b in (1, 5)}


def table(**changed: Any) -> LatencyTable:
    given: dict[str, Any] = {"blocks": {"one": ONE, "two": TWO}, "constant": 0.25}
    return LatencyTable(MACHINE, **{**given, **changed})


def test_at_measured_widths_the_prediction_is_the_sum_of_what_was_measured() -> None:
    for one, two in product(ONE, TWO):
        for between in ("linear", "step"):
            assert table().predict({"one": one, "two": two}, between) == pytest.approx(0.25 + ONE[one] + TWO[two])


@pytest.mark.parametrize(
    ("width", "linear", "step"), [(9, 1.25, 3.0), (12, 2.0, 3.0), (20, 3.25, 4.0), (31, 3.9375, 4.0)]
)
def test_between_measured_widths_it_is_linear_or_the_next_step(width: int, linear: float, step: float) -> None:
    alone = table(blocks={"one": ONE}, constant=0.0)
    assert alone.predict({"one": [width]}) == pytest.approx(linear)
    assert alone.predict({"one": [width]}, "step") == step


@given(st.integers(2, 8), st.integers(1, 5))
def test_two_widths_are_interpolated_as_scipy_does(a: int, b: int) -> None:
    axes = ([2, 4, 8], [1, 5])
    values = np.array([[TWO[i, j] for j in axes[1]] for i in axes[0]])
    expected = float(RegularGridInterpolator(axes, values)([a, b])[0])
    assert table(blocks={"two": TWO}, constant=0.0).predict({"two": [a, b]}) == pytest.approx(expected)


def test_many_networks_are_predicted_as_one_by_one() -> None:
    generator = np.random.default_rng(0)
    one = generator.integers(8, 33, (50, 1))
    two = np.stack([generator.integers(2, 9, 50), generator.integers(1, 6, 50)], axis=1)
    one[3], two[5] = 0, 0
    found = table().predict_all({"one": one, "two": two})
    assert found.shape == (50,)
    alone = [table().predict({"two": list(b), "one": list(a)}) for a, b in zip(one, two, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-12)


def test_a_dropped_block_takes_no_time_unless_one_was_measured() -> None:
    assert table().predict({"one": [0], "two": [2, 1]}) == pytest.approx(0.25 + TWO[2, 1])
    assert table().predict({"one": [0], "two": [2, 0]}) == pytest.approx(0.25)
    identity = table(blocks={"one": {(0,): 0.5, **ONE}}, constant=0.0)
    assert identity.predict({"one": [0]}) == 0.5
    assert identity.predict({"one": [4]}) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("widths", "between", "message"),
    [
        ({"one": [8]}, "linear", "found none of 'two' and some of unknown none; a dropped block has width 0"),
        ({"one": [8], "two": [2, 1], "tow": [1]}, "linear", "unknown 'tow'"),
        ({"one": [7], "two": [2, 1]}, "linear", r"block 'one': expected widths from 8 to 32, found \(7,\)"),
        ({"one": [8], "two": [2, 6]}, "linear", r"block 'two': expected widths from 2 to 8 x 1 to 5, found \(2, 6\)"),
        ({"one": [8, 8], "two": [2, 1]}, "linear", "block 'one': expected 1 widths a network"),
        ({"one": [8], "two": [2, 1]}, "cubic", "between: expected one of linear, step, found 'cubic'"),
    ],
)
def test_widths_that_the_table_says_nothing_about_are_refused(
    widths: dict[str, list[int]], between: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        table().predict(widths, between)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({}, "expected blocks, found none"),
        ({"one": {}}, "block 'one': expected times at widths .* found none"),
        ({"one": {(1,): 1.0, (1, 2): 1.0}}, "equally many"),
        ({"two": {(1, 1): 1.0, (2, 2): 1.0}}, r"found none at \(1, 2\) and 1 more; measure these too"),
        ({"one": {(1,): -1.0}}, "expected seconds of at least 0, found -1.0"),
        ({"one": {(1,): float("nan")}}, "found nan; measure again"),
    ],
)
def test_times_that_make_no_table_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(blocks=blocks)


def test_useful_widths_are_the_ends_of_the_staircase() -> None:
    stairs = {(4,): 1.0, (8,): 1.01, (16,): 1.02, (20,): 2.0, (24,): 1.99, (32,): 2.01}
    assert table(blocks={"one": stairs}).useful_widths("one") == ((32,), (16,))
    assert table(blocks={"one": stairs}).useful_widths("one", tolerance=0.0) == ((32,), (24,), (16,), (8,), (4,))
    # Each step saves 1.5 %, and three of them enough.
    slope = {(width,): 1.0 + 0.015 * width for width in range(10)}
    assert table(blocks={"one": slope}).useful_widths("one") == ((9,), (7,), (5,), (3,), (1,))


def test_a_pair_of_widths_is_useless_beside_one_that_is_wider_in_both_only() -> None:
    times = {(1, 1): 1.0, (2, 1): 2.0, (1, 2): 1.99, (2, 2): 2.0}
    assert table(blocks={"two": times}).useful_widths("two") == ((2, 2), (1, 1))


def test_a_line_is_found_again() -> None:
    predicted = np.array([1.0, 2.0, 5.0, 9.0]) * 1e-4
    line = fit(predicted, 1.3 * predicted + 2e-5)
    assert line.slope == pytest.approx(1.3)
    assert line.offset == pytest.approx(2e-5)


def test_the_fit_makes_relative_errors_smallest() -> None:
    """Not absolute ones, for which the slowest network would count most."""
    generator = np.random.default_rng(0)
    predicted = generator.uniform(1, 20, 30)
    measured = (0.8 * predicted + 1) * np.exp(0.1 * generator.standard_normal(30))

    def loss(line: Correction) -> float:
        return float((prediction_error(line.of(predicted), measured) ** 2).sum())

    found = fit(predicted, measured)
    for slope, offset in product((-0.01, 0, 0.01), (-0.05, 0, 0.05)):
        assert loss(found) <= loss(Correction(found.slope + slope, found.offset + offset))
    slope, offset = np.polyfit(predicted, measured, 1)
    assert loss(found) < loss(Correction(slope, offset))


def test_a_corrected_table_predicts_what_was_measured_also_a_second_time() -> None:
    widths = {"one": np.array([[8], [16], [30]]), "two": np.array([[2, 1], [4, 2], [8, 5]])}
    plain = table()
    once = plain.corrected(plain.predict_all(widths), 2 * plain.predict_all(widths) + 1)
    np.testing.assert_allclose(once.predict_all(widths), 2 * plain.predict_all(widths) + 1)
    twice = once.corrected(once.predict_all(widths), 3 * once.predict_all(widths) - 2)
    np.testing.assert_allclose(twice.predict_all(widths), 3 * once.predict_all(widths) - 2)
    assert plain.correction == Correction()


def test_prediction_errors_are_relative_to_what_was_measured() -> None:
    np.testing.assert_allclose(prediction_error(np.array([1.1, 1.8]), np.array([1.0, 2.0])), [0.1, -0.1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(np.ones(3), np.arange(1.0, 4.0)), "found 3 of 1 predictions"),
        (lambda: fit(np.ones(1), np.ones(1)), "found 1 of 1 predictions"),
        (lambda: fit(np.ones(2), np.ones(3)), r"found shapes \(2,\) and \(3,\)"),
        (lambda: prediction_error(np.ones(2), np.zeros(2)), "expected measured times above 0, found 0.0"),
    ],
)
def test_networks_that_say_nothing_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    awkward = {(width,): float(seconds) for width, seconds in enumerate(np.random.default_rng(0).random(20) / 3)}
    written = table(
        blocks={"one": ONE, "two": TWO, "three": awkward},
        correction=Correction(1.1, -1e-5),
        uncertainty=1 / 3,
        bound=0.1,
        checked=Checked((0.5, 1 / 3), (0.6, 0.3), 0.07),
    )
    written.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == written


def test_a_table_from_before_there_was_a_check_is_read(tmp_path: Path) -> None:
    table().save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    assert content.pop("bound") is content.pop("checked") is None
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert LatencyTable.load(tmp_path / "table.json") == table()


def test_predictions_of_networks_have_errors_and_small_ones_are_counted() -> None:
    checked = Checked((1.1, 0.5, 0.88), (1.0, 0.5, 1.0))
    np.testing.assert_allclose(checked.errors, [0.1, 0, -0.12])
    assert checked.n_good == 1 + (abs(1.1 - 1.0) <= 0.1)
    with pytest.raises(ValueError, match="expected as many predicted as measured times"):
        Checked((1.0,), (1.0, 2.0))


@pytest.mark.parametrize(
    ("uncertainty", "of_networks", "noisy"), [(0.02, 0.01, False), (0.03, 0.01, True), (0.01, 0.03, True)]
)
def test_a_table_says_whether_the_machine_was_noisy(
    uncertainty: float, of_networks: float, noisy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checked = Checked((0.5, 0.6), (0.5, 0.5), of_networks)
    found = table(uncertainty=uncertainty, bound=0.02, checked=checked)
    assert found.is_noisy is noisy
    assert not replace(found, bound=None).is_noisy
    with caplog.at_level(logging.INFO, "paretoprune"):
        found.report(logging.getLogger("paretoprune"))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == noisy
    if noisy:
        told = f"layers are known to {100 * uncertainty:.1f} %, of whole networks to {100 * of_networks:.1f} %"
        assert told in warnings[0]
        assert "expected 2.0 %; stop what else runs here" in warnings[0]
    assert "2 random networks: 1 within 10 %, median error 10.0 %, largest 20.0 %" in caplog.messages[-1]


def change(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def act(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("format", value="something"), "expected a paretoprune latency table of version 1, found something 1"),
        (change("version", value=2), "found paretoprune latency table 2; measure anew"),
        (change("machine", "threads", value=None), "a machine: expected .*threads"),
        (change("machine", "threads", value="1"), r"found .*threads \(str\)"),
        (change("blocks", value=None), "found a damaged one .*blocks.*; measure anew"),
        (change("blocks", "one", 0, "seconds", value="fast"), "expected a finite number, found 'fast'"),
        (change("blocks", "one", 0, "seconds", value=float("inf")), "expected a finite number, found inf"),
        (change("blocks", "one", 0, "widths", value=[16]), "expected each width once"),
        (change("blocks", "two", 0, value=None), "expected a time at every combination"),
        (change("constant_seconds", value=True), "expected a finite number, found True"),
        (change("blocks", value=[]), "damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(damage: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"table.json: .*{message}"):
        LatencyTable.load(path)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b"[1]"])
def test_files_of_something_else_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.json: expected a"):
        LatencyTable.load(tmp_path / "table.json")


def test_tables_of_other_machines_differ() -> None:
    assert table() != replace(table(), machine=replace(MACHINE, threads=2))
