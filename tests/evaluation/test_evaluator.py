"""Judging masks: the evaluator against a naive loop, its purity, its two objectives, and what it builds."""

import copy
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import made
from paretoprune.devices import default_batch_size
from paretoprune.evaluation import evaluator as evaluation
from paretoprune.evaluation.evaluator import PopulationEvaluator, Scores
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import divergence, predict, top1_error
from paretoprune.evaluation.workers import can_fork
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Reconstruction
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
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("residual", "foreign")
REPAIRS = ("none", "batchnorm")
N_JUDGED = 300


def judged() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[1000 : 1000 + N_JUDGED], labels[1000 : 1000 + N_JUDGED]


def evaluator(
    network: nn.Module,
    repair: str = "batchnorm",
    *,
    objective: str = "error",
    precision: str = "float32",
    batch_size: int = 64,
    device: str = "cpu",
    **options: Any,
) -> PopulationEvaluator:
    images, labels = judged()
    return PopulationEvaluator(
        network,
        WeightUnits.of(network),
        images,
        labels,
        repair=repair,
        calibration_images=calibration(),
        objective=objective,
        precision=precision,
        batch_size=batch_size,
        device=device,
        **options,
    )


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluator_agrees_with_a_naive_loop_over_single_networks(kind: str, repair: str) -> None:
    network, (images, labels) = trained(kind), judged()
    masks = some_masks(network)
    evaluate = evaluator(network, repair)
    scores = evaluate.score(masks)
    with torch.no_grad():
        dense = network(images).log_softmax(1).double()
    for i in range(len(masks)):
        with torch.no_grad():
            logits = naive_network(network, masks.unpack(i), repair)(images)
        n_wrong = int((logits.argmax(1) != labels).sum())
        # Sums in another order may turn the answer to one image on the edge between two classes.
        assert abs(scores.error[i] - n_wrong / N_JUDGED) <= 1.01 / N_JUDGED
        kl = (dense.exp() * (dense - logits.log_softmax(1).double())).sum(1).mean()
        # float32 logits of size ten are good to about 1e-6, and 1 - exp(-x) is no steeper than 1.
        assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=1e-4)
    assert np.array_equal(evaluate(masks), scores.error)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_built_networks_answer_as_the_naive_ones(kind: str, repair: str) -> None:
    network, (images, _) = trained(kind), judged()
    masks = some_masks(network)
    evaluate = evaluator(network, repair)
    for i in range(len(masks)):
        expected = predict(naive_network(network, masks.unpack(i), repair), images, 50)
        found = predict(evaluate.build(masks.unpack(i)), images, 64)
        # The kernel behind the statistics adds thousands of float32 numbers one by one: where a channel hardly varies,
        # its mean is off by a thousandth of its deviation, and so are logits of size ten.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_network_has_the_judged_error_and_zeros_exactly_outside_the_mask(kind: str) -> None:
    network, (images, labels) = trained(kind), judged()
    evaluate, layout = evaluator(network), WeightUnits.of(network)
    masks = some_masks(network)
    errors = evaluate.score(masks).error
    originals = dict(network.named_parameters())
    for i in range(len(masks)):
        built = evaluate.build(masks.unpack(i))
        assert n_hooks(built) == 0
        assert not built.training
        assert built.state_dict().keys() == network.state_dict().keys()
        parameters = dict(built.named_parameters())
        for name, kept in layout.split(masks.unpack(i)).items():
            expected = torch.where(torch.from_numpy(kept), originals[name], torch.zeros(()))
            assert torch.equal(parameters[name], expected), name
        # The judge runs in another memory layout: one image on the edge may turn.
        assert abs(top1_error(predict(built, images, 64), labels) - errors[i]) <= 1.01 / N_JUDGED


def test_weights_that_are_not_prunable_keep_their_trained_values() -> None:
    network = trained("foreign")
    built = evaluator(network).build(np.zeros(WeightUnits.of(network).n_weights, dtype=bool))
    assert torch.equal(built.get_parameter("stem.bias"), network.get_parameter("stem.bias"))
    assert torch.equal(built.get_parameter("grouped_norm.weight"), network.get_parameter("grouped_norm.weight"))


def test_built_networks_are_independent_of_one_another_and_of_the_evaluator() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network), some_masks(network)
    first = evaluate.build(masks.unpack(5))
    kept = copy.deepcopy(first)
    second = evaluate.build(masks.unpack(6))
    assert states_equal(first, kept)
    before = evaluate(masks)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(1.0)
    assert np.array_equal(evaluate(masks), before)
    assert states_equal(first, kept)


