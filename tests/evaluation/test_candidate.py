"""Evaluating one candidate: what a bound may and may not change, the order of images, and running out of memory."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from evaluators import evaluator
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.devices import out_of_memory
from paretoprune.evaluation.candidate import CandidateEvaluator, Evaluation
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.metrics import divergence_of, image_losses
from paretoprune.evaluation.prefixes import PrefixCache
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from small_networks import calibration, digits, some_masks, trained
from torch import Tensor

N_IMAGES = 200
# As torch raises it where the system gives it no memory.
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte. "
)
NO_MEMORY += "Error code 12 (Cannot allocate memory), not enough memory: you tried to allocate 1 byte."


def placed(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def evaluator_of(
    objective: str = "error", batch_size: int = 16, kind: str = "residual", repair: str = "none"
) -> CandidateEvaluator:
    network, (images, labels) = trained(kind), digits()
    images = placed(images[1000 : 1000 + N_IMAGES])
    quick = FusedNetwork(
        network, WeightUnits.of(network), images[:2], repair=repair, calibration_images=placed(calibration())
    )
    with torch.inference_mode():
        quick.prepare(torch.ones(quick.layout.n_weights, dtype=torch.bool))
        dense = quick.answer(images).double().log_softmax(1)
    nothing = PrefixCache([], quick.layout, N_IMAGES, 0, torch.float32, 0)
    return CandidateEvaluator(
        quick,
        images,
        labels[1000 : 1000 + N_IMAGES],
        dense,
        objective=objective,
        batch_size=batch_size,
        prefixes=nothing,
    )


def score(evaluation: Evaluation, objective: str) -> float:
    return evaluation.error if objective == "error" else evaluation.divergence


@pytest.mark.parametrize("objective", ["error", "divergence"])
@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_a_bound_stops_only_what_lies_above_it(kind: str, objective: str) -> None:
    evaluate_one, masks = evaluator_of(objective, kind=kind), some_masks(trained(kind)).words
    n_stopped = 0
    for words in masks:
        truth = evaluate_one(words)
        assert truth.complete
        assert truth.n_seen == N_IMAGES
        exact = score(truth, objective)
        for bound in (0.0, 0.01, 0.3 * exact, 0.99 * exact, exact, 1.01 * exact, 1.0, math.inf):
            found = evaluate_one(words, bound)
            if found.complete:
                assert found == truth
            else:
                n_stopped += 1
                assert bound < score(found, objective) <= exact
                assert found.error <= truth.error
                # Sums of fewer terms may round otherwise in the last of sixteen places.
                assert found.divergence <= truth.divergence + 1e-12
                assert found.n_seen < N_IMAGES
            if bound >= exact:
                assert found.complete
    assert n_stopped > len(masks)


def test_a_candidate_far_above_its_bound_is_stopped_after_one_batch() -> None:
    evaluate_one = evaluator_of(batch_size=20)
    nothing = np.zeros_like(some_masks(trained("residual")).words[0])
    assert evaluate_one(nothing, 0.05).n_seen == 20


def test_the_last_batch_is_never_looked_at_for_nothing() -> None:
    # Stopping after all images have been seen saves nothing, and would hide that the score is exact.
    evaluate_one = evaluator_of(batch_size=N_IMAGES)
    assert all(evaluate_one(words, 0.0).complete for words in some_masks(trained("residual")).words)


def test_evaluations_count_wrong_answers_and_mean_divergence_over_all_images() -> None:
    evaluate_one, mask = evaluator_of(), some_masks(trained("residual"))
    evaluation = evaluate_one(mask.words[5])
    with torch.inference_mode():
        evaluate_one.network.prepare(torch.from_numpy(mask.unpack(5)))
        logits = torch.cat([evaluate_one.network.answer(batch) for batch in evaluate_one.images.split(16)])
    assert evaluation.error == int((logits.argmax(1) != evaluate_one.labels).sum()) / N_IMAGES
    dense = evaluate_one.dense_log_probabilities
    kl = (dense.exp() * (dense - logits.double().log_softmax(1))).sum(1).mean().item()
    # Float64 sums in another order.
    assert evaluation.divergence == pytest.approx(1 - math.exp(-kl), rel=1e-12)


@pytest.mark.parametrize("objective", ["error", "divergence"])
def test_the_evaluator_has_the_hardest_images_first(objective: str) -> None:
    network, (images, labels) = trained("residual"), digits()
    images, labels = images[1000:1300], labels[1000:1300]
    evaluate = evaluator(network, "none", objective=objective, batch_size=10)
    ordered, ordered_labels = evaluate.ordered.images, evaluate.ordered.labels
    # The same images with the same labels in another order.
    found = {
        (tuple(image.flatten().tolist()), label) for image, label in zip(ordered, ordered_labels.tolist(), strict=True)
    }
    assert found == {
        (tuple(image.flatten().tolist()), label) for image, label in zip(images, labels.tolist(), strict=True)
    }
    assert not torch.equal(ordered_labels, labels)
    # What a bad network gets wrong comes early: under a tight bound it is stopped sooner than in the given order.
    masks = PackedMasks(some_masks(network).words[5:6], evaluate.layout.n_weights)
    exact = float(evaluate(masks)[0])
    evaluate.n_images_seen = 0
    evaluate.bounded(masks, np.array([0.5 * exact]))
    assert evaluate.n_images_seen <= 0.6 * 300
    given_order = CandidateEvaluator(
        evaluate.network,
        placed(images),
        labels,
        evaluate.ordered.dense_log_probabilities[[find(ordered, image) for image in images]],
        objective=objective,
        batch_size=10,
        prefixes=evaluate.prefixes,
    )
    assert evaluate.n_images_seen < given_order(masks.words[0], 0.5 * exact).n_seen


def find(images: Tensor, image: Tensor) -> int:
    return int((images == image).flatten(1).all(1).nonzero()[0, 0])


class Scarce:
    """A network's answer where only so many images fit into memory."""

    def __init__(self, network: Any, largest: int, error: Exception) -> None:
        self.answer, self.largest, self.error = network.answer, largest, error
        self.sizes: list[int] = []

    def __call__(self, images: Tensor, *rest: Any) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.largest:
            raise self.error
        answer: Tensor = self.answer(images, *rest)
        return answer


