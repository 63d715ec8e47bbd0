"""What all stages of one run work on, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from paretoprune.data.splits import LabelledImages
from paretoprune.importance.layer_statistics import LayerStatistics
from paretoprune.masks.units import WeightUnits


@dataclass(frozen=True)
class Task:
    """A trained network, and the images that its pruned versions are repaired and judged on.

    Attributes:
        network: The dense network, in evaluation mode, on the CPU; nothing changes it.
        units: Its prunable weights.
        search: The images that candidates and finished networks are judged on, in random order: candidates may be
            judged on the first of them only.
        calibration: Images (n, c, h, w) that networks are repaired on, in random order for the same reason.
        statistics: Of the layers, for repairs that re-fit weights; None to collect them on the calibration images.
    """

    network: nn.Module
    units: WeightUnits
    search: LabelledImages
    calibration: Tensor
    statistics: Mapping[str, LayerStatistics] | None = None
