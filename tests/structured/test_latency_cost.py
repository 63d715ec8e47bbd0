"""Latency as a cost, on a clock that adds up the layers of a network."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import Bench, installed
from paretoprune import Front, pareto_prune, telling
from paretoprune.deployment import running
from paretoprune.deployment.latency import LatencyTable
from paretoprune.deployment.packages import needed
from paretoprune.deployment.runtimes import Runtime
from paretoprune.masks.packed import PackedMasks
from paretoprune.networks.architectures import CifarResNet
from paretoprune.shapes import is_depthwise
from paretoprune.structured import timing
from paretoprune.structured.allocation import Prices, cheapest_within
from paretoprune.structured.latency import LatencyCost, layers_of
from paretoprune.structured.timing import (
    NetworkTimes,
    fitted_to_random_networks,
    measure_latency,
    random_networks,
    time_networks,
)
from paretoprune.structured.units import ChannelUnits
from small_networks import digits, residual
from torch import Tensor, nn

IMAGE = torch.zeros(1, 1, 8, 8)
RUNTIME = Runtime("torch")


class Mixed(nn.Module):
    """Biases, a depthwise convolution, one that runs twice, an activation without norm, features of several pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 8, 3, stride=4, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.depthwise(self.stem(x))))
        x = torch.nn.functional.silu(self.down(x))
        x = self.again(self.again(x))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


@lru_cache
def mixed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed().eval()


@lru_cache
def units_of(make: Callable[[], nn.Module]) -> ChannelUnits:
    return ChannelUnits.of(make(), IMAGE)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return installed(monkeypatch)


def table_of(make: Callable[[], nn.Module]) -> LatencyTable:
    return measure_latency(make(), units_of(make), IMAGE, RUNTIME)


def cost_of(make: Callable[[], nn.Module]) -> LatencyCost:
    return LatencyCost.of_network(make(), units_of(make), IMAGE, table_of(make))


def masks_of(units: ChannelUnits, *n_keep: np.ndarray) -> PackedMasks:
    """The first so many units of each coupling."""
    rows = [np.concatenate([np.arange(size) < n for size, n in zip(units.sizes, kept, strict=True)]) for kept in n_keep]
    return PackedMasks.pack_each(rows, units.n_units)


@pytest.mark.parametrize("make", [residual, mixed])
def test_times_that_are_sums_over_layers_are_predicted_exactly(make: Callable[[], nn.Module], bench: Bench) -> None:
    """Also at widths between those that were measured, and without branches."""
    units, cost = units_of(make), cost_of(make)
    masks = random_networks(units, 12, 0)
    found = [bench.prepare(units.slim(make(), masks.unpack(i)), IMAGE, RUNTIME)() for i in range(len(masks))]
    np.testing.assert_allclose(cost.seconds(masks), found, rtol=1e-9)
    whole = bench.prepare(make(), IMAGE, RUNTIME)()
    np.testing.assert_allclose(cost.of(masks), np.array(found) / whole, rtol=1e-9)


def test_some_of_the_random_networks_lack_branches_and_sizes_differ() -> None:
    masks, units = random_networks(units_of(residual), 20, 0), units_of(residual)
    assert units.can_be_built(masks).all()
    n_kept = units.n_kept(masks)
    assert 0 < (n_kept == 0).any(axis=1).sum() < 20
    assert masks.density.min() < 0.4
    assert masks.density.max() > 0.8
    assert (random_networks(units, 20, 0).words == masks.words).all()


def test_the_cost_is_one_for_the_whole_network_and_falls_with_each_channel(bench: Bench) -> None:
    units, cost = units_of(residual), cost_of(residual)
    assert cost.of(masks_of(units, units.sizes)) == pytest.approx([1.0])
    for g, size in enumerate(units.sizes.tolist()):
        least = 0 if units.couplings[g].may_vanish else 1
        rows = [np.where(np.arange(units.n_groups) == g, k, units.sizes) for k in range(least, size + 1)]
        assert (np.diff(cost.of(masks_of(units, *rows))) > 0).all()


def test_a_vanished_branch_costs_nothing(bench: Bench) -> None:
    units, table = units_of(residual), table_of(residual)
    g = next(g for g, coupling in enumerate(units.couplings) if coupling.may_vanish)
    cost = cost_of(residual)
    n_keep = units.sizes.copy()
    n_keep[g] = 0
    name = units.couplings[g].name
    parts = [one.block for one in cost.layers if one.name.startswith(name.rpartition(".")[0])]
    branch = [block.name for block in parts if block.is_dense]
    assert len(branch) == 2
    saved = sum(table.blocks[one][tuple(axis[-1] for axis in table.grids[one].axes)] for one in branch)
    whole, without = cost.seconds(masks_of(units, units.sizes, n_keep))
    assert whole - without == pytest.approx(saved)


