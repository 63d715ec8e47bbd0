"""Small networks: what they cost, how they are re-fitted, in which order units go, and the search for them."""

import copy
import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune import Front, pareto_prune
from paretoprune.data.mixing import mixed
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.metrics import divergence, predict, top1_error
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups
from paretoprune.networks.architectures import CifarResNet
from paretoprune.networks.costs import count_uses
from paretoprune.shapes import with_state
from paretoprune.structured.allocation import (
    Prices,
    cheapest_within,
    ladder_of,
    loss_curves,
    measured_curves,
    uniform_within,
)
from paretoprune.structured.elimination import elimination_scores
from paretoprune.structured.importance import group_magnitude, group_taylor, norm_scale
from paretoprune.structured.judging import CANDIDATE_SAMPLES, Judging, SlimJudge, SlimTask
from paretoprune.structured.refit import SlimRefit
from paretoprune.structured.units import SLIM_COSTS, ChannelUnits, slim_costs
from paretoprune.training.loop import Recipe, train
from small_networks import digits, residual, states_equal
from torch import Tensor, nn
from torch.nn import functional

IMAGE = torch.zeros(1, 1, 8, 8)


@lru_cache
def units() -> ChannelUnits:
    return ChannelUnits.of(residual(), IMAGE)


def masks_of(*rows: np.ndarray) -> PackedMasks:
    return PackedMasks.pack_each(rows, units().n_units)


def some_rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    vanished = np.ones(units().n_units, dtype=bool)
    vanished[units().offsets[1] : units().offsets[2]] = False
    return [rng.random(units().n_units) < share for share in (0.9, 0.5, 0.2)] + [vanished, np.ones_like(vanished)]


def error_of(network: nn.Module) -> float:
    images, labels = digits()
    return top1_error(predict(network, images[1200:], 64), labels[1200:])


# Costs


def test_costs_are_those_of_the_networks_that_are_built() -> None:
    network, rows = residual(), some_rows()
    found = np.column_stack(
        [cost.of(masks_of(*rows)) for cost in slim_costs(list(SLIM_COSTS), units(), network, IMAGE)]
    )
    whole = measured(network)
    for row, costs in zip(rows, found, strict=True):
        expected = {name: value / whole[name] for name, value in measured(units().slim(network, row)).items()}
        np.testing.assert_allclose(costs, [expected[name] for name in SLIM_COSTS], rtol=1e-6)
    assert np.all(found[-1] == 1)