def test_a_built_network_can_be_trained_further() -> None:
    network, (images, labels) = trained("foreign"), judged()
    built = evaluator(network).build(some_masks(network).unpack(5)).train()
    functional.cross_entropy(built(images), labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in built.parameters())


def test_a_weight_shared_by_two_layers_stays_shared_in_a_built_network() -> None:
    network = trained("foreign")
    built = evaluator(network).build(some_masks(network).unpack(5))
    assert built.get_parameter("first.weight") is built.get_submodule("second").weight


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_masks_get_equal_objectives_whatever_was_judged_before(kind: str, repair: str) -> None:
    network = trained(kind)
    for objective in ("error", "divergence"):
        evaluate = evaluator(network, repair, objective=objective)
        masks = some_masks(network)
        once = evaluate(masks)
        assert np.array_equal(evaluate(masks), once)
        order = np.random.default_rng(3).permutation(len(masks))
        assert np.array_equal(evaluate(masks.select(order)), once[order])
        evaluate.build(masks.unpack(1))
        alone = np.concatenate([evaluate(masks.select([i])) for i in range(len(masks))])
        assert np.array_equal(alone, once)
        assert np.array_equal(evaluator(network, repair, objective=objective)(masks), once)


def test_buffers_that_a_forward_pass_changes_do_not_carry_over_to_the_next_mask() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained("residual")
            self.register_buffer("n_passes", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            passes = self.get_buffer("n_passes")
            passes += 1
            return self.inner(x) + passes * torch.arange(10)

    evaluate = evaluator(Counting(), "none")
    mask = PackedMasks.pack(np.ones((1, WeightUnits.of(Counting()).n_weights), dtype=bool))
    first = evaluate.score(mask)
    second = evaluate.score(mask)
    assert (first.error[0], first.divergence[0]) == (second.error[0], second.divergence[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_network_is_left_as_it_is(kind: str) -> None:
    network = trained(kind).train()
    before = copy.deepcopy(network)
    evaluate = evaluator(network)
    evaluate(some_masks(network))
    evaluate.build(some_masks(network).unpack(5))
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_the_full_mask_gets_the_dense_network_s_objectives() -> None:
    network, (images, labels) = trained("residual"), judged()
    evaluate = evaluator(network)
    full = evaluate.score(PackedMasks.pack(np.ones((1, evaluate.layout.n_weights), dtype=bool)))
    assert evaluate.dense.error[0] == pytest.approx(top1_error(predict(network, images, 64), labels), abs=1.01 / 300)
    assert evaluate.dense.divergence[0] == 0
    assert full.error[0] == pytest.approx(evaluate.dense.error[0], abs=1.01 / N_JUDGED)
    # Repaired statistics equal the trained ones up to float32 rounding.
    assert full.divergence[0] == pytest.approx(0, abs=1e-6)
    assert evaluate.n_classes == 10


def test_no_masks_give_no_objectives() -> None:
    evaluate = evaluator(trained("residual"))
    assert evaluate(PackedMasks.empty(evaluate.layout.n_weights)).shape == (0,)


def test_the_size_of_batches_does_not_change_what_is_found() -> None:
    network = trained("foreign")
    masks = some_masks(network)
    whole, parts = (evaluator(network, batch_size=size).score(masks) for size in (N_JUDGED, 7))
    # Kernels may sum batches of another size in another order: at most one image on the edge.
    np.testing.assert_allclose(parts.error, whole.error, rtol=0, atol=1.01 / N_JUDGED)
    np.testing.assert_allclose(parts.divergence, whole.divergence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_agrees_with_float32(kind: str, repair: str) -> None:
    network = trained(kind)
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, d) for d in (1.0, 0.8, 0.6, 0.4)]))
    exact = evaluator(network, repair).score(masks)
    rough = evaluator(network, repair, precision="bfloat16").score(masks)
    # Eight bits of mantissa: 0.4 % a value, through a few layers a percent or two of the logits. That turns the
    # images nearest to the edge between two classes, a few in a hundred for a pruned network.
    np.testing.assert_allclose(rough.error, exact.error, rtol=0, atol=0.03)
    np.testing.assert_allclose(rough.divergence, exact.divergence, rtol=0, atol=0.03)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_of_the_tests_take_the_fast_path_in_the_precision_asked_for(kind: str, precision: str) -> None:
    evaluate = evaluator(trained(kind), precision=precision)
    assert evaluate.is_fused
    assert evaluate.precision == precision