def test_a_layer_comes_with_what_directly_follows_and_one_that_runs_twice_is_there_twice() -> None:
    layers = layers_of(mixed(), units_of(mixed), IMAGE)
    named = {layer.name.split(":")[0]: layer for layer in layers}
    told = ("depthwise", "down", "again", "again (2)")
    apart = [f"{name} reading {number} multiple of 4" for name in told for number in ("a", "no")]
    assert list(named) == ["stem", *apart, "hidden", "head"]
    behind = {name: [type(one).__name__ for one in layer.followers] for name, layer in named.items()}
    assert behind[apart[0]] == behind[apart[1]] == ["BatchNorm2d", "ReLU"]
    assert behind[apart[2]] == ["SiLU"]
    assert behind["hidden"] == ["ReLU"]
    assert behind["stem"] == behind["head"] == []
    # One axis where a channel is read and made at once; never cut: a single width.
    assert {len(named[name].axes) for name in apart[:2]} == {1}
    # Both ends of each step.
    assert named["stem"].points == ((1,), (12, 9, 8, 1))
    assert named["head"].points == ((16, 9, 8, 1), (10,))
    # Convolutions that read a multiple of 4 channels are told apart.
    assert named[apart[0]].points == ((12, 8, 4),)
    assert named[apart[1]].points == ((11, 9, 7, 1),)


def test_layers_are_built_at_their_widths_and_run_at_the_size_that_they_have_in_the_network() -> None:
    for layer in layers_of(mixed(), units_of(mixed), IMAGE):
        for point in layer.block.points:
            built, inputs = layer.build(point)
            assert tuple(built.get_parameter("0.weight").shape[axis] for _, axis in layer.axes) == point
            assert inputs.shape[2:] == layer.inputs[2:]
            assert torch.isfinite(built(inputs)).all()
        if layer.block.is_dense:
            whole = layer.build(layer.block.widest)[0].get_parameter("0.weight")
            assert whole.shape == layer.module.get_parameter("weight").shape
    assert is_depthwise(mixed().get_submodule("depthwise"))
    assert mixed().get_parameter("stem.weight").shape == (12, 1, 3, 3)


def test_windows_along_the_batch_are_timed_together() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            windows = x.reshape(-1, 1, 16)
            return self.head(self.second(torch.relu(self.first(windows))).reshape(len(x), -1))

    network = Windows().eval()
    layers = layers_of(network, ChannelUnits.of(network, IMAGE), IMAGE)
    assert layers[0].inputs == (4, 1, 16)
    built, inputs = layers[0].build((16, 5))
    assert inputs.shape == (1, 4, 1, 16)
    assert built(inputs.repeat(3, 1, 1, 1)).shape == (12, 1, 5)


def test_equal_layers_are_timed_once(bench: Bench) -> None:
    network = CifarResNet(14, 10, 1, base_width=4).eval()
    units = ChannelUnits.of(network, IMAGE)
    blocks = [layer.block for layer in layers_of(network, units, IMAGE)]
    kinds = {block.kind for block in blocks}
    # The stem, three of equal and two of changing size and width, the last layer.
    assert len(kinds) < len(blocks)
    measure_latency(network, units, IMAGE, RUNTIME)
    n_points = sum(len(next(block for block in blocks if block.kind == kind).points) for kind in kinds)
    assert bench.n_timed == n_points + 2 * len(kinds) + 2


def test_the_line_is_fitted_to_the_first_networks_and_errors_are_those_of_the_others(bench: Bench) -> None:
    units, plain = units_of(residual), table_of(residual)
    true = time_networks(
        residual(),
        [units.slim(residual(), random_networks(units, 9, 5).unpack(i)) for i in range(9)],
        IMAGE,
        RUNTIME,
    ).relative[1:]
    # A table that is 3 us short, and 20 % besides.
    wrong = replace(plain, correction=replace(plain.correction, slope=0.8, offset=-3e-6))
    options: dict[str, Any] = {"n": 6, "seed": 5, "n_fitted": 3}
    found = fitted_to_random_networks(residual(), units, IMAGE, wrong, RUNTIME, **options)
    assert found.checked is not None
    np.testing.assert_allclose(found.checked.measured, true[3:])
    np.testing.assert_allclose(found.checked.errors, 0, atol=1e-9)
    assert found.correction.offset > wrong.correction.offset
    unfitted = fitted_to_random_networks(residual(), units, IMAGE, wrong, RUNTIME, n=9, seed=5, n_fitted=0)
    assert unfitted == replace(wrong, checked=unfitted.checked)
    assert unfitted.checked is not None
    np.testing.assert_allclose(unfitted.checked.measured, true)
    assert np.abs(unfitted.checked.errors).max() > 0.01


