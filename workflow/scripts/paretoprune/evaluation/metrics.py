"""What is measured of a network on images: its answers, its top-1 error, and its divergence from the dense network."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def predict(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Logits of all images, float32 (n, n_classes), in evaluation as the network stands."""
    with torch.inference_mode():
        return torch.cat([network(batch).float() for batch in images.split(batch_size)])


def top1_error(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is not their label's; an answer that is not finite counts as wrong.

    Args:
        logits: float (n, n_classes).
        labels: int64 (n,).
    """
    right = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
    return int((~right).sum()) / len(right)


def image_losses(logits: Tensor, labels: Tensor, dense_log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each image under both objectives.

    Args:
        logits: float (n, n_classes).
        labels: int64 (n,).
        dense_log_probabilities: float64 (n, n_classes), log-softmax of the dense network's logits.

    Returns:
        Whether each answer is wrong, bool (n,), where an answer that is not finite is; and the divergence (nats) of
        each answer from the dense network's, float64 (n,), at least 0 and infinite for answers that are not finite.
    """
    finite = logits.isfinite().all(dim=1)
    wrong = (logits.argmax(dim=1) != labels) | ~finite
    log_probabilities = functional.log_softmax(logits.double(), dim=1)
    kl = (dense_log_probabilities.exp() * (dense_log_probabilities - log_probabilities)).sum(dim=1)
    # Rounding may leave a hair below 0, and sums that only grow are what lets an evaluation stop early.
    return wrong, torch.where(finite, kl.clamp_min(0.0), torch.inf)


def divergence_of(kl: float) -> float:
    """1 - exp(-KL), see `divergence`; 1 where KL is not finite."""
    return float(-math.expm1(-kl)) if math.isfinite(kl) else 1.0


def divergence(logits: Tensor, dense_log_probabilities: Tensor) -> float:
    """1 - exp(-KL), with KL the mean divergence (nats) of the network's answers from the dense network's.

    The transformation keeps the order of networks and brings the divergence into [0, 1): 0 for the dense network
    itself, about 1 - 1/n_classes for a network that answers nothing, as the top-1 error does. The hypervolume on it is
    therefore read with the same reference point. Answers that are not finite count as 1.

    Args:
        logits: float (n, n_classes).
        dense_log_probabilities: float (n, n_classes), log-softmax of the dense network's logits.
    """
    unused = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    _, kl = image_losses(logits, unused, dense_log_probabilities.double())
    return divergence_of(float(kl.sum()) / len(kl))