@pytest.mark.parametrize("has_arithmetic", [True, False])
def test_precision_auto_is_bfloat16_where_the_device_computes_in_it(
    has_arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "computes_bfloat16", lambda device: has_arithmetic)
    evaluate = evaluator(trained("residual"), precision="auto")
    assert evaluate.precision == ("bfloat16" if has_arithmetic else "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_trained_statistics_are_not_rounded_in_bfloat16(kind: str) -> None:
    # A batch norm of one channel whose mean is far from zero: rounded, it would be a tenth of its deviation off.
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.BatchNorm2d(1), trained(kind)
            assert self.norm.running_mean is not None
            self.norm.running_mean.fill_(0.1 + 2**-9)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.norm(x))

    evaluate = evaluator(Shifted(), "none", precision="bfloat16")
    assert isinstance(evaluate._network, FusedNetwork)
    found = evaluate._network._work.get_buffer("norm.running_mean")
    assert found.dtype == torch.float32
    assert found.item() == torch.tensor(0.1 + 2**-9).item()


def test_networks_are_built_in_float32_whatever_they_are_judged_in() -> None:
    network = trained("residual")
    mask = some_masks(network).unpack(5)
    exact, rough = (evaluator(network, precision=precision).build(mask) for precision in ("float32", "bfloat16"))
    assert states_equal(exact, rough)


