"""What is measured of answers: error and divergence."""

import math

import pytest
import torch
from evaluators import search_split
from paretoprune.evaluation.metrics import divergence, predict, top1_error
from small_networks import (
    trained,
)


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


def test_predict_leaves_out_no_image_and_keeps_their_order() -> None:
    network, (images, _) = trained("foreign"), search_split()
    with torch.no_grad():
        torch.testing.assert_close(predict(network, images, 7), network(images), rtol=1e-4, atol=1e-4)
