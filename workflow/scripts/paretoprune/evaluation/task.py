"""What networks are evaluated on, and what is found."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from paretoprune.importance.layer_statistics import LayerStatistics
from paretoprune.masks.units import WeightUnits


@dataclass(frozen=True)
class Task:
    """A trained network, and the images that its pruned versions are evaluated and repaired on.

    Calibration images must be in random order. Nothing can check it: `repair_images` of the settings takes the first of
    them, and sums over batches of similar images would be those of something else.

    Attributes:
        network: The dense network. It is copied before anything is computed with it, and stays as it is.
        units: Where its prunable weights lie in a mask.
        images: Images to evaluate on, float32 (n, channels, height, width), normalised.
        labels: Their labels, int64 (n,).
        calibration: Images for the repair, float32 (n_calibration, channels, height, width), normalised, in random
            order; labels are not needed.
        statistics: Of the layers, for repairs that re-fit weights; None to collect them on the calibration images.
    """

    network: nn.Module
    units: WeightUnits
    images: Tensor
    labels: Tensor
    calibration: Tensor
    statistics: Mapping[str, LayerStatistics] | None = None


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