def test_three_dimensional_convolutions_can_be_judged() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 4, (1, 3, 3))
            self.linear = nn.Linear(4 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x[:, None]).flatten(1))

    network = Volume()
    evaluate = evaluator(network, "none")
    mask = PackedMasks.pack(np.ones((1, evaluate.layout.n_weights), dtype=bool))
    assert evaluate.score(mask).divergence[0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "loss"}, "expected an objective among error, divergence, found 'loss'"),
        ({"precision": "int8"}, "expected a precision among float32, bfloat16 and auto, found 'int8'"),
        ({"repair": "magic"}, "expected a repair mode among none, batchnorm, reconstruct, found 'magic'"),
    ],
)
def test_an_unknown_option_is_named_with_the_known_ones(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluator(trained("residual"), **option)  # type: ignore[arg-type]


def test_a_dense_network_that_answers_nan_is_refused() -> None:
    network = trained("residual")
    network.get_parameter("linear.bias").data[3] = math.nan
    with pytest.raises(ValueError, match="dense network's answers are not finite"):
        evaluator(network)


def test_top1_error_is_the_share_of_wrong_answers() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    assert top1_error(logits, torch.tensor([0, 1, 1, 0])) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_counts_as_wrong(bad: float) -> None:
    logits = torch.tensor([[2.0, 1.0], [bad, 0.0], [0.0, bad], [-bad, 1.0]])
    assert top1_error(logits, torch.tensor([0, 0, 1, 1])) == 0.75


def test_divergence_of_the_dense_answers_is_zero() -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits.double().log_softmax(1)) == pytest.approx(0, abs=1e-12)
    # Adding a constant to an image's logits changes no answer.
    assert divergence(logits + 3, logits.double().log_softmax(1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_divergence_of_uniform_answers_is_one_minus_the_share_of_a_guess(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for sharpness in (0.0, 1.0, 5.0, 1000.0):
        teacher = (sharpness * torch.randn(50, n_classes, generator=generator)).double().log_softmax(1)
        # KL from the teacher to uniform is log C less the teacher's mean entropy.
        entropy = -(teacher.exp() * teacher).sum(1).mean().item()
        found = divergence(torch.zeros(50, n_classes), teacher)
        assert found == pytest.approx(1 - math.exp(entropy) / n_classes, abs=1e-9)
        if sharpness == 1000:
            # Two of a thousand standard deviations are rarely close, so the teacher is all but certain.
            assert found == pytest.approx(1 - 1 / n_classes, abs=0.02)


def test_divergence_of_answers_that_are_not_finite_is_one() -> None:
    dense = torch.zeros(3, 4).double().log_softmax(1)
    for bad in (math.nan, math.inf):
        logits = torch.zeros(3, 4)
        logits[1, 2] = bad
        assert divergence(logits, dense) == 1.0


def test_divergence_grows_with_the_distance_from_the_dense_answers() -> None:
    generator = torch.Generator().manual_seed(2)
    dense, other = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64).unbind()
    found = [divergence(dense + step * (other - dense), dense.log_softmax(1)) for step in (0, 0.1, 0.5, 1, 2, 10, 1e4)]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[0] == 0
    assert found[-1] <= 1


def test_scores_give_the_objective_that_is_asked_for() -> None:
    scores = Scores(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    assert scores.objective("error").tolist() == [0.1, 0.2]
    assert scores.objective("divergence").tolist() == [0.3, 0.4]


def test_predict_leaves_out_no_image_and_keeps_their_order() -> None:
    network, (images, _) = trained("foreign"), judged()
    with torch.no_grad():
        torch.testing.assert_close(predict(network, images, 7), network(images), rtol=1e-4, atol=1e-4)


def test_images_in_a_batch_are_as_many_as_fit_a_core_s_caches() -> None:
    sizes = {side: default_batch_size(torch.zeros(1, 3, side, side), torch.device("cpu")) for side in (8, 32, 64, 224)}
    assert sizes == {8: 256, 32: 128, 64: 32, 224: 8}
    assert default_batch_size(torch.zeros(1, 3, 32, 32), torch.device("cuda")) == 1024


# --------------------------------------------------------------------------------------------------- choosing the path


def unpacked(masks: PackedMasks) -> list[np.ndarray]:
    return [masks.unpack(i) for i in range(len(masks))]


def naive_objectives(network: nn.Module, masks: PackedMasks, repair: str) -> np.ndarray:
    """Top-1 errors of naive networks."""
    images, labels = judged()
    return np.array(
        [top1_error(predict(naive_network(network, m, repair), images, 64), labels) for m in unpacked(masks)]
    )


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (architectures.Branching, "control flow"),
        (architectures.ReadAfterInPlace, "changes a tensor in place that is read again"),
        (architectures.TwoInputs, "its forward takes 2 arguments instead of one"),
    ],
)
def test_a_network_that_cannot_be_traced_is_judged_layer_by_layer_and_the_log_says_why(
    kind: Callable[[], nn.Module], reason: str, repair: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = made(kind)
    masks = some_masks(network)
    with caplog.at_level(logging.INFO, "paretoprune"):
        evaluate = evaluator(network, repair)
    assert not evaluate.is_fused
    assert caplog.messages[0].startswith("the fused float32 path does not take this network: ")
    assert reason in caplog.messages[0]
    assert "candidates are evaluated in float32, layer by layer" in caplog.messages
    assert all(record.levelno == logging.INFO for record in caplog.records)
    # The untrained networks' answers are close to one another: an image or two on the edge may turn.
    np.testing.assert_allclose(
        evaluate.score(masks).error, naive_objectives(network, masks, repair), rtol=0, atol=2.01 / N_JUDGED
    )


def test_a_network_that_cannot_be_traced_is_judged_layer_by_layer_in_bfloat16_too() -> None:
    evaluate = evaluator(made(architectures.Branching), precision="bfloat16")
    assert not evaluate.is_fused
    assert isinstance(evaluate._network, LayerwiseNetwork)
    assert evaluate.precision == "bfloat16"


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    "kind",
    [
        architectures.ReadAfterSharedInPlace,
        architectures.ViewOfInPlace,
        architectures.InPlaceOnView,
        architectures.Hooked,
        architectures.OwnNorms,
    ],
)
def test_networks_that_mislead_a_tracer_are_judged_right_all_the_same(
    kind: Callable[[], nn.Module], repair: str
) -> None:
    images, labels = digits()
    network = made(kind)
    # What is changed in place cannot be trained.
    in_place = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    for module in in_place:
        module.inplace = False
    fit(network, images[:1000], labels[:1000], epochs=3)
    for module in in_place:
        module.inplace = True
    masks = some_masks(network)
    found = evaluator(network, repair).score(masks).error
    np.testing.assert_allclose(found, naive_objectives(network, masks, repair), rtol=0, atol=1.01 / N_JUDGED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_path_that_answers_otherwise_is_not_used_and_warned_about(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = trained(kind)
    masks, expected = some_masks(network), evaluator(network).score(some_masks(network)).error
    generator = torch.Generator().manual_seed(0)

    def noise(self: FusedNetwork, images: Tensor, *rest: Any) -> Tensor:
        return torch.randn(len(images), 10, generator=generator)

    monkeypatch.setattr(FusedNetwork, "answer", noise)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        evaluate = evaluator(network)
    assert not evaluate.is_fused
    assert len(caplog.messages) == 1
    assert "fused float32 path against float32 layer by layer" in caplog.text
    assert "that is too much, and it is not used" in caplog.text
    # Two ways of computing may differ on an image on the edge.
    np.testing.assert_allclose(evaluate.score(masks).error, expected, rtol=0, atol=1.01 / N_JUDGED)


def test_a_fast_path_that_is_wrong_for_pruned_networks_only_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = FusedNetwork.prepare

    def dense_always(self: FusedNetwork, kept: Tensor, *rest: Any) -> None:
        prepare(self, torch.ones_like(kept), *rest)

    monkeypatch.setattr(FusedNetwork, "prepare", dense_always)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert not evaluator(trained("residual")).is_fused
    assert "it is not used" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("could not create a primitive"), ValueError("odd"), IndexError("odd")])
def test_a_fast_path_that_fails_is_not_used_and_warned_about(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*given: Any) -> None:
        raise error

    monkeypatch.setattr(FusedNetwork, "prepare", failing)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert not evaluator(trained("residual")).is_fused
    assert caplog.messages == [f"the fused float32 path fails on this network: {error}"]


# -------------------------------------------------------------------------------- workers, kept activations and bounds

SHARED = pytest.mark.skipif(not can_fork(), reason="worker processes are forked, which only Linux does well")


def many_masks(network: nn.Module) -> PackedMasks:
    """Parents, and children that differ from them in the last layers only, some of them twice."""
    layout, rng = WeightUnits.of(network), np.random.default_rng(5)
    rows = unpacked(some_masks(network))
    for parent in (2, 4, 5):
        for first in (layout.n_groups - 1, layout.n_groups - 2, layout.n_groups // 2):
            child = rows[parent].copy()
            later = np.arange(layout.n_weights) >= layout.offsets[first]
            child[later] ^= rng.random(int(later.sum())) < 0.1
            rows.append(child)
    return PackedMasks.pack(np.array([*rows, rows[4], rows[-1]]))


@SHARED
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_workers_nor_kept_activations_nor_the_order_change_a_bit(
    kind: str, repair: str, precision: str
) -> None:
    network = trained(kind)
    masks = many_masks(network)
    with evaluator(network, repair, precision=precision, objective="divergence") as alone:
        expected = alone(masks)
        assert alone.prefixes.n_slots == 0
    order = np.random.default_rng(1).permutation(len(masks))
    for workers, megabytes in ((1, 30), (2, 0), (2, 30), (3, 6)):
        options: dict[str, Any] = {"workers": workers, "prefix_cache_mb": megabytes}
        with evaluator(network, repair, precision=precision, objective="divergence", **options) as evaluate:
            assert np.array_equal(evaluate(masks), expected), options
            assert np.array_equal(evaluate(masks.select(order)), expected[order]), options
            if megabytes:
                assert evaluate.prefixes.hits > 10
            # One candidate is judged in this process, none at all in no process.
            assert np.array_equal(evaluate(masks.select([6])), expected[[6]])
            assert evaluate(masks.select([])).shape == (0,)
    assert multiprocessing.active_children() == []


@SHARED
@pytest.mark.parametrize("objective", ["error", "divergence"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_bounds_complete_candidates_get_the_same_and_others_a_lower_bound(kind: str, objective: str) -> None:
    network = trained(kind)
    masks = many_masks(network)
    with evaluator(network, objective=objective, batch_size=32) as alone:
        exact = alone(masks)
    rng = np.random.default_rng(2)
    settings: list[dict[str, Any]] = [{}, {"workers": 2, "prefix_cache_mb": 6}]
    for options in settings:
        with evaluator(network, objective=objective, batch_size=32, **options) as evaluate:
            for bounds in (exact, 0.5 * exact, rng.random(len(masks))):
                found, complete = evaluate.bounded(masks, bounds)
                assert complete.dtype == bool
                assert np.array_equal(found[complete], exact[complete])
                assert np.all(found[~complete] > bounds[~complete])
                # Sums of fewer terms may round otherwise in the last of sixteen places.
                assert np.all(found[~complete] <= exact[~complete] + 1e-12)
                assert np.all(complete[bounds >= exact])
            assert np.array_equal(evaluate(masks), exact)
            assert not evaluate.bounded(masks, 0.5 * exact)[1].all()


def test_a_bound_saves_looking_at_images() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network, batch_size=20), some_masks(network)
    evaluate(masks)
    assert evaluate.n_images_seen == len(masks) * N_JUDGED
    evaluate.n_images_seen = 0
    _, complete = evaluate.bounded(masks, np.full(len(masks), 0.3))
    assert 0 < complete.sum() < len(masks)
    assert evaluate.n_images_seen < 0.7 * len(masks) * N_JUDGED


@SHARED
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", ["NormUsedTwice", "Downsampled", "InPlace", "UsedTwice", "BiasAndNorm"])
def test_kept_activations_change_nothing_for_odd_networks_either(name: str, repair: str) -> None:
    network = made(architectures.ARCHITECTURES[name])
    masks = many_masks(network)
    expected = evaluator(network, repair, objective="divergence")(masks)
    evaluate = evaluator(network, repair, objective="divergence", prefix_cache_mb=30)
    assert np.array_equal(evaluate(masks), expected)
    assert evaluate.prefixes.hits > 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=SHARED)])