def measured(network: nn.Module) -> dict[str, float]:
    """Costs of a network as it is, by hand."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    floats = sum(tensor.numel() for tensor in network.state_dict().values() if tensor.is_floating_point())
    held: list[int] = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: held.append(inputs[0].numel() + output.numel()))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    uses = count_uses(network, IMAGE)
    for handle in handles:
        handle.remove()
    prunable = [
        size for name, size in sizes.items() if name.endswith(("conv1.weight", "conv2.weight", "linear.weight"))
    ]
    return {
        "density": float(sum(prunable)),
        "parameters": float(sum(sizes.values())),
        "macs": float(sum(n * sizes[name] for name, n in uses.items())),
        "bytes": 4.0 * floats,
        "memory": float(max(held)),
    }


def test_only_branches_may_vanish_and_excluded_layers_stay_whole() -> None:
    assert units().sizes.tolist() == [8, 16, 32]
    nothing = np.zeros(units().n_units, dtype=bool)
    assert units().can_be_built(masks_of(nothing)).tolist() == [True]
    chain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    of_chain = ChannelUnits.of(chain, IMAGE)
    assert of_chain.can_be_built(PackedMasks.pack_each([np.zeros(5, dtype=bool)], 5)).tolist() == [False]
    for pattern in ("layer1.*", "layer1.0.conv1", "layer1.0.conv1.weight", "layer1.0.conv2.weight"):
        assert ChannelUnits.of(residual(), IMAGE, [pattern]).names == units().names[1:]
    with pytest.raises(ValueError, match=r"'nothing\.\*' matches none of the layers .*layer1\.0\.conv1"):
        ChannelUnits.of(residual(), IMAGE, ["nothing.*"])
    with pytest.raises(ValueError, match="exclude less"):
        ChannelUnits.of(residual(), IMAGE, ["*"])
    with pytest.raises(ValueError, match="expected costs among density, parameters, macs, bytes, memory, found watts"):
        slim_costs(["watts"], units(), residual(), IMAGE)


def test_branches_may_be_kept() -> None:
    kept = units().keeping_branches()
    nothing = np.zeros(units().n_units, dtype=bool)
    assert kept.can_be_built(masks_of(nothing, ~nothing)).tolist() == [False, True]
    assert all(np.isinf(curve[0]) for curve in loss_curves(kept, np.arange(kept.n_units, dtype=np.float32)))


def test_a_state_tells_which_network_it_belongs_to() -> None:
    for row in some_rows():
        small = units().slim(residual(), row)
        again = with_state(copy.deepcopy(residual()), small.state_dict())
        images = digits()[0][:20]
        with torch.no_grad():
            assert torch.equal(again(images), small(images))
    with pytest.raises(ValueError, match=r"found odd\.weight; give the network that was pruned"):
        with_state(copy.deepcopy(residual()), {**residual().state_dict(), "odd.weight": torch.zeros(3)})


# Re-fit


@lru_cache
def refit(*, fits: bool = True) -> SlimRefit:
    return SlimRefit(residual(), units(), digits()[0][:512], fits=fits)


@pytest.mark.parametrize("fits", [True, False])
def test_the_whole_network_is_left_as_it_was_trained(fits: bool) -> None:
    network = refit(fits=fits)(np.ones(units().n_units, dtype=bool))
    assert states_equal(network, residual())


def test_a_channel_that_says_what_another_one_says_is_not_missed() -> None:
    network = copy.deepcopy(residual())
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name == "layer2.0.conv1.weight" or (name.startswith("layer2.0.bn1") and tensor.ndim):
                tensor[3] = tensor[5]
    row = np.ones(units().n_units, dtype=bool)
    row[units().offsets[1] + 3] = False
    found = SlimRefit(network, units(), digits()[0][:512], damping=1e-6)(row)
    images = digits()[0][600:700]
    torch.testing.assert_close(predict(found, images, 64), predict(network, images, 64), rtol=1e-2, atol=2e-2)
    cut_only = predict(units().slim(network, row), images, 64)
    assert float((cut_only - predict(network, images, 64)).abs().max()) > 0.2


def test_each_step_of_the_repair_helps() -> None:
    rng, gains = np.random.default_rng(3), []
    for _ in range(4):
        row = rng.random(units().n_units) < 0.4
        row[units().offsets[:-1]] = True
        none = error_of(units().slim(residual(), row))
        corrected, refitted = (error_of(refit(fits=fits)(row)) for fits in (False, True))
        gains.append((none, corrected, refitted))
    none, corrected, refitted = np.mean(gains, axis=0)
    assert refitted < corrected < none
    assert refitted < 0.5 * none


def test_a_vanished_branch_makes_the_mean_of_what_it_made() -> None:
    row = np.ones(units().n_units, dtype=bool)
    row[units().offsets[1] : units().offsets[2]] = False
    found: Any = refit()(row)
    seen: list[Tensor] = []
    handle = residual().get_submodule("layer2.0.conv2").register_forward_hook(lambda *args: seen.append(args[2]))
    predict(residual(), digits()[0][:512], 512)
    handle.remove()
    mean = seen[0].mean(dim=(0, 2, 3))
    torch.testing.assert_close(found.layer2[0].conv2.bias, mean, rtol=0.05, atol=0.02)
    assert error_of(found) < error_of(units().slim(residual(), row))
    # What comes back can be trained: nothing of it was made in inference mode.
    images, labels = digits()
    train(found, LabelledImages(images[:100], labels[:100]), Recipe(epochs=1, learning_rate=0.01), seed=0)


@pytest.mark.parametrize("fits", [True, False])
def test_layers_before_the_first_cut_stay_as_they_were_trained(fits: bool) -> None:
    row = np.ones(units().n_units, dtype=bool)
    row[units().offsets[1] : units().offsets[1] + 5] = False
    found, trained = refit(fits=fits)(row), residual().state_dict()
    changed = {
        name
        for name, tensor in found.state_dict().items()
        if tensor.shape != trained[name].shape or not torch.equal(tensor, trained[name])
    }
    modules = {name.rpartition(".")[0] for name in changed}
    assert not {name for name in modules if name.startswith(("conv1", "bn1", "layer1"))}
    assert {"layer2.0.conv1", "layer2.0.bn1", "layer2.0.conv2", "layer2.0.bn2"} <= modules
    assert error_of(found) < error_of(units().slim(residual(), row)) + 0.01


def judge(**judging: Any) -> SlimJudge:
    images, labels = digits()
    task = SlimTask(residual(), units(), images[1000:1200], labels[1000:1200], images[:512])
    return SlimJudge(task, Judging(**judging))


def test_candidates_are_refitted_on_fewer_images_than_what_is_published() -> None:
    row, judging = some_rows()[1], judge(n_repair_images=100)
    images = digits()[0][:512]
    published = SlimRefit(residual(), units(), images)(row)
    candidate = SlimRefit(residual(), units(), images[:100], samples_per_column=CANDIDATE_SAMPLES)(row)
    assert states_equal(judging.build(row), published)
    assert states_equal(judging.candidate(row), candidate)
    assert not states_equal(candidate, published)


def test_candidates_are_measured_on_mixtures_and_published_networks_on_images() -> None:
    row, (images, labels) = some_rows()[1], digits()
    masks = PackedMasks.pack_each([row], units().n_units)
    mixtures = mixed(images[1000:1150], torch.Generator().manual_seed(0))

    def said(network: nn.Module, at: Tensor) -> float:
        dense = functional.log_softmax(predict(residual(), at, 64).double(), dim=1)
        return divergence(predict(network, at, 64), dense)

    judging = judge(n_images=150)
    candidate = judging.candidate(row)
    assert judging(masks)[0] == pytest.approx(said(candidate, mixtures), abs=1e-6)
    of_errors = judge(n_images=150, loss="error")
    errors = top1_error(predict(candidate, images[1000:1150], 64), labels[1000:1150])
    assert of_errors(masks)[0] == pytest.approx(errors)
    assert of_errors.divergences(masks)[0] == pytest.approx(said(candidate, mixtures))
    states, scores = judging.finish(masks)
    published = judging.build(row)
    assert states_equal(with_state(copy.deepcopy(residual()), states[0]), published)
    assert scores.objective("divergence")[0] == pytest.approx(said(published, images[1000:1200]), abs=1e-6)


# Importance


def test_elimination_is_what_the_best_weights_without_the_units_lose() -> None:
    """Against least squares on all sets of units of a small layer."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    images = torch.randn(500, 6, generator=generator)
    of_table = ChannelUnits.of(network, images[:1])
    statistics = collect_statistics(network, WeightUnits.of(network), images, seed=0)
    scores = elimination_scores(network, of_table, statistics, damping=0.0)
    held: LayerStatistics = statistics["2.weight"]
    weight, curvature = network.get_parameter("2.weight").detach().double(), held.curvature[0].double()

    def loss(gone: tuple[int, ...]) -> float:
        left = [i for i in range(4) if i not in gone]
        best = torch.zeros_like(weight)
        if left:
            best[:, left] = torch.linalg.solve(curvature[left][:, left], (weight @ curvature)[:, left].T).T
        off = weight - best
        return float((held.sensitivity.double() * ((off @ curvature) * off).sum(dim=1)).sum())

    order = np.argsort(scores)
    for n in range(1, 5):
        assert scores[order[n - 1]] == pytest.approx(loss(tuple(order[:n].tolist())), rel=1e-4)
    # Always the cheapest next.
    for n in range(1, 4):
        gone = tuple(order[: n - 1].tolist())
        others = [loss((*gone, i)) for i in range(4) if i not in gone]
        assert min(others) == pytest.approx(loss((*gone, int(order[n - 1]))), rel=1e-6)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "scale"])
