"""Whole candidates as one computation: step by step on the CPU as the evaluator finds them, recorded on a GPU."""

import logging

import numpy as np
import pytest
import torch
from evaluators import evaluator
from paretoprune.evaluation.candidate import CandidateEvaluator
from paretoprune.evaluation.captured import CapturedNetwork
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.metrics import divergence_of
from paretoprune.evaluation.prefixes import PrefixCache
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from small_networks import calibration, digits, some_masks, trained
from torch import Tensor

REPAIRS = ("none", "batchnorm")
KINDS = ("residual", "foreign")
N_IMAGES = 200


def fused(kind: str, repair: str, dtype: torch.dtype = torch.float32) -> tuple[FusedNetwork, Tensor, Tensor, Tensor]:
    """A fused network, images, their labels and the dense network's log-probabilities."""
    network, (images, labels) = trained(kind), digits()
    placed, calibrating = (
        part.to(dtype).contiguous(memory_format=torch.channels_last)
        for part in (images[1000 : 1000 + N_IMAGES], calibration())
    )
    quick = FusedNetwork(network, WeightUnits.of(network), placed[:2], repair=repair, calibration_images=calibrating)
    with torch.inference_mode():
        quick.prepare(torch.ones(quick.layout.n_weights, dtype=torch.bool))
        dense = quick.answer(placed).double().log_softmax(1)
    return quick, placed, labels[1000 : 1000 + N_IMAGES], dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_what_the_evaluate_finds(kind: str, repair: str, dtype: torch.dtype) -> None:
    quick, images, labels, dense = fused(kind, repair, dtype)
    masks = some_masks(trained(kind))
    errors, kls = CapturedNetwork(quick, images, 64).losses(masks.words, labels, dense)
    assert errors.shape == kls.shape == (len(masks),)
    nothing = PrefixCache([], quick.layout, N_IMAGES, 0, dtype, 0)
    evaluate = CandidateEvaluator(quick, images, labels, dense, objective="error", batch_size=64, prefixes=nothing)
    evaluations = [evaluate(words) for words in masks.words]
    assert errors.tolist() == [evaluation.error for evaluation in evaluations]
    assert [divergence_of(float(kl)) for kl in kls] == [evaluation.divergence for evaluation in evaluations]


def test_masks_that_may_not_be_written_to_can_be_evaluated() -> None:
    quick, images, labels, dense = fused("residual", "none")
    words = some_masks(trained("residual")).words.copy()
    expected = CapturedNetwork(quick, images, 64).losses(words, labels, dense)
    words.flags.writeable = False
    found = CapturedNetwork(quick, images, 64).losses(words, labels, dense)
    assert np.array_equal(found, expected)


def test_no_masks_have_no_losses() -> None:
    quick, images, labels, dense = fused("residual", "none")
    nothing = PackedMasks.empty(quick.layout.n_weights).words
    errors, kls = CapturedNetwork(quick, images, 64).losses(nothing, labels, dense)
    assert errors.shape == kls.shape == (0,)


class Evaluators:
    """The same evaluator on the CPU and on the GPU."""

    def __init__(self, kind: str, repair: str, precision: str = "float32") -> None:
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        self.network = trained(kind)
        self.cpu, self.gpu = (
            evaluator(self.network, repair, device=device, precision=precision) for device in ("cpu", "cuda")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_finds_what_the_cpu_finds(
    kind: str, repair: str, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "paretoprune"):
        both = Evaluators(kind, repair, precision)
    assert caplog.messages == []
    assert both.gpu._captured is not None
    assert both.gpu._captured._graph is not None
    # Without the mask that keeps a hundredth: repair magnifies what rounding leaves of its constant channels.
    masks = some_masks(both.network)
    expected, found = both.cpu.score(masks), both.gpu.score(masks)
    # TF32 in convolutions keeps ten bits, bfloat16 eight: a few images in three hundred may turn.
    allowed = 0.02 if precision == "float32" else 0.04
    usable = [0, 2, 3, 4, 5]
    np.testing.assert_allclose(found.error[usable], expected.error[usable], rtol=0, atol=allowed)
    np.testing.assert_allclose(found.divergence[usable], expected.divergence[usable], rtol=0, atol=allowed)
    # Replays leave nothing behind for one another.
    order = np.random.default_rng(0).permutation(len(masks))
    assert np.array_equal(both.gpu(masks.select(order)), both.gpu(masks)[order])


@pytest.mark.gpu
def test_on_a_gpu_every_candidate_is_evaluated_on_all_images() -> None:
    both = Evaluators("residual", "batchnorm")
    masks = some_masks(both.network)
    found, complete = both.gpu.bounded(masks, np.zeros(len(masks)))
    assert complete.all()
    assert np.array_equal(found, both.gpu(masks))