def test_after_an_error_the_evaluator_can_be_used_again(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained("residual")
    masks = many_masks(network)
    with evaluator(network, workers=workers, prefix_cache_mb=30) as evaluate:
        expected = evaluate(masks)
        evaluate.close()
        answer = FusedNetwork.answer

        def failing(self: FusedNetwork, *given: Any) -> Tensor:
            if torch.equal(self._pruned, torch.zeros_like(self._pruned)):
                raise RuntimeError("broken on purpose")
            return answer(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(FusedNetwork, "answer", failing)
            with pytest.raises(RuntimeError, match="broken on purpose"):
                evaluate(masks)
        assert multiprocessing.active_children() == []
        assert np.array_equal(evaluate(masks), expected)


@SHARED
def test_a_worker_that_is_killed_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    network = trained("residual")
    masks = many_masks(network)
    with evaluator(network, workers=2, prefix_cache_mb=30) as evaluate:
        expected = evaluate(masks)
        assert evaluate._pool is not None
        os.kill(evaluate._pool.pids[1], signal.SIGKILL)
        assert np.array_equal(evaluate(masks), expected)
    assert "a worker died (signal SIGKILL)" in caplog.text


def test_candidates_that_answer_nan_get_the_worst_objectives() -> None:
    network = made(architectures.Plain)
    layout = WeightUnits.of(network)

    class Fragile(nn.Module):
        """Divides by a weight, so that without it nothing is left but NaN."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = made(architectures.Plain), nn.Linear(1, 1, bias=False)
            self.scale.weight.data.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            # 0/0 where the weight is pruned.
            return self.inner(x) * (self.scale.weight[0, 0] / self.scale.weight[0, 0])

    masks = np.ones((2, layout.n_weights + 1), dtype=bool)
    masks[1, -1] = False
    for objective in ("error", "divergence"):
        for batch_size in (300, 64):
            evaluate = evaluator(Fragile(), "none", objective=objective, batch_size=batch_size)
            assert evaluate.is_fused
            found, complete = evaluate.bounded(PackedMasks.pack(masks), np.full(2, math.inf))
            assert found[0] < 1
            assert found[1] == 1
            assert complete.all()


@pytest.mark.parametrize("workers", [0, -1])
def test_at_least_one_process_judges(workers: int) -> None:
    assert evaluator(trained("residual"), workers=workers).n_workers == 1


def test_the_number_of_torch_s_threads_stays_what_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate = evaluator(trained("residual"))
        evaluate(some_masks(trained("residual")))
        evaluate.build(some_masks(trained("residual")).unpack(3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- re-fitted weights

RECONSTRUCTED = ("residual", "foreign")


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
        reconstruction=Reconstruction(network, layout, statistics),
    )
    plain.prepare(torch.from_numpy(mask))
    return plain


@pytest.mark.parametrize("kind", RECONSTRUCTED)
def test_with_repair_reconstruct_the_re_fitted_networks_are_judged(kind: str) -> None:
    network, (images, labels) = trained(kind), judged()
    masks = some_masks(network)
    evaluate = evaluator(network, "reconstruct")
    assert evaluate.is_fused
    scores, bare = evaluate.score(masks), evaluator(network, "batchnorm").score(masks)
    for i in range(len(masks)):
        plain = re_fitted(network, masks.unpack(i))
        with torch.inference_mode():
            dense, logits = network(images).double().log_softmax(1), plain.answer(images)
            kl = (dense.exp() * (dense - logits.double().log_softmax(1))).sum(1).mean()
        assert abs(scores.error[i] - top1_error(logits, labels)) <= 1.01 / N_JUDGED
        assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=2e-3)
    # The full and the empty mask leave nothing to fit; of the others the error falls.
    assert scores.error[2:].mean() < bare.error[2:].mean() - 0.02


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
            _, states, scores = evaluate.finish(masks)
        assert (
            "finished networks keep the weights that each layer was given on the dense network's inputs" in caplog.text
        )
        np.testing.assert_allclose(scores.error, expected.error, rtol=0, atol=1.01 / N_JUDGED)
        assert evaluate.reselect(masks) is masks
    state = re_fitted(network, masks.unpack(5)).network.state_dict()
    for key, value in state.items():
        # The same in another memory layout.
        torch.testing.assert_close(states[5][key], value, rtol=1e-3, atol=1e-4)


@SHARED
@pytest.mark.parametrize("kind", [*RECONSTRUCTED, "UsedTwice"])
def test_re_fitted_networks_are_judged_the_same_by_any_process_from_any_activations(kind: str) -> None:
    network = trained(kind) if kind in KINDS else made(architectures.ARCHITECTURES[kind])
    masks = many_masks(network)
    with evaluator(network, "reconstruct", objective="divergence") as alone:
        expected = alone(masks)
        assert np.array_equal(alone(masks), expected)
    order = np.random.default_rng(1).permutation(len(masks))
    for workers, megabytes in ((1, 30), (2, 0), (2, 30)):
        options: dict[str, Any] = {"workers": workers, "prefix_cache_mb": megabytes}
        with evaluator(network, "reconstruct", objective="divergence", **options) as evaluate:
            assert np.array_equal(evaluate(masks), expected), options
            evaluate.precompute(masks.select([0, 3, 5]))
            assert np.array_equal(evaluate(masks.select(order)), expected[order]), options
            if megabytes:
                assert evaluate.prefixes.hits > 0
    assert multiprocessing.active_children() == []


def test_what_is_computed_ahead_is_not_solved_again() -> None:
    network = trained("residual")
    masks = some_masks(network).select([3, 4, 5])
    evaluate = evaluator(network, "reconstruct")
    assert evaluate.reconstruction is not None
    evaluate.precompute(masks)
    solved = evaluate.reconstruction.n_solved
    evaluate(masks)
    assert evaluate.reconstruction.n_solved == solved
    # Without re-fitting there is nothing to do.
    evaluator(network, "batchnorm").precompute(masks)


def test_given_statistics_and_damping_are_used() -> None:
    network = trained("residual")
    layout, masks = WeightUnits.of(network), some_masks(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    found = evaluator(network, "reconstruct", objective="divergence", statistics=statistics)
    collected = evaluator(network, "reconstruct", objective="divergence")
    assert found.statistics is statistics
    assert np.array_equal(found(masks), collected(masks))
    damped = evaluator(network, "reconstruct", objective="divergence", statistics=statistics, damping=1e4)
    bare = evaluator(network, "batchnorm", objective="divergence")
    assert damped.reconstruction is not None
    kept = torch.from_numpy(masks.unpack(3))
    for name, weight in damped.reconstruction(kept).items():
        # Held so tightly, the kept weights hardly move.
        part = torch.from_numpy(layout.split(masks.unpack(3))[name].copy())
        torch.testing.assert_close(weight, network.get_parameter(name).detach() * part, rtol=0, atol=2e-3)
    assert np.abs(found(masks) - bare(masks)).max() > 0.1
    assert bare.reconstruction is None
    assert bare.statistics == {}


def test_layers_that_are_excluded_keep_their_weights_when_networks_are_finished() -> None:
    network = trained("residual")
    images, labels = judged()
    layout = WeightUnits.of(network, ["conv1.weight", "linear.weight"])
    evaluate = PopulationEvaluator(
        network, layout, images, labels, repair="reconstruct", calibration_images=calibration(), precision="float32"
    )
    built = evaluate.build(magnitude_mask(network, layout, 0.5))
    for name in ("conv1.weight", "linear.weight"):
        assert torch.equal(built.get_parameter(name), network.get_parameter(name))


@pytest.mark.parametrize("repair", ["none", "batchnorm", "reconstruct"])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=SHARED)])
def test_finished_networks_are_the_built_ones_and_measured_by_hand(repair: str, workers: int) -> None:
    network, (images, labels) = trained("foreign"), judged()
    masks = some_masks(network).select([0, 3, 5, 7])
    with torch.inference_mode():
        dense = network(images).double().log_softmax(1)
    with evaluator(network, repair, workers=workers) as evaluate:
        evaluate(masks)
        same, states, scores = evaluate.finish(masks)
        assert np.array_equal(same.words, masks.words)
        built = [evaluate.build(masks.unpack(i)) for i in range(len(masks))]
        assert scores.error.shape == scores.divergence.shape == (4,)
        for i, (state, one) in enumerate(zip(states, built, strict=True)):
            assert state.keys() == one.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in one.state_dict().items())
            assert evaluate.measure(one) == (scores.error[i], scores.divergence[i])
            with torch.inference_mode():
                logits = one(images)
            kl = (dense.exp() * (dense - logits.double().log_softmax(1))).sum(1).mean()
            assert scores.error[i] == pytest.approx(top1_error(logits, labels), abs=1.01 / N_JUDGED)
            assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=1e-4)
            for name, kept in evaluate.layout.split(masks.unpack(i)).items():
                assert not bool(state[name][~torch.from_numpy(kept)].any())
        # A network can be measured and used further.
        assert torch.equal(built[1].state_dict()["head.bias"], states[1]["head.bias"])
        assert evaluate.finish(masks.select([]))[1] == []
    assert multiprocessing.active_children() == []


@SHARED
def test_two_processes_finish_and_choose_anew_as_one_does() -> None:
    network = trained("residual")
    masks = some_masks(network)
    found = []
    for workers in (1, 2):
        with evaluator(network, "reconstruct", workers=workers) as evaluate:
            _, states, scores = evaluate.finish(masks)
            found.append((states, scores, evaluate.reselect(masks)))
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
    with evaluator(network, "reconstruct", workers=workers, objective=objective) as evaluate:
        anew = evaluate.reselect(masks)
        (_, as_found, before), (_, chosen, after) = evaluate.finish(masks), evaluate.finish(anew)
        found, states, scores = evaluate.finish(masks, reselect=True)
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


@pytest.mark.parametrize("changed", [{"repair": "batchnorm"}, {"repair": "reconstruct", "refine": False}])
def test_nothing_is_chosen_anew_where_networks_are_not_refined(changed: dict[str, Any]) -> None:
    network = trained("residual")
    masks = some_masks(network)
    evaluate = evaluator(network, **changed)
    assert np.array_equal(evaluate.finish(masks, reselect=True)[0].words, masks.words)


def test_finished_networks_answer_more_like_the_dense_one_than_judged_ones() -> None:
    network = trained("residual")
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, density) for density in (0.7, 0.5, 0.3)]))
    evaluate = evaluator(network, "reconstruct")
    assert evaluate.finish(masks)[2].divergence.mean() < evaluate.score(masks).divergence.mean()


def test_a_re_fitted_network_can_be_trained_further_and_leaves_the_evaluator_as_it_was() -> None:
    network, (images, labels) = trained("foreign"), judged()
    evaluate, masks = evaluator(network, "reconstruct"), some_masks(network)
    before = evaluate(masks)
    built = evaluate.build(masks.unpack(5)).train()
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
def test_in_bfloat16_re_fitted_networks_are_judged_about_the_same_and_built_alike(kind: str) -> None:
    network = trained(kind)
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, d) for d in (1.0, 0.8, 0.6, 0.4)]))
    exact, rough = (evaluator(network, "reconstruct", precision=precision) for precision in ("float32", "bfloat16"))
    assert rough.precision == "bfloat16"
    np.testing.assert_allclose(rough.score(masks).error, exact.score(masks).error, rtol=0, atol=0.03)
    np.testing.assert_allclose(rough.score(masks).divergence, exact.score(masks).divergence, rtol=0, atol=0.03)
    assert states_equal(exact.build(masks.unpack(3)), rough.build(masks.unpack(3)))


def test_a_search_leaves_a_re_fitting_evaluator_s_answers_as_they_were() -> None:
    network = trained("residual")
    evaluate, masks = evaluator(network, "reconstruct"), some_masks(network)
    once = evaluate(masks)
    evaluate.reselect(masks.select([3]))
    evaluate.finish(masks.select([4]))
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
    built = on_gpu.build(masks.unpack(5))
    assert {parameter.device.type for parameter in built.parameters()} == {"cpu"}
