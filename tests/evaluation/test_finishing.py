"""Finishing: networks as they are built, measured and chosen anew."""

import copy
import logging
import math
import multiprocessing
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import made
from evaluators import N_EVALUATED, SHARED, evaluator, finisher, search_split
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Refit
from small_networks import (
    calibration,
    digits,
    fit,
    magnitude_mask,
    n_hooks,
    naive_network,
    some_masks,
    states_equal,
    trained,
)
from torch import nn
from torch.nn import functional

KINDS = ("residual", "foreign")
REPAIRS = ("none", "batchnorm")
RECONSTRUCTED = ("residual", "foreign")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_built_networks_answer_as_the_naive_ones(kind: str, repair: str) -> None:
    network, (images, _) = trained(kind), search_split()
    masks = some_masks(network)
    build = finisher(network, repair).build
    for i in range(len(masks)):
        expected = predict(naive_network(network, masks.unpack(i), repair), images, 50)
        found = predict(build(masks.unpack(i)), images, 64)
        # The kernel behind the statistics adds thousands of float32 numbers one by one: where a channel hardly varies,
        # its mean is off by a thousandth of its deviation, and so are logits of size ten.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_network_has_the_evaluated_error_and_zeros_exactly_outside_the_mask(kind: str) -> None:
    network, (images, labels) = trained(kind), search_split()
    build, layout = finisher(network).build, WeightUnits.of(network)
    masks = some_masks(network)
    errors = evaluator(network).score(masks).error
    originals = dict(network.named_parameters())
    for i in range(len(masks)):
        built = build(masks.unpack(i))
        assert n_hooks(built) == 0
        assert not built.training
        assert built.state_dict().keys() == network.state_dict().keys()
        parameters = dict(built.named_parameters())
        for name, kept in layout.split(masks.unpack(i)).items():
            expected = torch.where(torch.from_numpy(kept), originals[name], torch.zeros(()))
            assert torch.equal(parameters[name], expected), name
        # The evaluator runs in another memory layout: one image on the edge may turn.
        assert abs(top1_error(predict(built, images, 64), labels) - errors[i]) <= 1.01 / N_EVALUATED


def test_weights_that_are_not_prunable_keep_their_trained_values() -> None:
    network = trained("foreign")
    built = finisher(network).build(np.zeros(WeightUnits.of(network).n_weights, dtype=bool))
    assert torch.equal(built.get_parameter("stem.bias"), network.get_parameter("stem.bias"))
    assert torch.equal(built.get_parameter("grouped_norm.weight"), network.get_parameter("grouped_norm.weight"))


def test_built_networks_are_independent_of_one_another_and_of_the_evaluator() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network), some_masks(network)
    build = finisher(network).build
    first = build(masks.unpack(5))
    kept = copy.deepcopy(first)
    second = build(masks.unpack(6))
    assert states_equal(first, kept)
    before = evaluate(masks)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(1.0)
    assert np.array_equal(evaluate(masks), before)
    assert states_equal(first, kept)


def test_a_built_network_can_be_trained_further() -> None:
    network, (images, labels) = trained("foreign"), search_split()
    built = finisher(network).build(some_masks(network).unpack(5)).train()
    functional.cross_entropy(built(images), labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in built.parameters())


def test_a_weight_shared_by_two_layers_stays_shared_in_a_built_network() -> None:
    network = trained("foreign")
    built = finisher(network).build(some_masks(network).unpack(5))
    assert built.get_parameter("first.weight") is built.get_submodule("second").weight


def test_networks_are_built_in_float32_whatever_they_are_evaluated_in() -> None:
    network = trained("residual")
    mask = some_masks(network).unpack(5)
    exact, rough = (finisher(network, precision=precision).build(mask) for precision in ("float32", "bfloat16"))
    assert states_equal(exact, rough)


