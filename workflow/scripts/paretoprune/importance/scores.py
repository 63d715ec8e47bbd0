"""Importance: one score per prunable weight, higher = keep.

A score says what matters, not how much to keep where (see `importance.allocation`). Each is an entry of `SCORES`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.importance.curvature import curvature_scores
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics
from paretoprune.masks.units import WeightUnits


def _weights(network: nn.Module, layout: WeightUnits) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    return {name: parameters[name].detach().float().cpu() for name in layout.names}


def magnitude(network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """|w|."""
    return {name: weight.abs() for name, weight in _weights(network, layout).items()}


def layer_adaptive_magnitude(
    network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor, seed: int
) -> dict[str, Tensor]:
    """LAMP: w² divided by the sum of the squares of all weights of its layer that are at least as large.

    Source:
        Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, equation 3.
    """
    scores = {}
    for name, weight in _weights(network, layout).items():
        squares = weight.double().square().flatten()
        order = squares.argsort(descending=True, stable=True)
        score = torch.empty_like(squares)
        score[order] = squares[order] / squares[order].cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
        scores[name] = score.float().reshape(weight.shape)
    return scores


def random(network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Uniform noise, the baseline that knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def _gradients(network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor) -> Iterator[list[Tensor]]:
    """Gradient of the cross-entropy with respect to each prunable tensor, image by image, in evaluation mode.

    One image at a time is slower than vectorising over images, but works for every network.
    """
    if not len(images):
        raise ValueError("gradients need images, found none; raise `importance.images`")
    network = copy.deepcopy(network).eval()
    parameters = dict(network.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    weights = [parameters[name].requires_grad_(True) for name in layout.names]
    for image, label in zip(images, labels, strict=True):
        loss = functional.cross_entropy(network(image[None]), label[None])
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        yield [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def taylor(network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """|w g| with g the gradient of the mean loss: the first-order change of the loss when the weight goes.

    Source:
        Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, equation 8 (there squared).
    """
    total = [torch.zeros(shape) for shape in layout.shapes]
    for gradients in _gradients(network, layout, images, labels):
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.cpu()
    weights = _weights(network, layout)
    return {name: (weights[name] * sum_ / len(images)).abs() for name, sum_ in zip(layout.names, total, strict=True)}


def fisher(network: nn.Module, layout: WeightUnits, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """w² E[g²] with g the gradient of one image's loss: twice the second-order change of the mean loss.

    The diagonal empirical Fisher stands in for the curvature.

    Source:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 8.
    """
    total = [torch.zeros(shape) for shape in layout.shapes]
    for gradients in _gradients(network, layout, images, labels):
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient.cpu().square()
    weights = _weights(network, layout)
    return {name: weights[name].square() * sum_ / len(images) for name, sum_ in zip(layout.names, total, strict=True)}


# What a score is given: the network, its prunable tensors, normalised training images, their labels, and a seed.
Score = Callable[[nn.Module, WeightUnits, Tensor, Tensor, int], dict[str, Tensor]]
SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "lamp": layer_adaptive_magnitude,
    "random": random,
}


# Scores that follow from layer statistics, and whether they take the exact order of elimination.
CURVATURE_SCORES = {"curvature": False, "elimination": True}


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
        score: A key of `SCORES` or of `CURVATURE_SCORES`.
        network: The dense network.
        layout: Its prunable tensors.
        images: Training images (n, channels, height, width), normalised; only scores with gradients look at them.
        labels: Their labels, int64 (n,).
        seed: For scores that draw at random.
        statistics: For scores by curvature, of the layers; None to collect them on the images.

    Returns:
        Tensor name to non-negative float32 scores of the tensor's shape.

    Raises:
        ValueError: There is no such score, it needs images and there are none, or it is not finite everywhere.
    """
    known = (*SCORES, *CURVATURE_SCORES)
    if score not in known:
        raise ValueError(f"expected an importance score among {', '.join(known)}, found '{score}'")
    if score in CURVATURE_SCORES:
        if statistics is None:
            statistics = collect_statistics(network, layout, images, seed=seed)
        scores = curvature_scores(_weights(network, layout), statistics, exact=CURVATURE_SCORES[score])
    else:
        scores = SCORES[score](network, layout, images, labels, seed)
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
