"""What takes masks: the protocol of `evaluation.fused` and `evaluation.layerwise`, which evaluators rely on."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from paretoprune.masks.units import WeightUnits
from paretoprune.networks.tracing import Cut


class PrunableNetwork(Protocol):
    """One dense network, ready to take any mask: `prepare` a candidate, then ask for its `answer` to batches."""

    layout: WeightUnits

    @property
    def cuts(self) -> Sequence[Cut]:
        """Where activations can be kept, first to last."""
        ...

    def prepare(
        self,
        kept: Tensor,
        cut: Cut | None = None,
        calibrated: Tensor | None = None,
        keep: dict[Cut, Tensor] | None = None,
    ) -> None:
        """Put the weights of a mask in place and repair; what `answer` computes afterwards is this candidate.

        Args:
            kept: bool (n_weights,), on the device.
            cut: Begin after this cut: what lies before it is not touched and must not be run.
            calibrated: The calibration images' activations at `cut`, (n_calibration, *cut.shape).
            keep: Gets the calibration images' activations at these cuts: tensors to write into.
        """
        ...

    def answer(self, images: Tensor, cut: Cut | None = None, keep: dict[Cut, Tensor] | None = None) -> Tensor:
        """Logits of a batch, float32 (n, n_classes).

        Args:
            images: Images (n, c, h, w), or their activations at `cut`; they are left as they are.
            cut: Where to begin.
            keep: Gets the activations at these cuts: tensors to write into.
        """
        ...