def re_fitted(network: nn.Module, mask: np.ndarray) -> LayerwiseNetwork:
    """What repair `reconstruct` means, layer by layer, from its parts."""
    layout = WeightUnits.of(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    plain = LayerwiseNetwork(
        network,
        layout,
        calibration()[:2],
        repair="reconstruct",
        calibration_images=calibration(),
        refit=Refit(network, layout, statistics),
    )
    plain.prepare(torch.from_numpy(mask))
    return plain


def test_a_network_that_cannot_be_traced_is_re_fitted_and_built_layer_by_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, labels = digits()
    network = fit(made(architectures.Branching), images[:1000], labels[:1000], epochs=2)
    masks = some_masks(network)
    with evaluator(network, "reconstruct") as evaluate:
        assert not evaluate.is_fused
        expected = evaluate.score(masks)
        with caplog.at_level(logging.WARNING, "paretoprune"):
            finishing = finisher(network, "reconstruct", refit=evaluate.refit)
            _, states, scores = finishing.finish(masks)
        assert (
            "finished networks keep the weights that each layer was given on the dense network's inputs" in caplog.text
        )
        np.testing.assert_allclose(scores.error, expected.error, rtol=0, atol=1.01 / N_EVALUATED)
        assert finishing.reselect(masks) is masks
    state = re_fitted(network, masks.unpack(5)).network.state_dict()
    for key, value in state.items():
        # The same in another memory layout.
        torch.testing.assert_close(states[5][key], value, rtol=1e-3, atol=1e-4)


def test_layers_that_are_excluded_keep_their_weights_when_networks_are_finished() -> None:
    network = trained("residual")
    exclude = ["conv1.weight", "linear.weight"]
    layout = WeightUnits.of(network, exclude)
    built = finisher(network, "reconstruct", exclude=exclude).build(magnitude_mask(network, layout, 0.5))
    for name in ("conv1.weight", "linear.weight"):
        assert torch.equal(built.get_parameter(name), network.get_parameter(name))


@pytest.mark.parametrize("repair", ["none", "batchnorm", "reconstruct"])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=SHARED)])
def test_finished_networks_are_the_built_ones_and_measured_by_hand(repair: str, workers: int) -> None:
    network, (images, labels) = trained("foreign"), search_split()
    masks = some_masks(network).select([0, 3, 5, 7])
    with torch.inference_mode():
        dense = network(images).double().log_softmax(1)
    with evaluator(network, repair, workers=workers) as evaluate:
        evaluate(masks)
        finishing = finisher(network, repair, workers=workers, refit=evaluate.refit)
        same, states, scores = finishing.finish(masks)
        assert np.array_equal(same.words, masks.words)
        built = [finishing.build(masks.unpack(i)) for i in range(len(masks))]
        assert scores.error.shape == scores.divergence.shape == (4,)
        for i, (state, one) in enumerate(zip(states, built, strict=True)):
            assert state.keys() == one.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in one.state_dict().items())
            assert finishing.measure(one) == (scores.error[i], scores.divergence[i])
            with torch.inference_mode():
                logits = one(images)
            kl = (dense.exp() * (dense - logits.double().log_softmax(1))).sum(1).mean()
            assert scores.error[i] == pytest.approx(top1_error(logits, labels), abs=1.01 / N_EVALUATED)
            assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=1e-4)
            for name, kept in evaluate.layout.split(masks.unpack(i)).items():
                assert not bool(state[name][~torch.from_numpy(kept)].any())
        # A network can be measured and used further.
        assert torch.equal(built[1].state_dict()["head.bias"], states[1]["head.bias"])
        assert finishing.finish(masks.select([]))[1] == []
    assert multiprocessing.active_children() == []


@SHARED
def test_two_processes_finish_and_choose_anew_as_one_does() -> None:
    network = trained("residual")
    masks = some_masks(network)
    found = []
    for workers in (1, 2):
        finishing = finisher(network, "reconstruct", workers=workers)
        _, states, scores = finishing.finish(masks)
        found.append((states, scores, finishing.reselect(masks)))
    (states, scores, chosen), (other_states, other_scores, other_chosen) = found
    for one, other in zip(states, other_states, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert np.array_equal(scores.error, other_scores.error)
    assert np.array_equal(scores.divergence, other_scores.divergence)
    assert np.array_equal(chosen.words, other_chosen.words)
    layout = WeightUnits.of(network)
    assert np.array_equal(layout.n_kept(chosen), layout.n_kept(masks))
    assert not np.array_equal(chosen.words, masks.words)


@pytest.mark.parametrize("objective", ["error", "divergence"])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=SHARED)])
def test_of_a_finished_network_and_one_with_weights_chosen_anew_the_better_stays(objective: str, workers: int) -> None:
    network = trained("residual")
    layout = WeightUnits.of(network)
    good = [magnitude_mask(network, layout, density) for density in (1.0, 0.6, 0.2, 0.1)]
    bad = np.random.default_rng(0).random((3, layout.n_weights)) < 0.3
    masks = PackedMasks.pack(np.array([*good, *bad]))
    finishing = finisher(network, "reconstruct", workers=workers, objective=objective)
    anew = finishing.reselect(masks)
    (_, as_found, before), (_, chosen, after) = finishing.finish(masks), finishing.finish(anew)
    found, states, scores = finishing.finish(masks, reselect=True)
    better = after.objective(objective) < before.objective(objective)
    assert not better[0]  # the dense network
    assert better.any()
    assert np.array_equal(found.words, np.where(better[:, None], anew.words, masks.words))
    for name in ("error", "divergence"):
        np.testing.assert_array_equal(
            scores.objective(name), np.where(better, after.objective(name), before.objective(name))
        )
    for i, state in enumerate(states):
        expected = (chosen if better[i] else as_found)[i]
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert np.array_equal(layout.n_kept(found), layout.n_kept(masks))