def test_simple_importance_is_what_it_says(importance: str) -> None:
    images, labels = digits()
    network = copy.deepcopy(residual())
    if importance == "magnitude":
        found = group_magnitude(network, units())
        makes = network.get_parameter("layer2.0.conv1.weight").detach()
        reads = network.get_parameter("layer2.0.conv2.weight").detach()
        expected = (makes.square().sum(dim=(1, 2, 3)) + reads.square().sum(dim=(0, 2, 3))).sqrt()
        expected = expected / expected.mean()
    elif importance == "scale":
        found = norm_scale(network, units())
        expected = network.get_parameter("layer2.0.bn1.weight").detach().abs()
    else:
        found = group_taylor(network, units(), images[:64], labels[:64])
        nn.functional.cross_entropy(network(images[:64]), labels[:64]).backward()
        products = {name: (p * p.grad).detach() for name, p in network.named_parameters() if p.grad is not None}
        expected = products["layer2.0.conv1.weight"].sum(dim=(1, 2, 3)) + products["layer2.0.conv2.weight"].sum(
            dim=(0, 2, 3)
        )
        expected = (expected + products["layer2.0.bn1.weight"] + products["layer2.0.bn1.bias"]).abs()
        expected = expected / expected.mean()
    start, stop = units().offsets[1:3]
    np.testing.assert_allclose(found[start:stop], expected.numpy(), rtol=2e-3)


