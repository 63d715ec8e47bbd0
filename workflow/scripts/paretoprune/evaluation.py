"""Judging pruned networks: from masks to objectives, both minimised."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.masks import MaskLayout, PackedMasks
from paretoprune.networks import to_channels_last
from paretoprune.repair import make_repair

OBJECTIVES = ("error", "divergence")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    return 1.0 - right.double().mean().item()


def divergence(logits: Tensor, dense_log_probabilities: Tensor) -> float:
    """1 - exp(-KL), with KL the mean divergence (nats) of the network's answers from the dense network's.

    The transformation keeps the order of networks and brings the divergence into [0, 1): 0 for the dense network
    itself, about 1 - 1/n_classes for a network that answers nothing, as the top-1 error does. The hypervolume on it is
    therefore read with the same reference point. Answers that are not finite count as 1.

    Args:
        logits: float (n, n_classes).
        dense_log_probabilities: float (n, n_classes), log-softmax of the dense network's logits.
    """
    kl = functional.kl_div(
        functional.log_softmax(logits.double(), dim=1), dense_log_probabilities, reduction="batchmean", log_target=True
    ).item()
    return 1.0 if not np.isfinite(kl) else float(-np.expm1(-max(kl, 0.0)))


@dataclass(frozen=True)
class Scores:
    """What one split says about some networks.

    Attributes:
        error: float64 (n_masks,), top-1 error, 0 to 1.
        divergence: float64 (n_masks,), 1 - exp(-KL) from the dense network's answers, 0 to 1.
    """

    error: np.ndarray
    divergence: np.ndarray

    def objective(self, name: str) -> np.ndarray:
        """The scores that the objective `name` (error or divergence) minimises, float64 (n_masks,)."""
        return self.error if name == "error" else self.divergence


class PopulationEvaluator:
    """Turns masks into objectives (error-like, density); equal masks always get equal objectives.

    Args:
        network: The trained dense network; it is copied and left as it is.
        layout: Where its prunable weights lie in a mask.
        images: Images to judge on, float32 (n, channels, height, width), normalised.
        labels: Their labels, int64 (n,).
        repair: What is put right before judging, a key of `paretoprune.repair.REPAIRS`.
        calibration_images: Images for the repair, normalised.
        objective: `error` (top-1) or `divergence` (from the dense network's answers, see `divergence`).
        precision: `float32`, or `bfloat16` for weights and activations; statistics and scores are float32 either way.
        batch_size: Images per forward pass.
        device: Where to compute.

    Raises:
        ValueError: An option is unknown, or the dense network answers anything that is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: MaskLayout,
        images: Tensor,
        labels: Tensor,
        *,
        repair: str,
        calibration_images: Tensor,
        objective: str = "error",
        precision: str = "float32",
        batch_size: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"expected an objective among {', '.join(OBJECTIVES)}, found '{objective}'")
        if precision not in PRECISIONS:
            raise ValueError(f"expected a precision among {', '.join(PRECISIONS)}, found '{precision}'")
        self.layout = layout
        self.objective = objective
        self._batch_size = batch_size
        self._original = copy.deepcopy(network).eval()
        self._dtype, self._device = PRECISIONS[precision], torch.device(device)

        def place(tensor: Tensor) -> Tensor:
            placed = tensor.to(self._device, self._dtype)
            return placed.contiguous(memory_format=torch.channels_last) if placed.ndim == 4 else placed

        self._images, self._labels = place(images), labels.to(self._device)
        self._work = copy.deepcopy(self._original).to(self._device, self._dtype)
        for module, trained in zip(self._work.modules(), self._original.modules(), strict=True):
            if isinstance(module, _BatchNorm):
                # Statistics rounded to bfloat16 would shift every activation; normalisation mixes the two types.
                module.float().load_state_dict(trained.state_dict())
        to_channels_last(self._work)
        parameters = dict(self._work.named_parameters())
        self._weights = [parameters[name] for name in layout.names]
        self._dense_weights = [weight.detach().clone() for weight in self._weights]
        # Everything a repair may change, to be put back before the next candidate.
        self._dense_buffers = {name: buffer.detach().clone() for name, buffer in self._work.named_buffers()}
        self._repair = make_repair(repair, self._work, place(calibration_images))
        dense_logits = predict(self._work, self._images, batch_size)
        if not bool(torch.isfinite(dense_logits).all()):
            raise ValueError(
                "the dense network's answers are not finite; check the checkpoint and its input normalisation"
            )
        self._dense_log_probabilities = functional.log_softmax(dense_logits.double(), dim=1)
        self.dense = Scores(np.array([top1_error(dense_logits, self._labels)]), np.zeros(1))

    @property
    def n_classes(self) -> int:
        """Number of classes that the network tells apart."""
        return self._dense_log_probabilities.shape[1]

    @property
    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """The images to judge on and their labels, on the evaluator's device."""
        return self._images, self._labels

    def _prune(self, mask: np.ndarray) -> nn.Module:
        """The working copy, masked with bool (n_weights,) and repaired; valid until the next call."""
        buffers = dict(self._work.named_buffers())
        with torch.no_grad():
            for name, original in self._dense_buffers.items():
                buffers[name].copy_(original)
            for weight, dense, part in zip(
                self._weights, self._dense_weights, self.layout.split(mask).values(), strict=True
            ):
                # where, not a product: 0 times an infinite weight would be NaN.
                kept = torch.from_numpy(part).to(self._device)
                weight.copy_(torch.where(kept, dense, torch.zeros_like(dense)))
        self._repair(self._work)
        return self._work

    def score(self, masks: PackedMasks) -> Scores:
        """Judge each mask's pruned and repaired network."""
        errors, divergences = [], []
        for i in range(len(masks)):
            logits = predict(self._prune(masks.unpack(i)), self._images, self._batch_size)
            errors.append(top1_error(logits, self._labels))
            divergences.append(divergence(logits, self._dense_log_probabilities))
        return Scores(np.array(errors), np.array(divergences))

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        """Objectives float64 (n_masks, 2): the error-like objective and the density."""
        return np.column_stack([self.score(masks).objective(self.objective), masks.density])

    def build(self, mask: np.ndarray) -> nn.Module:
        """The pruned and repaired network of one mask, as an independent module on the CPU, in evaluation mode.

        Args:
            mask: bool (n_weights,).

        Raises:
            ValueError: This evaluator computes in another precision than float32, so its weights are rounded.
        """
        if self._dtype != torch.float32:
            raise ValueError("only an evaluator with precision 'float32' builds networks to keep; make one for that")
        network = copy.deepcopy(self._original)
        network.load_state_dict(self._prune(mask).state_dict())
        return network
