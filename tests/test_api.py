"""pareto_prune on a network that is not the project's: what a library user is promised, and every refusal."""

import copy
import multiprocessing
import pickle
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune import Front, api, pareto_prune
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.measurement import measure_errors
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.evaluation.workers import can_fork
from paretoprune.fronts import non_dominated
from paretoprune.importance.scores import compute_importance
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.costs import Priced, make_costs
from paretoprune.settings import Compute, Evaluating
from paretoprune.stages import candidates
from small_networks import digits, magnitude_mask, n_hooks, numpy_state, states_equal, trained
from torch import Tensor, nn

EVALUATIONS = 80


def part(start: int, stop: int) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[start:stop], labels[start:stop]


def prune(network: nn.Module | None = None, /, **changed: Any) -> Front:
    """The search on the trained foreign network, with a search split of its own."""
    images, labels = part(0, 400)
    search_images, search_labels = part(1000, 1200)
    options: dict[str, Any] = {
        "images": images,
        "labels": labels,
        "search_images": search_images,
        "search_labels": search_labels,
        "evaluations": EVALUATIONS,
        "device": "cpu",
        "progress": False,
    }
    options |= changed
    return pareto_prune(trained("foreign") if network is None else network, **options)


@lru_cache
def pruned() -> Front:
    """One search that many tests look at."""
    return prune()


def test_the_front_is_consistent() -> None:
    front = pruned()
    assert len(front) >= 5
    assert front.error.shape == front.sparsity.shape == front.density.shape == (len(front),)
    np.testing.assert_allclose(front.sparsity, 1 - front.masks.density, rtol=0, atol=1e-12)
    assert np.all((front.error >= 0) & (front.error <= 1))
    assert np.all((front.sparsity >= 0) & (front.sparsity <= 1))
    # Sparsest first, and none better than another in both.
    assert np.all(np.diff(front.sparsity) < 0)
    assert np.all(np.diff(front.error) < 0)
    assert np.array_equal(non_dominated(front.objectives), np.arange(len(front)))
    assert 0 < front.hypervolume() < 1
    assert set(front.stages) <= {"start", "phase1", "phase2"}


def test_the_front_is_no_worse_than_the_classical_allocations() -> None:
    front, network, (images, labels) = pruned(), trained("foreign"), part(1000, 1200)
    layout = WeightUnits.of(network)
    task = Task(network, layout, images, labels, part(0, 400)[0])
    evaluate = PopulationEvaluator(task, Evaluating(repair_images=None), Compute())
    parameters = dict(network.named_parameters())
    sizes = np.abs(layout.flatten({name: parameters[name].detach().numpy() for name in layout.names}))
    for density in (0.8, 0.5, 0.2):
        n_keep = round(density * layout.n_weights)
        everywhere = np.zeros(layout.n_weights, dtype=bool)
        everywhere[np.argsort(-sizes, kind="stable")[:n_keep]] = True
        for mask in (everywhere, magnitude_mask(network, layout, density)):
            masks = PackedMasks.pack(mask)
            error, found = evaluate(masks)[0], masks.density[0]
            # One weight a layer for rounding, one image of 200 for calibration images in another order.
            able = front.density <= found + layout.n_groups / layout.n_weights
            assert front.error[able].min() <= error + 1.01 / 200


def test_phase_2_looks_beyond_phase_1() -> None:
    assert "phase2" in pruned().stages


def test_the_member_closest_to_a_sparsity_is_found() -> None:
    front = pruned()
    i = front.closest(sparsity=0.8)
    assert abs(front.sparsity[i] - 0.8) == np.abs(front.sparsity - 0.8).min()
    with pytest.raises(ValueError, match=r"80 % is 0\.8"):
        front.closest(sparsity=80)


def test_every_network_has_the_promised_sparsity_and_error() -> None:
    front, (images, labels) = pruned(), part(1000, 1200)
    layout = WeightUnits.of(trained("foreign"))
    for i in range(len(front)):
        network = front.network(i)
        parameters = dict(network.named_parameters())
        n_kept = sum(int(torch.count_nonzero(parameters[name])) for name in layout.names)
        assert 1 - n_kept / layout.n_weights == pytest.approx(front.sparsity[i], abs=1e-12)
        # The evaluator runs in another memory layout: one image of 200 on the edge may turn.
        assert top1_error(predict(network, images, 50), labels) == pytest.approx(front.error[i], abs=1.01 / 200)