# Allocation


def test_the_allocation_of_least_loss_is_found() -> None:
    small = CifarResNet(8, 10, 1, base_width=2).eval()
    of_small = ChannelUnits.of(small, IMAGE)
    scores = np.random.default_rng(0).random(of_small.n_units).astype(np.float32)
    (cost,) = slim_costs(["macs"], of_small, small, IMAGE)
    prices = Prices(of_small, scores, cost)
    curves = [np.linspace(1, 0, int(size) + 1) ** 2 * (i + 1) for i, size in enumerate(of_small.sizes)]
    every = np.array(list(itertools.product(*(range(int(size) + 1) for size in of_small.sizes))))
    costs = prices.of(every)
    losses = np.array([sum(c[k] for c, k in zip(curves, row, strict=True)) for row in every])
    for budget in (0.5, 0.7, 0.9):
        found = cheapest_within(prices, curves, budget)
        at = int(np.flatnonzero((every == found).all(axis=1))[0])
        assert costs[at] <= budget
        # A price finds those on the convex hull; what it leaves of the budget is spent too.
        priced = [int(np.argmin(losses + price * costs)) for price in np.geomspace(1e-3, 1e3, 400)]
        assert losses[at] <= min(losses[i] for i in priced if costs[i] <= budget) + 1e-12
        more = [found + step for step in np.eye(len(found), dtype=int) if (found + step <= of_small.sizes).all()]
        assert all(costs[int(np.flatnonzero((every == row).all(axis=1))[0])] > budget for row in more)
        uniform = uniform_within(prices, budget)
        kept = PackedMasks.pack_each([keep_top(ranks_within_groups(scores, of_small), uniform, of_small)], len(scores))
        assert cost.of(kept)[0] <= budget


