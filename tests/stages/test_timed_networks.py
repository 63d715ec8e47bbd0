"""Tables and members timed as the workflow's settings say, on a clock without noise."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import Bench, installed
from paretoprune.deployment.latency import LatencyTable
from paretoprune.deployment.timing import Timings
from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.settings import Tabulating, Timing
from paretoprune.stages.latency import read_latency_cost, runtime_of
from paretoprune.stages.timing import LATENCY_COLUMNS, make_table, time_rows
from paretoprune.structured import timing as clocked
from paretoprune.structured.timing import random_networks
from paretoprune.structured.units import ChannelUnits, slim_costs
from small_networks import residual

IMAGE = torch.zeros(1, 1, 8, 8)
TIMING = Timing(runtime="torch")


@lru_cache
def units() -> ChannelUnits:
    return ChannelUnits.of(residual(), IMAGE)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return installed(monkeypatch)


def front_of(n: int, *names: str, costs: Any = ()) -> Front:
    masks = random_networks(units(), n, 0)
    states = [units().slim(residual(), masks.unpack(i)).state_dict() for i in range(n)]
    objectives = np.column_stack([np.zeros(n), *costs]) if len(costs) else np.zeros((n, 1 + len(names)))
    return Front(masks, objectives, ["phase1"] * n, ("error", *names), residual(), states, "channels")


def test_a_table_is_checked_on_as_many_networks_as_the_settings_say(bench: Bench) -> None:
    table = make_table(residual(), units(), IMAGE, Tabulating(runtime="torch", checked=5, bound=0.07))
    assert table.checked is not None
    np.testing.assert_allclose(table.checked.errors, np.zeros(5), atol=1e-6)
    assert table.bound == 0.07
    assert not table.is_noisy


def test_the_settings_reach_the_clock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def measure(functions: list[Any], **options: Any) -> Timings:
        given.append(options)
        return bench.measure(functions)

    monkeypatch.setattr(clocked, "measure_interleaved", measure)
    make_table(residual(), units(), IMAGE, Tabulating("torch", repeats=3, bound=0.3, most_repeats=9, checked=2))
    time_rows(front_of(2, "macs"), IMAGE, Timing("torch", repeats=3, bound=0.3, most_repeats=9))
    assert len(given) > 10
    for options in given:
        assert (options["repeats"], options["bound"], options["most_repeats"]) == (3, 0.3, 9)
        assert options["says_noise"] is False
    runtime = runtime_of(Timing("torch", batch_size=4, threads=2))
    assert (runtime.name, runtime.batch_size, runtime.threads) == ("torch", 4, 2)


def test_a_search_reads_the_table_of_its_machine_and_network(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table = make_table(residual(), units(), IMAGE, Tabulating(runtime="torch", checked=2))
    table.save(path)
    masks = random_networks(units(), 4, 1)
    cost = read_latency_cost(path, residual(), units(), IMAGE, TIMING)
    assert cost.name == "latency"
    taken = [bench.prepare(units().slim(residual(), masks.unpack(i)), IMAGE, runtime_of(TIMING))() for i in range(4)]
    whole = bench.prepare(residual(), IMAGE, runtime_of(TIMING))()
    np.testing.assert_allclose(cost.of(masks), np.array(taken) / whole, rtol=1e-6)
    (listed, macs) = slim_costs(["latency", "macs"], units(), residual(), IMAGE, [cost])
    assert listed is cost
    assert macs.name == "macs"
    with pytest.raises(ValueError, match="measured elsewhere: expected batch_size '8', found '1'"):
        read_latency_cost(path, residual(), units(), IMAGE, replace(TIMING, batch_size=8))
    replace(table, machine=replace(table.machine, processor="another")).save(path)
    with pytest.raises(ValueError, match=r"found 'another'; .* this machine: `snakemake \.\.\. --forcerun measure_lat"):
        read_latency_cost(path, residual(), units(), IMAGE, TIMING)
    assert LatencyTable.load(path).machine.processor == "another"


def test_members_are_described_beside_the_dense_network(bench: Bench, tmp_path: Path) -> None:
    predicted = np.linspace(0.2, 0.9, 10)
    rows = time_rows(front_of(10, "latency", costs=[predicted]), IMAGE, TIMING)
    assert [row["id"] for row in rows] == ["dense", *range(10)]
    dense, *members = rows
    assert (dense["macs"], dense["predicted"], dense["measured"]) == (1, 1, 1)
    seconds = bench.prepare(residual(), IMAGE, runtime_of(TIMING))()
    assert dense["milliseconds"] == pytest.approx(1e3 * seconds)
    masks = random_networks(units(), 10, 0)
    (macs,) = slim_costs(["macs"], units(), residual(), IMAGE)
    np.testing.assert_allclose([row["macs"] for row in members], macs.of(masks))
    np.testing.assert_allclose([row["predicted"] for row in members], predicted)
    # In two groups, each with the dense network.
    for i, row in enumerate(members):
        alone = bench.prepare(units().slim(residual(), masks.unpack(i)), IMAGE, runtime_of(TIMING))()
        assert row["measured"] == pytest.approx(alone / seconds)
        assert row["milliseconds"] == pytest.approx(1e3 * alone)
        assert row["uncertainty"] == row["spread"] == 0
        assert row["bytes"] == ""
    write_csv(tmp_path / "latency.csv", rows, LATENCY_COLUMNS)


def test_what_no_table_predicted_is_empty(bench: Bench) -> None:
    rows = time_rows(front_of(2, "macs"), IMAGE, TIMING)
    assert [row["predicted"] for row in rows] == ["", "", ""]
    with pytest.raises(RuntimeError, match="expected a front with its networks, found none"):
        time_rows(replace(front_of(2, "macs"), dense=None), IMAGE, TIMING)


def test_files_of_onnxruntime_are_weighed() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    timing = Timing(repeats=2, most_repeats=2)
    dense, member = time_rows(front_of(1, "macs"), IMAGE, timing)
    n_parameters = sum(parameter.numel() for parameter in residual().parameters())
    # Weights as float32, and what describes the graph.
    assert 0.9 * 4 * n_parameters < dense["bytes"] < 4 * n_parameters + 20_000
    assert member["bytes"] < dense["bytes"]


def test_noise_of_members_is_said_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def noisy(functions: list[Any], **options: Any) -> Timings:
        quiet = bench.measure(functions).seconds[0]
        generator = np.random.default_rng(len(functions))
        return Timings(quiet * np.exp(0.5 * generator.standard_normal((20, len(functions)))))

    monkeypatch.setattr(clocked, "measure_interleaved", noisy)
    rows = time_rows(front_of(10, "macs"), IMAGE, TIMING)
    assert rows[0]["uncertainty"] == 0
    assert min(row["uncertainty"] for row in rows[1:]) > 0.02
    (message,) = [one for one in caplog.messages if "noisy" in one]
    assert "10 of 10 networks' times are known worse than to 2.0 %" in message