@pytest.mark.parametrize("changed", [{"repair": "batchnorm"}, {"repair": "reconstruct", "sequential_refit": False}])
def test_nothing_is_chosen_anew_where_networks_are_not_refined(changed: dict[str, Any]) -> None:
    network = trained("residual")
    masks = some_masks(network)
    assert np.array_equal(finisher(network, **changed).finish(masks, reselect=True)[0].words, masks.words)


def test_finished_networks_answer_more_like_the_dense_one_than_evaluated_ones() -> None:
    network = trained("residual")
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, density) for density in (0.7, 0.5, 0.3)]))
    evaluate = evaluator(network, "reconstruct")
    finishing = finisher(network, "reconstruct", refit=evaluate.refit)
    assert finishing.finish(masks)[2].divergence.mean() < evaluate.score(masks).divergence.mean()


def test_a_re_fitted_network_can_be_trained_further_and_leaves_the_evaluator_as_it_was() -> None:
    network, (images, labels) = trained("foreign"), search_split()
    evaluate, masks = evaluator(network, "reconstruct"), some_masks(network)
    before = evaluate(masks)
    built = finisher(network, "reconstruct", refit=evaluate.refit).build(masks.unpack(5)).train()
    functional.cross_entropy(built(images), labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in built.parameters())
    assert built.get_parameter("first.weight") is built.get_submodule("second").weight
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(1.0)
    assert np.array_equal(evaluate(masks), before)
    assert states_equal(network, trained("foreign"))
    assert n_hooks(network) == 0


@pytest.mark.parametrize("kind", RECONSTRUCTED)
def test_in_bfloat16_re_fitted_networks_are_evaluated_about_the_same_and_built_alike(kind: str) -> None:
    network = trained(kind)
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, d) for d in (1.0, 0.8, 0.6, 0.4)]))
    exact, rough = (evaluator(network, "reconstruct", precision=precision) for precision in ("float32", "bfloat16"))
    assert rough.precision == "bfloat16"
    np.testing.assert_allclose(rough.score(masks).error, exact.score(masks).error, rtol=0, atol=0.03)
    np.testing.assert_allclose(rough.score(masks).divergence, exact.score(masks).divergence, rtol=0, atol=0.03)
    built = [
        finisher(network, "reconstruct", refit=one.refit, precision=one.precision).build(masks.unpack(3))
        for one in (exact, rough)
    ]
    assert states_equal(*built)


def test_a_search_leaves_a_re_fitting_evaluator_s_answers_as_they_were() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network, "reconstruct"), some_masks(network)
    once = evaluate(masks)
    finishing = finisher(network, "reconstruct", refit=evaluate.refit)
    finishing.reselect(masks.select([3]))
    finishing.finish(masks.select([4]))
    order = np.random.default_rng(3).permutation(len(masks))
    assert np.array_equal(evaluate(masks.select(order)), once[order])
    again = evaluator(network, "reconstruct")
    assert np.array_equal(np.concatenate([again(masks.select([i])) for i in range(len(masks))]), once)


@pytest.mark.gpu
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_what_the_cpu_finds(kind: str, repair: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    network = trained(kind)
    masks = some_masks(network)
    on_cpu, on_gpu = (evaluator(network, repair, device=device) for device in ("cpu", "cuda"))
    expected, found = on_cpu.score(masks), on_gpu.score(masks)
    # TF32 in convolutions keeps ten bits: a few images in three hundred may turn, and logits move by a percent.
    np.testing.assert_allclose(found.error, expected.error, rtol=0, atol=0.02)
    np.testing.assert_allclose(found.divergence, expected.divergence, rtol=0, atol=0.02)
    assert np.array_equal(on_gpu(masks), on_gpu(masks))
    built = finisher(network, repair, device="cuda").build(masks.unpack(5))
    assert {parameter.device.type for parameter in built.parameters()} == {"cpu"}