def test_curves_say_what_is_lost_and_where_nothing_may_go() -> None:
    scores = np.arange(units().n_units, dtype=np.float32)
    assert loss_curves(units(), scores)[0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    asked: list[PackedMasks] = []

    def measure(masks: PackedMasks) -> np.ndarray:
        asked.append(masks)
        return 1 - masks.density

    curves = measured_curves(units(), scores, measure, shares=(0.0, 0.5))
    assert len(asked[0]) == 6
    # Measured where it was asked for, and in between as the scores fall: by 3 of 3, by 3 of 4, and evenly.
    np.testing.assert_allclose(curves[0][[0, 4, 8]], [8 / 56, 4 / 56, 0], atol=1e-12)
    assert curves[0][:5].tolist() == pytest.approx(np.linspace(8 / 56, 4 / 56, 5).tolist())
    assert curves[0][4:].tolist() == pytest.approx([4 / 56, 4 / 56 * 2 / 3, 4 / 56 / 3, 0, 0])


def test_the_rungs_of_a_ladder_cost_what_the_channels_of_a_group_add() -> None:
    scores = np.arange(units().n_units, dtype=np.float32)
    (cost,) = slim_costs(["macs"], units(), residual(), IMAGE)
    ladder = ladder_of(Prices(units(), scores, cost))
    assert ladder.densities[[0, 8, 16]].tolist() == [0.0, 0.5, 1.0]
    for g, (start, stop) in enumerate(itertools.pairwise(units().offsets)):
        rows = [np.ones(units().n_units, dtype=bool) for _ in range(2)]
        rows[0][start:stop] = False
        rows[1][start : start + (stop - start) // 2] = False
        none, half = cost.of(masks_of(*rows))
        assert ladder.amounts[g, [0, 8, 16]].tolist() == pytest.approx(
            [0, (half - none) * 1e6, (1 - none) * 1e6], abs=1
        )


# The search


def front_of(**changed: Any) -> Front:
    images, labels = digits()
    options: dict[str, Any] = {
        "units": "channels", "evaluations": 90, "device": "cpu", "workers": 1, "progress": False,
        "search_images": images[1000:1200], "search_labels": labels[1000:1200],
    }  # fmt: skip
    return pareto_prune(residual(), images[:600], labels[:600], **(options | changed))


@lru_cache
def front() -> Front:
    return front_of()


def test_members_are_smaller_networks_and_cost_what_the_front_says(tmp_path: Path) -> None:
    found = front()
    assert found.names == ("divergence", "macs")
    assert len(found) >= 5
    assert {"phase1", "phase2"} & set(found.stages)
    whole = measured(residual())["macs"]
    for i in range(len(found)):
        network = found.network(i)
        assert measured(network)["macs"] / whole == pytest.approx(found.costs[i, 0], rel=1e-6)
        weights = [sum(p.numel() for p in one.parameters() if p.ndim > 1) for one in (network, residual())]
        assert found.density[i] == pytest.approx(weights[0] / weights[1])
    half = found.network(found.closest(macs=0.5))
    assert error_of(half) < error_of(residual()) + 0.1
    assert sum(p.numel() for p in half.parameters()) < 0.8 * sum(p.numel() for p in residual().parameters())
    found.save(tmp_path / "front.npz")
    again = Front.load(tmp_path / "front.npz", residual())
    for i in (0, len(found) - 1):
        assert states_equal(again.network(i), found.network(i))


def test_a_front_reaches_both_ends() -> None:
    costs = {cost.name: cost for cost in slim_costs(["macs"], units(), residual(), IMAGE)}
    least = costs["macs"].of(masks_of(np.zeros(units().n_units, dtype=bool)))[0]
    assert front().costs.min() < 1.5 * least
    assert front().costs.max() > 0.6


def test_equal_calls_give_equal_fronts_in_any_number_of_processes() -> None:
    again = front_of(workers=2)
    assert np.array_equal(again.objectives, front().objectives)
    assert np.array_equal(again.masks.words, front().masks.words)
    assert all(states_equal(again.network(i), front().network(i)) for i in (0, len(again) - 1))


@pytest.mark.parametrize("repair", ["none", "batchnorm"])
def test_other_repairs_and_objectives(repair: str) -> None:
    found = front_of(repair=repair, objectives=("error", "parameters", "memory"), exclude="layer1.*")
    assert found.names == ("error", "parameters", "memory")
    images, labels = digits()
    for i in range(len(found)):
        network = found.network(i)
        assert top1_error(predict(network, images[1000:1200], 64), labels[1000:1200]) == found.error[i]
        assert network.get_parameter("layer1.0.conv1.weight").shape == (8, 8, 3, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"units": "filters"}, "expected `units` among weights, channels, found 'filters'"),
        ({"objectives": ("error", "watts")}, "expected costs among density, parameters, macs, bytes, memory"),
        ({"evaluations": 20}, "expected at least 68 evaluations"),
        ({"exclude": "conv9"}, "'conv9' matches none of the layers whose channels can be cut"),
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        front_of(**changed)