def test_a_network_of_the_front_is_the_user_s_own_kind_and_needs_nothing_of_this_package() -> None:
    network, original = pruned().network(0), trained("foreign")
    assert type(network) is type(original)
    assert network.state_dict().keys() == original.state_dict().keys()
    assert n_hooks(network) == 0
    assert not network.training
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    stored = pickle.dumps(network)
    assert b"paretoprune" not in stored
    copies = [pickle.loads(stored), copy.deepcopy(network)]
    for other in copies:
        assert states_equal(other, network)
        assert torch.equal(predict(other, part(0, 20)[0], 20), predict(network, part(0, 20)[0], 20))
    fresh_copy = trained("foreign")
    fresh_copy.load_state_dict(network.state_dict())
    assert states_equal(fresh_copy, network)


def test_the_same_seed_gives_the_same_front_and_another_seed_another() -> None:
    first, second, third = pruned(), prune(), prune(seed=1)
    assert first.masks.fingerprints() == second.masks.fingerprints()
    assert np.array_equal(first.objectives, second.objectives)
    assert first.stages == second.stages
    assert first.masks.fingerprints() != third.masks.fingerprints()


def test_inputs_and_global_random_state_stay_as_they_were() -> None:
    network = trained("foreign").train()
    before, (images, labels) = copy.deepcopy(network), part(0, 400)
    kept = images.clone(), labels.clone()
    states = torch.get_rng_state(), numpy_state()
    prune(network, images=images, labels=labels, evaluations=60)
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy_state() == states[1]


def test_without_search_images_a_fifth_is_held_out() -> None:
    images, labels = part(0, 400)
    front = prune(search_images=None, search_labels=None)
    # 80 images are held out, so that every error is a number of eightieths.
    np.testing.assert_allclose(front.error * 80, np.rint(front.error * 80), rtol=0, atol=1e-9)
    assert np.any(np.abs(front.error * 40 - np.rint(front.error * 40)) > 1e-6)
    again = prune(search_images=None, search_labels=None)
    assert np.array_equal(again.objectives, front.objectives)
    assert top1_error(predict(front.network(len(front) - 1), images, 64), labels) < 0.5


def test_images_that_are_held_out_are_used_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = part(0, 400)
    images = images.clone()
    images[:, 0, 0, 0] = torch.arange(400.0) / 400  # tells which image it is
    given: dict[str, set[float]] = {}

    class Recording(PopulationEvaluator):
        def __init__(self, task: Task, evaluating: Evaluating, compute: Compute) -> None:
            given["search"] = set(task.images[:, 0, 0, 0].tolist())
            given["calibration"] = set(task.calibration[:, 0, 0, 0].tolist())
            super().__init__(task, evaluating, compute)

    def recording(score: str, network: nn.Module, layout: WeightUnits, images: Tensor, *rest: Any) -> dict[str, Tensor]:
        given[score] = set(images[:, 0, 0, 0].tolist())
        return compute_importance(score, network, layout, images, *rest)

    monkeypatch.setattr(candidates, "PopulationEvaluator", Recording)
    monkeypatch.setattr(api, "compute_importance", recording)
    prune(images=images, labels=labels, search_images=None, search_labels=None, evaluations=60)
    assert {name: len(seen) for name, seen in given.items() if name in ("search", "calibration", "fisher")} == {
        "search": 80,
        "calibration": 320,
        "fisher": 256,
    }
    assert all(given["search"].isdisjoint(seen) for name, seen in given.items() if name != "search")


def test_the_smallest_share_held_out_has_an_image_of_every_class() -> None:
    images, labels = digits()
    few = torch.cat([torch.nonzero(labels == c)[:3, 0] for c in range(10)])
    front = prune(images=images[few], labels=labels[few], search_images=None, search_labels=None)
    # A fifth of 30 images is six, less than the ten classes.
    np.testing.assert_allclose(front.error * 10, np.rint(front.error * 10), rtol=0, atol=1e-9)


def test_without_repair_the_bare_masks_are_evaluated() -> None:
    front = prune(repair="none")
    network, original = front.network(0), trained("foreign")
    assert torch.equal(network.get_buffer("line_norm.running_mean"), original.get_buffer("line_norm.running_mean"))
    repaired = pruned().network(0)
    assert not torch.equal(repaired.get_buffer("line_norm.running_mean"), original.get_buffer("line_norm.running_mean"))