def test_a_price_of_laying_activations_out_anew_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which convolutions of other than a multiple of 4 channels cost more in a network than alone."""
    units, table = units_of(residual), table_of(residual)
    plain = LatencyCost.of_network(residual(), units, IMAGE, table)

    def measured(network: nn.Module, slim: Any, *others: Any, **options: Any) -> NetworkTimes:
        masks = random_networks(units, 14, 2)
        relative = (plain.seconds(masks) + 3e-9 * plain.laid_out_anew(masks)) / plain.whole
        zeros = np.zeros(15)
        return NetworkTimes(np.append(1.0, relative), zeros, zeros, zeros, [None] * 15)

    monkeypatch.setattr(timing, "time_networks", measured)
    found = fitted_to_random_networks(residual(), units, IMAGE, table, RUNTIME, n=8, seed=2, n_fitted=6)
    assert found.checked is not None
    np.testing.assert_allclose(found.checked.errors, 0, atol=1e-6)
    odd = next(layer for layer in plain.layers if layer.aligned is False)
    added = found.grids[odd.name].seconds - table.grids[odd.name].seconds
    np.testing.assert_allclose(added, 3e-9 * odd.n_made, rtol=1e-4)


def test_a_fit_that_turns_times_around_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine so noisy that small networks seem to take longer than large ones."""
    units, table = units_of(residual), table_of(residual)
    plain = LatencyCost.of_network(residual(), units, IMAGE, table)

    def measured(*given: Any, **options: Any) -> NetworkTimes:
        relative = 3 - 2 * plain.of(random_networks(units, 14, 2))
        zeros = np.zeros(15)
        return NetworkTimes(np.append(1.0, relative), zeros, zeros, zeros, [None] * 15)

    monkeypatch.setattr(timing, "time_networks", measured)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        found = fitted_to_random_networks(residual(), units, IMAGE, table, RUNTIME, n=8, seed=2, n_fitted=6)
    assert found == replace(table, checked=found.checked)
    assert "the table is not fitted to them; stop what else runs here" in caplog.text


def test_progress_is_told_while_networks_are_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = iter(np.arange(0, 1e6, 4.0))
    monkeypatch.setattr(telling.Telling.__init__, "__defaults__", (None, lambda: float(next(now))))
    with caplog.at_level(logging.INFO, "paretoprune"):
        table_of(residual)
    assert (
        "timing block 6 of 11, layer2.0.conv2 reading a multiple of 4, at 4 widths: making it 16 x 16 wide"
        in caplog.messages
    )


def test_a_table_of_another_network_is_refused_with_the_remedy(bench: Bench) -> None:
    network, units = residual(), units_of(residual)
    with pytest.raises(ValueError, match=r"measured for another network: .* measure this network: `measure_latency"):
        LatencyCost.of_network(network, units, IMAGE, table_of(mixed))
    # The same layers on larger images.
    with pytest.raises(ValueError, match=r"measured for another network: expected 8 layers .* of which 1 fit"):
        LatencyCost.of_network(network, units, torch.zeros(1, 1, 16, 16), table_of(residual))
    fewer = ChannelUnits.of(network, IMAGE, [units.names[0]])
    table = measure_latency(network, fewer, IMAGE, RUNTIME)
    with pytest.raises(ValueError, match=r"measured for other widths: .*more layers are excluded; measure anew"):
        LatencyCost.of_network(network, units, IMAGE, table)
    # More widths than needed are no harm.
    whole = table_of(residual)
    masks = random_networks(fewer, 5, 0)
    costs = [LatencyCost.of_network(network, fewer, IMAGE, one).of(masks) for one in (table, whole)]
    np.testing.assert_allclose(costs[0], costs[1])


def test_allocations_lie_where_the_hardware_s_steps_end(bench: Bench) -> None:
    """A machine that computes channels by fours: anything between takes as long."""
    units = units_of(residual)

    class Stepped:
        name = "latency"

        def of(self, masks: PackedMasks) -> np.ndarray:
            steps = np.ceil(units.n_kept(masks) / 4)
            return np.asarray(steps.sum(axis=1) / np.ceil(units.sizes / 4).sum())

    curves = [np.linspace(1, 0, size + 1) ** 2 for size in units.sizes]
    prices = Prices(units, -np.concatenate([np.arange(size) for size in units.sizes]), Stepped())
    for budget in (0.8, 0.5, 0.3):
        n_keep = cheapest_within(prices, curves, budget)
        assert (n_keep % 4 == 0).all()
        assert (n_keep < units.sizes).any()


# The library


def front_of(**changed: Any) -> Front:
    images, labels = digits()
    options: dict[str, Any] = {
        "units": "channels", "objectives": ("divergence", "latency"), "runtime": RUNTIME, "repair": "batchnorm",
        "evaluations": 80, "device": "cpu", "workers": 1, "progress": False,
        "search_images": images[1000:1200], "search_labels": labels[1000:1200],
    }  # fmt: skip
    return pareto_prune(residual(), images[:300], labels[:300], **(options | changed))


