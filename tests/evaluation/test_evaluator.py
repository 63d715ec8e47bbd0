"""Evaluating masks: the evaluator against a naive loop, its purity and its two objectives."""

import copy
import math
import multiprocessing
import os
import signal
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import made
from evaluators import N_EVALUATED, SHARED, evaluator, finisher, many_masks, search_split
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Scores
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Refit
from small_networks import (
    calibration,
    magnitude_mask,
    n_hooks,
    naive_network,
    some_masks,
    states_equal,
    trained,
)
from torch import Tensor, nn

KINDS = ("residual", "foreign")
REPAIRS = ("none", "batchnorm")
RECONSTRUCTED = ("residual", "foreign")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluator_agrees_with_a_naive_loop_over_single_networks(kind: str, repair: str) -> None:
    network, (images, labels) = trained(kind), search_split()
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
        assert abs(scores.error[i] - n_wrong / N_EVALUATED) <= 1.01 / N_EVALUATED
        kl = (dense.exp() * (dense - logits.log_softmax(1).double())).sum(1).mean()
        # float32 logits of size ten are good to about 1e-6, and 1 - exp(-x) is no steeper than 1.
        assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=1e-4)
    assert np.array_equal(evaluate(masks), scores.error)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_masks_get_equal_objectives_whatever_was_evaluated_before(kind: str, repair: str) -> None:
    network = trained(kind)
    for objective in ("error", "divergence"):
        evaluate = evaluator(network, repair, objective=objective)
        masks = some_masks(network)
        once = evaluate(masks)
        assert np.array_equal(evaluate(masks), once)
        order = np.random.default_rng(3).permutation(len(masks))
        assert np.array_equal(evaluate(masks.select(order)), once[order])
        finisher(network, repair, refit=evaluate.refit).build(masks.unpack(1))
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
    finisher(network).build(some_masks(network).unpack(5))
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_the_full_mask_gets_the_dense_network_s_objectives() -> None:
    network, (images, labels) = trained("residual"), search_split()
    evaluate = evaluator(network)
    full = evaluate.score(PackedMasks.pack(np.ones((1, evaluate.layout.n_weights), dtype=bool)))
    assert evaluate.dense.error[0] == pytest.approx(top1_error(predict(network, images, 64), labels), abs=1.01 / 300)
    assert evaluate.dense.divergence[0] == 0
    assert full.error[0] == pytest.approx(evaluate.dense.error[0], abs=1.01 / N_EVALUATED)
    # Repaired statistics equal the trained ones up to float32 rounding.
    assert full.divergence[0] == pytest.approx(0, abs=1e-6)
    assert evaluate.n_classes == 10


def test_no_masks_give_no_losses() -> None:
    evaluate = evaluator(trained("residual"))
    assert evaluate(PackedMasks.empty(evaluate.layout.n_weights)).shape == (0,)


def test_the_size_of_batches_does_not_change_what_is_found() -> None:
    network = trained("foreign")
    masks = some_masks(network)
    whole, parts = (evaluator(network, batch_size=size).score(masks) for size in (N_EVALUATED, 7))
    # Kernels may sum batches of another size in another order: at most one image on the edge.
    np.testing.assert_allclose(parts.error, whole.error, rtol=0, atol=1.01 / N_EVALUATED)
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
    assert isinstance(evaluate.network, FusedNetwork)
    found = evaluate.network.compiled.network.get_buffer("norm.running_mean")
    assert found.dtype == torch.float32
    assert found.item() == torch.tensor(0.1 + 2**-9).item()


def test_three_dimensional_convolutions_can_be_evaluated() -> None:
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


def test_scores_give_the_objective_that_is_asked_for() -> None:
    scores = Scores(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    assert scores.objective("error").tolist() == [0.1, 0.2]
    assert scores.objective("divergence").tolist() == [0.3, 0.4]


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
            # One candidate is evaluated in this process, none at all in no process.
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
    assert evaluate.n_images_seen == len(masks) * N_EVALUATED
    evaluate.n_images_seen = 0
    _, complete = evaluate.bounded(masks, np.full(len(masks), 0.3))
    assert 0 < complete.sum() < len(masks)
    assert evaluate.n_images_seen < 0.7 * len(masks) * N_EVALUATED


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


def test_candidates_that_answer_nan_get_the_worst_loss() -> None:
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


def test_the_number_of_torch_s_threads_stays_what_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluate = evaluator(trained("residual"))
        evaluate(some_masks(trained("residual")))
        finisher(trained("residual")).build(some_masks(trained("residual")).unpack(3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize("kind", RECONSTRUCTED)
def test_with_repair_reconstruct_the_re_fitted_networks_are_evaluated(kind: str) -> None:
    network, (images, labels) = trained(kind), search_split()
    masks = some_masks(network)
    evaluate = evaluator(network, "reconstruct")
    assert evaluate.is_fused
    scores, bare = evaluate.score(masks), evaluator(network, "batchnorm").score(masks)
    for i in range(len(masks)):
        plain = re_fitted(network, masks.unpack(i))
        with torch.inference_mode():
            dense, logits = network(images).double().log_softmax(1), plain.answer(images)
            kl = (dense.exp() * (dense - logits.double().log_softmax(1))).sum(1).mean()
        assert abs(scores.error[i] - top1_error(logits, labels)) <= 1.01 / N_EVALUATED
        assert scores.divergence[i] == pytest.approx(1 - math.exp(-kl), abs=2e-3)
    # The full and the empty mask leave nothing to fit; of the others the error falls.
    assert scores.error[2:].mean() < bare.error[2:].mean() - 0.02


@SHARED
@pytest.mark.parametrize("kind", [*RECONSTRUCTED, "UsedTwice"])
def test_re_fitted_networks_are_evaluated_the_same_by_any_process_from_any_activations(kind: str) -> None:
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
    assert evaluate.refit is not None
    evaluate.precompute(masks)
    solved = evaluate.refit.n_solved
    evaluate(masks)
    assert evaluate.refit.n_solved == solved
    # Without re-fitting there is nothing to do.
    evaluator(network, "batchnorm").precompute(masks)


def test_given_statistics_and_damping_are_used() -> None:
    network = trained("residual")
    layout, masks = WeightUnits.of(network), some_masks(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    found = evaluator(network, "reconstruct", objective="divergence", statistics=statistics)
    collected = evaluator(network, "reconstruct", objective="divergence")
    assert found.refit is not None
    assert found.refit.statistics is statistics
    assert np.array_equal(found(masks), collected(masks))
    damped = evaluator(network, "reconstruct", objective="divergence", statistics=statistics, damping=1e4)
    bare = evaluator(network, "batchnorm", objective="divergence")
    assert damped.refit is not None
    kept = torch.from_numpy(masks.unpack(3))
    for name, weight in damped.refit(kept).items():
        # Held so tightly, the kept weights hardly move.
        part = torch.from_numpy(layout.split(masks.unpack(3))[name].copy())
        torch.testing.assert_close(weight, network.get_parameter(name).detach() * part, rtol=0, atol=2e-3)
    assert np.abs(found(masks) - bare(masks)).max() > 0.1
    assert bare.refit is None