@pytest.mark.parametrize("error", [RuntimeError(NO_MEMORY), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_where_memory_runs_out_batches_are_halved_with_a_warning(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = some_masks(trained("residual")).words[4]
    evaluate_one = evaluator_of(batch_size=100)
    expected = evaluator_of(batch_size=25)(words)
    scarce = Scarce(evaluate_one.network, 30, error)
    monkeypatch.setattr(evaluate_one.network, "answer", scarce)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert evaluate_one(words) == expected
    told = "memory ran out; evaluating the candidate again in batches of {} images"
    assert caplog.messages == [told.format(n) for n in (50, 25)]
    assert scarce.sizes == [100, 50] + 8 * [25]
    # The next candidate begins anew, so that all are evaluated alike wherever there is memory.
    assert evaluate_one.batch_size == 100


def test_memory_that_does_not_suffice_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_one = evaluator_of(batch_size=4)
    monkeypatch.setattr(evaluate_one.network, "answer", Scarce(evaluate_one.network, 0, RuntimeError(NO_MEMORY)))
    with pytest.raises(RuntimeError, match="not enough memory"):
        evaluate_one(some_masks(trained("residual")).words[4])


def test_other_errors_are_nobody_s_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_one = evaluator_of()
    scarce = Scarce(evaluate_one.network, 0, RuntimeError("something else"))
    monkeypatch.setattr(evaluate_one.network, "answer", scarce)
    with pytest.raises(RuntimeError, match="something else"):
        evaluate_one(some_masks(trained("residual")).words[4])
    assert len(scarce.sizes) == 1
    assert evaluate_one.batch_size == 16


def test_lack_of_memory_is_told_from_other_errors() -> None:
    assert all(out_of_memory(error) for error in (MemoryError(), RuntimeError(NO_MEMORY), torch.OutOfMemoryError("x")))
    assert not any(out_of_memory(error) for error in (RuntimeError("memory format"), ValueError("not enough memory")))


# ----------------------------------------------------------------------------------------------------------- losses


@given(st.integers(1, 12), st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_losses_are_zero_for_the_dense_answers_and_never_negative(n: int, n_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, other = 5 * torch.randn(2, n, n_classes, generator=generator)
    labels = dense.argmax(1)
    wrong, kl = image_losses(dense, labels, dense.double().log_softmax(1))
    assert not bool(wrong.any())
    # Float64 sums of a few numbers of size ten.
    assert float(kl.max()) <= 1e-12
    wrong, kl = image_losses(other, labels, dense.double().log_softmax(1))
    assert torch.equal(wrong, other.argmax(1) != labels)
    assert float(kl.min()) >= 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_not_finite_is_wrong_and_infinitely_far(bad: float) -> None:
    logits, dense = torch.tensor([[5.0, 0.0], [bad, 0.0], [1.0, bad]]), torch.zeros(3, 2).double().log_softmax(1)
    wrong, kl = image_losses(logits, torch.tensor([0, 0, 0]), dense)
    assert wrong.tolist() == [False, True, True]
    assert math.isfinite(kl[0])
    assert kl[1:].tolist() == [math.inf, math.inf]


def test_divergence_is_one_less_the_exponential_and_one_at_most() -> None:
    assert divergence_of(0.0) == 0
    assert divergence_of(math.log(2)) == pytest.approx(0.5, rel=1e-15)
    assert divergence_of(math.inf) == divergence_of(math.nan) == divergence_of(1000.0) == 1
    assert divergence_of(1e-18) == 1e-18