def test_images_and_labels_may_be_of_other_types() -> None:
    images, labels = part(0, 400)
    front = prune(images=images.double().requires_grad_(), labels=labels.to(torch.int32))
    assert np.array_equal(front.objectives, pruned().objectives)


def test_without_progress_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    prune(evaluations=60)
    assert capfd.readouterr() == ("", "")


def test_with_progress_a_bar_shows_all_evaluations(capfd: pytest.CaptureFixture[str]) -> None:
    prune(evaluations=60, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "60/60" in captured.err
    assert "hypervolume" in captured.err


@pytest.mark.parametrize(("repair", "evaluations"), [("batchnorm", 70), ("reconstruct", 75)])
def test_as_many_networks_are_evaluated_as_asked_for(
    repair: str, evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    class Counting(PopulationEvaluator):
        # The final front is finished and measured once more, which is no part of the search.
        def bounded(self, masks: PackedMasks, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            evaluated.append(len(masks))
            return super().bounded(masks, bounds)

    monkeypatch.setattr(candidates, "PopulationEvaluator", Counting)
    prune(repair=repair, evaluations=evaluations, workers=1)
    assert sum(evaluated) == evaluations


@pytest.mark.skipif(not can_fork(), reason="worker processes are forked, which only Linux does well")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_front_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    front = prune(workers=workers)
    assert front.masks.fingerprints() == pruned().masks.fingerprints()
    assert np.array_equal(front.objectives, pruned().objectives)
    assert multiprocessing.active_children() == []


def by_hand(repair: str) -> Finisher:
    """What finishes and measures networks, as the search makes its own."""
    images, (search_images, search_labels) = part(0, 400)[0], part(1000, 1200)
    calibration = images[np.random.default_rng(0).permutation(len(images))]
    task = Task(trained("foreign"), WeightUnits.of(trained("foreign")), search_images, search_labels, calibration)
    return Finisher(task, Evaluating(repair=repair), Compute())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_final_front_is_evaluated_in_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    class Rough(PopulationEvaluator):
        def __init__(self, task: Task, evaluating: Evaluating, compute: Compute) -> None:
            super().__init__(task, evaluating, replace(compute, precision=precision))
            chosen.append(self.precision)

    monkeypatch.setattr(candidates, "PopulationEvaluator", Rough)
    front = prune(evaluations=60)
    exact = by_hand("batchnorm")
    # Both phases; what finishes networks and measures them is no such evaluator.
    assert chosen == [precision, precision]
    measured = [exact.measure(exact.build(front.masks.unpack(i)))[0] for i in range(len(front))]
    assert front.error.tolist() == measured
    assert np.array_equal(non_dominated(front.objectives), np.arange(len(front)))
    for i in range(len(front)):
        assert exact.measure(front.network(i))[0] == front.error[i]


def test_a_front_is_data_and_keeps_no_images_alive() -> None:
    front = pruned()
    assert {type(value) for value in vars(front).values()} <= {
        PackedMasks,
        np.ndarray,
        list,
        tuple,
        str,
        type(front.dense),
        type(None),
    }
    stored = len(pickle.dumps(front))
    states = sum(tensor.numel() * tensor.element_size() for state in front.states or [] for tensor in state.values())
    assert stored < 1.3 * states + 200_000


def test_other_objectives_are_minimised_and_stored(tmp_path: Path) -> None:
    front = prune(objectives=("divergence", "macs", "parameters"))
    assert front.names == ("error", "macs", "parameters")
    assert front.costs.shape == (len(front), 2)
    priced = Priced(trained("foreign"), WeightUnits.of(trained("foreign")), part(0, 1)[0])
    for i, cost in enumerate(make_costs(["macs", "parameters"], priced)):
        np.testing.assert_array_equal(front.costs[:, i], cost.of(front.masks))
    assert np.array_equal(non_dominated(front.objectives), np.arange(len(front)))
    front.save(tmp_path / "front.npz")
    assert np.array_equal(Front.load(tmp_path / "front.npz").objectives, front.objectives)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (("accuracy", "density"), "expected a loss among error, divergence as first objective, found 'accuracy'"),
        (("error", "watts"), "expected costs among density, parameters, macs, bytes, found watts"),
        (("error",), "expected a loss and one or two costs"),
        (("error", "density", "density"), "expected a loss and one or two costs, each once"),
    ],
)
def test_objectives_that_cannot_be_minimised_are_refused(objectives: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(objectives=objectives)


# Networks that are re-fitted


@lru_cache
def watched() -> tuple[Front, nn.Module, list[Any], list[Any]]:
    """A search whose candidates are re-fitted, at the same budget as the others, in this process alone.

    Also the network after it, and the global random state before and after.
    """
    network = trained("residual")
    before = [torch.get_rng_state(), numpy_state()]
    front = prune(network, repair="reconstruct", workers=1)
    return front, network, before, [torch.get_rng_state(), numpy_state()]


def refitted() -> Front:
    """The front of that search."""
    return watched()[0]


def test_a_re_fitted_front_is_consistent() -> None:
    front = refitted()
    assert len(front) >= 3
    assert np.all(np.diff(front.sparsity) < 0)
    assert np.array_equal(non_dominated(front.objectives), np.arange(len(front)))
    assert set(front.stages) <= {"start", "phase1", "reselected", "phase2"}


def test_the_error_of_a_re_fitted_member_is_that_of_its_network() -> None:
    front, (images, labels), original = refitted(), part(1000, 1200), trained("residual")
    layout = WeightUnits.of(original)
    for i in range(len(front)):
        network = front.network(i)
        assert not network.training
        assert n_hooks(network) == 0
        # The evaluator runs in another memory layout: one image of 200 on the edge may turn.
        assert top1_error(predict(network, images, 64), labels) == pytest.approx(front.error[i], abs=1.01 / 200)
        assert front.density[i] == front.masks.density[i]
        for name, mask in layout.split(front.masks.unpack(i)).items():
            kept = torch.from_numpy(mask)
            weights, before = network.get_parameter(name), original.get_parameter(name)
            assert not bool(weights[~kept].any())
            if kept.any() and not kept.all():
                assert not torch.equal(weights[kept], before[kept])


def test_a_re_fitted_network_is_built_equal_each_time_and_measured_as_published() -> None:
    front, network = refitted(), trained("residual")
    assert states_equal(front.network(0), front.network(0))
    search = LabelledImages(*part(1000, 1200))
    states = [front.network(i).state_dict() for i in range(len(front))]
    assert measure_errors(network, states, search, torch.device("cpu")).tolist() == list(front.error)


@pytest.mark.skipif(not can_fork(), reason="worker processes are forked, which only Linux does well")
def test_re_fitting_gives_the_same_front_again_in_any_number_of_processes() -> None:
    front = prune(trained("residual"), repair="reconstruct", workers=2)
    assert front.masks.fingerprints() == refitted().masks.fingerprints()
    assert np.array_equal(front.objectives, refitted().objectives)
    assert front.stages == refitted().stages


def test_re_fitting_leaves_the_network_and_the_global_random_state_as_they_were() -> None:
    _, network, before, after = watched()
    assert states_equal(network, trained("residual"))
    assert n_hooks(network) == 0
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]


def test_re_fitting_gains_much_over_correcting_batch_norms() -> None:
    assert refitted().hypervolume() > prune(trained("residual")).hypervolume() + 0.02


def test_a_front_read_from_a_file_says_that_it_knows_no_network(tmp_path: Any) -> None:
    pruned().save(tmp_path / "front.npz")
    loaded = Front.load(tmp_path / "front.npz")
    assert np.array_equal(loaded.objectives, pruned().objectives)
    with pytest.raises(RuntimeError, match="read from a file and knows no network"):
        loaded.network(0)


@pytest.mark.parametrize(("repair", "least"), [("batchnorm", 56), ("reconstruct", 72)])
def test_too_few_evaluations_are_refused(repair: str, least: int) -> None:
    anew = " and members chosen anew" if repair == "reconstruct" else ""
    for evaluations in (0, 1, 40, least - 1):
        with pytest.raises(
            ValueError, match=rf"at least {least} evaluations, .* population{anew}; found {evaluations}$"
        ):
            prune(evaluations=evaluations, repair=repair)
    assert set(prune(evaluations=least, repair=repair).stages) <= {"start", "phase1", "reselected", "phase2"}


@pytest.mark.parametrize("name", ["images", "search_images"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(30, 1, 8, 8, dtype=torch.uint8),
            r"as normalised floats, images \(n, c, h, w\), .* found torch\.uint8 of shape",
        ),
        (torch.zeros(30), r"or tables \(n, features\), found torch\.float32 of shape \(30,\)"),
        (torch.full((30, 1, 8, 8), torch.nan), "expected finite"),
        (torch.zeros(29, 1, 8, 8), r"expected one label for each of 29 \w+, found shape \(30,\)"),
    ],
)
def test_images_that_cannot_be_used_are_refused(name: str, images: Tensor, message: str) -> None:
    labels = {"images": "labels", "search_images": "search_labels"}[name]
    with pytest.raises(ValueError, match=message) as caught:
        prune(**{name: images, labels: torch.arange(30) % 10})
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["labels", "search_labels"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(30), "expected whole-number labels"),
        (torch.zeros(29, 1, dtype=torch.int64), r"expected one label for each of 30 \w+, found shape \(29,\)"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(name: str, labels: Tensor, message: str) -> None:
    images = {"labels": "images", "search_labels": "search_images"}[name]
    with pytest.raises(ValueError, match=message):
        prune(**{name: labels, images: torch.zeros(30, 1, 8, 8)})


@pytest.mark.parametrize("name", ["labels", "search_labels"])
@pytest.mark.parametrize("label", [10, -1])
def test_labels_that_the_network_has_no_answer_for_are_refused(name: str, label: int) -> None:
    labels = part(0, 400)[1].clone() if name == "labels" else part(1000, 1200)[1].clone()
    labels[3] = label
    with pytest.raises(ValueError, match=r"label.*10"):
        prune(**{name: labels})


def test_images_that_the_network_cannot_run_on_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        prune(images=torch.zeros(400, 3, 8, 8), search_images=torch.zeros(200, 3, 8, 8))


def test_search_images_and_their_labels_belong_together() -> None:
    for name in ("search_images", "search_labels"):
        with pytest.raises(ValueError, match="search_images and search_labels belong together; give both or neither"):
            prune(**{name: None})


def test_search_images_of_one_class_are_refused() -> None:
    images, labels = digits()
    with pytest.raises(ValueError, match="expected search images of at least two classes, found one"):
        prune(search_images=images[labels == 3], search_labels=labels[labels == 3])


def test_too_few_images_to_hold_some_out_name_the_class() -> None:
    images, labels = part(0, 400)
    chosen = torch.cat([torch.nonzero(labels < 9)[:, 0], torch.nonzero(labels == 9)[:1, 0]])
    with pytest.raises(ValueError, match="class 9 has 1"):
        prune(images=images[chosen], labels=labels[chosen], search_images=None, search_labels=None)


def test_no_images_at_all_are_refused() -> None:
    nothing = {"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(ValueError, match="found none"):
        prune(**nothing)
    with pytest.raises(ValueError, match="found none"):
        prune(**nothing, search_images=None, search_labels=None)


def test_an_unknown_repair_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a repair mode among none, batchnorm, reconstruct, found 'magic'"):
        prune(repair="magic")


def test_a_network_with_nothing_to_prune_is_refused() -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 10)), nn.Flatten())
    with pytest.raises(ValueError, match="expected at least one convolution or linear layer to prune, found none"):
        prune(network)


def test_a_network_that_answers_nan_is_refused() -> None:
    network = trained("foreign")
    network.get_parameter("head.bias").data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        prune(network)


@pytest.mark.parametrize("repair", ["batchnorm", "reconstruct"])
def test_zeros_of_a_network_that_was_pruned_before_never_count_as_kept(repair: str) -> None:
    network = copy.deepcopy(trained("foreign"))
    units, rng = WeightUnits.of(network), np.random.default_rng(0)
    zero = ~magnitude_mask(network, units, 0.6) | (rng.random(units.n_units) < 0.05)
    parameters = dict(network.named_parameters())
    for name, part in units.split(zero).items():
        with torch.no_grad():
            parameters[name][torch.from_numpy(part)] = 0.0
    front = prune(network, repair=repair, evaluations=120 if repair == "reconstruct" else EVALUATIONS)
    assert front.sparsity.min() >= zero.mean()
    for i in range(len(front)):
        weights = dict(front.network(i).named_parameters())
        n_zero = sum(int((weights[name] == 0).sum()) for name in units.names)
        assert front.sparsity[i] == pytest.approx(n_zero / units.n_units, abs=1e-12)