def test_a_search_after_latency_ends_in_networks_that_are_timed(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    front = front_of(latency_table=path)
    assert front.names == ("divergence", "latency")
    assert len(front) >= 4
    assert front.costs.min() < 0.7
    # On this clock, predictions are right.
    assert front.measured_latency is not None
    np.testing.assert_allclose(front.measured_latency, front.costs[:, 0], rtol=1e-6)
    assert front.dense is not None
    alone = time_networks(front.dense, [front.network(1)], IMAGE, RUNTIME).relative
    assert front.measured_latency[1] == pytest.approx(alone[1])
    # The table was written; a second search reads it, and measures nothing but its members.
    n_timed = bench.n_timed
    again = front_of(latency_table=path)
    assert bench.n_timed - n_timed <= len(front) * 1.2 + 5
    np.testing.assert_array_equal(again.objectives, front.objectives)
    front.save(tmp_path / "front.npz")
    loaded = Front.load(tmp_path / "front.npz")
    np.testing.assert_array_equal(loaded.measured_latency, front.measured_latency)


def test_a_front_is_not_lost_if_a_member_cannot_be_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    units = units_of(residual)
    masks = random_networks(units, 2, 0)
    states = [units.slim(residual(), masks.unpack(i)).state_dict() for i in range(2)]
    front = Front(masks, np.eye(2), ["phase1"] * 2, ("error", "latency"), residual(), states, "channels")
    assert timing.time_members(front, IMAGE, RUNTIME).measured_latency is not None

    def refused(network: nn.Module, example: Any, runtime: Runtime) -> Any:
        raise ValueError("cannot be exported")

    monkeypatch.setattr(timing, "prepare", refused)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert timing.time_members(front, IMAGE, RUNTIME) is front
    assert caplog.messages == ["the members' latencies were not measured: cannot be exported"]


def test_a_front_carries_measured_latencies_along() -> None:
    masks = PackedMasks.pack(np.eye(4, dtype=bool))
    objectives = np.array([[0.4, 0.1], [0.3, 0.2], [0.2, 0.4], [0.1, 0.8]])
    front = Front(masks, objectives, ["phase1"] * 4, ("error", "latency"), measured_latency=np.array([1.0, 2, 3, 4]))
    assert front.select(np.array([2, 0])).measured_latency.tolist() == [3, 1]  # type: ignore[union-attr]
    thin = front.thinned(2)
    assert len(thin.measured_latency) == 2  # type: ignore[arg-type]
    assert front.merge(front).measured_latency.tolist() == [1, 2, 3, 4]  # type: ignore[union-attr]
    plain = replace(front, measured_latency=None)
    assert front.merge(plain).measured_latency is None
    assert plain.select(np.array([1])).measured_latency is None
    assert "measured_latency" not in plain.arrays()
    with pytest.raises(ValueError, match=r"measured latency of each of 4 members, found an array of shape \(2,\)"):
        replace(front, measured_latency=np.zeros(2))


def test_options_that_do_not_go_with_latency_are_refused_before_any_work(bench: Bench, tmp_path: Path) -> None:
    table = table_of(residual)
    slower = replace(table, machine=replace(table.machine, processor="another"))
    slower.save(tmp_path / "slower.json")
    for given in (slower, tmp_path / "slower.json"):
        with pytest.raises(ValueError, match=r"measured elsewhere: .*found 'another'.*latency_table=None"):
            front_of(latency_table=given)
    with pytest.raises(ValueError, match="expected threads '3', found '1'"):
        front_of(latency_table=table, runtime=Runtime("torch", threads=3))
    with pytest.raises(ValueError, match="expected neither `runtime` nor `latency_table` with the objectives"):
        front_of(objectives=("divergence", "macs"))
    with pytest.raises(ValueError, match="expected `runtime` as a Runtime, found 'torch'"):
        front_of(runtime="torch")
    with pytest.raises(ValueError, match=r"expected `latency_table` as a LatencyTable, .* found int"):
        front_of(latency_table=3)
    with pytest.raises(ValueError, match="expected costs among density, parameters, macs, bytes, found latency"):
        front_of(units="weights")
    with pytest.raises(ValueError, match="measured for another network"):
        front_of(latency_table=table_of(mixed))


def test_a_runtime_that_is_not_installed_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str, purpose: str) -> Any:
        return needed("no_such_package" if package == "onnxruntime" else package, purpose)

    monkeypatch.setattr(running, "needed", missing)
    with pytest.raises(ModuleNotFoundError, match=r"networks are run by onnxruntime: .*`pip install no_such_package`"):
        pareto_prune(residual(), "no images", units="channels", objectives=("error", "latency"))
