"""Repair: what is put right in a pruned network before it is evaluated.

`none` leaves the bare mask. `batchnorm` recalibrates: it corrects the batch-norm statistics, which describe activations
that pruning has changed. `reconstruct` re-fits the kept weights first, where a mask is applied (`repair.refit`), and
then recalibrates.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from paretoprune.repair.batchnorm import Correction, Recalibration, corrected_statistics
from paretoprune.repair.registry import REPAIR_REFITS

# Takes a network in evaluation mode whose weights are in place already, and changes it in place.
Mend = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Repair:
    """One repair.

    Attributes:
        make: Prepares it for one dense network in evaluation mode, on calibration images (n, c, h, w). What it returns
            changes buffers of a network whose weights are in place. None where nothing is to be done.
        refits: Whether re-fitted weights take the place of the masked ones.
        correct: The rule, where all that `make` changes are batch-norm statistics; the fused path applies it by
            itself. None where it changes anything else: such a repair works layer by layer.
    """

    make: Callable[[nn.Module, Tensor], Mend] | None = None
    refits: bool = False
    correct: Correction | None = None

    @property
    def only_recalibrates(self) -> bool:
        """Whether nothing but batch-norm statistics is changed once the weights are in place."""
        return self.make is None or self.correct is not None


REPAIRS: dict[str, Repair] = {
    "none": Repair(refits=REPAIR_REFITS["none"]),
    "batchnorm": Repair(Recalibration, REPAIR_REFITS["batchnorm"], corrected_statistics),
    "reconstruct": Repair(Recalibration, REPAIR_REFITS["reconstruct"], corrected_statistics),
}


def repair_named(mode: str) -> Repair:
    """The repair of a name.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in REPAIRS:
        raise ValueError(f"expected a repair mode among {', '.join(REPAIRS)}, found '{mode}'")
    return REPAIRS[mode]


def make_repair(mode: str, network: nn.Module, images: Tensor) -> Mend:
    """Prepare a repair for one dense network.

    Args:
        mode: A key of `REPAIRS`.
        network: The dense network, in evaluation mode.
        images: Calibration images (n, channels, height, width), normalised.

    Raises:
        ValueError: There is no such mode.
    """
    make = repair_named(mode).make
    return _leave if make is None else make(network, images)


def _leave(network: nn.Module) -> None:
    """Change nothing."""
