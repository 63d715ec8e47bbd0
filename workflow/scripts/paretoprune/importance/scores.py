"""Importance: one score per prunable weight, higher = keep.

A score says what matters, not how much to keep where (see `importance.allocation`). Each is an entry of `SCORES`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.copies import copied
from paretoprune.importance.curvature import curvature_scores
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics, derivatives_needed
from paretoprune.importance.registry import SCORE_NEEDS
from paretoprune.masks.units import WeightUnits


@dataclass(frozen=True)
class Evidence:
    """What scores are worked out from.

    Attributes:
        network: The dense network.
        layout: Its prunable tensors.
        images: Training images (n, channels, height, width), normalised.
        labels: Their labels, int64 (n,).
        seed: For scores that draw at random.
        statistics: Of the layers, by tensor name; empty for scores that do not need them.
    """

    network: nn.Module
    layout: WeightUnits
    images: Tensor
    labels: Tensor
    seed: int
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The prunable tensors by name, float32, on the CPU."""
        parameters = dict(self.network.named_parameters())
        return {name: parameters[name].detach().float().cpu() for name in self.layout.names}


@dataclass(frozen=True)
class Score:
    """One importance score.

    Attributes:
        compute: Gives each prunable tensor scores of its shape, by name: float32, at least 0, higher = keep.
        needs: What it looks at beside the weights, see `importance.registry`.
    """

    compute: Callable[[Evidence], dict[str, Tensor]]
    needs: frozenset[str] = frozenset()


def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """|w|."""
    return {name: weight.abs() for name, weight in evidence.weights.items()}


def layer_adaptive_magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """LAMP: w² divided by the sum of the squares of all weights of its layer that are at least as large.

    Source:
        Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, equation 3.
    """
    scores = {}
    for name, weight in evidence.weights.items():
        squares = weight.double().square().flatten()
        order = squares.argsort(descending=True, stable=True)
        score = torch.empty_like(squares)
        score[order] = squares[order] / squares[order].cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
        scores[name] = score.float().reshape(weight.shape)
    return scores


def random(evidence: Evidence) -> dict[str, Tensor]:
    """Uniform noise, the baseline that knows nothing."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return {
        name: torch.rand(shape, generator=generator)
        for name, shape in zip(evidence.layout.names, evidence.layout.shapes, strict=True)
    }


def _gradients(evidence: Evidence) -> Iterator[list[Tensor]]:
    """Gradient of the cross-entropy with respect to each prunable tensor, image by image, in evaluation mode.

    One image at a time is slower than vectorising over images, but works for every network.
    """
    if not len(evidence.images):
        raise ValueError("gradients need images, found none; raise `importance.images`")
    network = copied(evidence.network)
    network.eval()
    parameters = dict(network.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    weights = [parameters[name].requires_grad_(True) for name in evidence.layout.names]
    for image, label in zip(evidence.images, evidence.labels, strict=True):
        with derivatives_needed():
            loss = functional.cross_entropy(network(image[None]), label[None])
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        yield [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def taylor(evidence: Evidence) -> dict[str, Tensor]:
    """|w g| with g the gradient of the mean loss: the first-order change of the loss when the weight goes.

    Source:
        Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, equation 8 (there squared).
    """
    total = [torch.zeros(shape) for shape in evidence.layout.shapes]
    for gradients in _gradients(evidence):
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.cpu()
    weights, n = evidence.weights, len(evidence.images)
    return {name: (weights[name] * sum_ / n).abs() for name, sum_ in zip(evidence.layout.names, total, strict=True)}


def fisher(evidence: Evidence) -> dict[str, Tensor]:
    """w² E[g²] with g the gradient of one image's loss: twice the second-order change of the mean loss.

    The diagonal empirical Fisher stands in for the curvature.

    Source:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 8.
    """
    total = [torch.zeros(shape) for shape in evidence.layout.shapes]
    for gradients in _gradients(evidence):
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.cpu().square()
    weights, n = evidence.weights, len(evidence.images)
    return {name: weights[name].square() * sum_ / n for name, sum_ in zip(evidence.layout.names, total, strict=True)}


def curvature(evidence: Evidence) -> dict[str, Tensor]:
    """OBS saliency times sensitivity: what the loss of each weight alone costs, the others being re-fitted.

    Source:
        LeCun et al., "Optimal brain damage", 1990, for the second-order saliency; Hassibi and Stork, "Second order
        derivatives for network pruning: Optimal brain surgeon", 1993, equation 5, for the re-fit of the others.
    """
    return curvature_scores(evidence.weights, evidence.statistics, exact=False)


def elimination(evidence: Evidence) -> dict[str, Tensor]:
    """OBS order: what the loss of each weight adds when the weights of a row go one by one, the cheapest first.

    Source:
        Hassibi and Stork, 1993; Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022, algorithm 1, for the
        exact order row by row.
    """
    return curvature_scores(evidence.weights, evidence.statistics, exact=True)


SCORES: dict[str, Score] = {
    name: Score(compute, SCORE_NEEDS[name])
    for name, compute in {
        "magnitude": magnitude,
        "taylor": taylor,
        "fisher": fisher,
        "lamp": layer_adaptive_magnitude,
        "random": random,
        "curvature": curvature,
        "elimination": elimination,
    }.items()
}


def compute_importance(
    score: str,
    network: nn.Module,
    layout: WeightUnits,
    images: Tensor,
    labels: Tensor,
    seed: int,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> dict[str, Tensor]:
    """Score every prunable weight.

    Args:
        score: A key of `SCORES`.
        network: The dense network.
        layout: Its prunable tensors.
        images: Training images (n, channels, height, width), normalised; only scores with gradients look at them.
        labels: Their labels, int64 (n,).
        seed: For scores that draw at random.
        statistics: For scores that need them, of the layers; None to collect them on the images.

    Returns:
        Tensor name to non-negative float32 scores of the tensor's shape.

    Raises:
        ValueError: There is no such score, it needs images and there are none, or it is not finite everywhere.
    """
    if score not in SCORES:
        raise ValueError(f"expected an importance score among {', '.join(SCORES)}, found '{score}'")
    if "statistics" not in SCORES[score].needs:
        statistics = {}
    elif statistics is None:
        statistics = collect_statistics(network, layout, images, seed=seed)
    scores = SCORES[score].compute(Evidence(network, layout, images, labels, seed, statistics))
    for name, tensor in scores.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"importance '{score}' is not finite in '{name}'; check the checkpoint for NaN and the loss for "
                "overflow"
            )
    return scores


def flat_scores(scores: Mapping[str, Tensor], layout: WeightUnits) -> np.ndarray:
    """Scores per tensor as one float32 array (n_weights,) in mask order."""
    return layout.flatten({name: tensor.numpy() for name, tensor in scores.items()})
