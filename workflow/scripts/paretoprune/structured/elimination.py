"""What it costs to remove a unit once the layers that read it are re-fitted, in the best order.

A layer that reads the columns g of its inputs no longer makes up for them with the others. With H the second moments of
the inputs and S how much the outputs matter, removing them costs tr(S W_g ([H^-1]_gg)^-1 W_g'); then the weights and
H^-1 are those of the layer without these columns. Units are removed one after the other, always the cheapest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.importance.curvature import DAMPING, damped
from paretoprune.importance.layer_statistics import LayerStatistics, prunable_modules, weight_matrix
from paretoprune.masks.units import WeightUnits
from paretoprune.structured.parts import STAYS, Coupling
from paretoprune.structured.units import ChannelUnits

# Columns of a layer up to which its inverse is updated at each step; of wider ones, each unit is judged by itself.
MOST_COLUMNS = 4608


def elimination_scores(
    network: nn.Module,
    units: ChannelUnits,
    statistics: Mapping[str, LayerStatistics],
    *,
    damping: float = DAMPING,
) -> np.ndarray:
    """What is lost in all when a unit goes, after those that go before it in its coupling.

    Args:
        network: The whole network.
        units: What can be cut.
        statistics: Of its layers, see `importance.layer_statistics`.
        damping: See `importance.curvature.damped`.

    Returns:
        float32 (n_units,), higher = keep. To first order the mean squared error of the logits that removing it and
        all lower ones of its coupling leads to, so that couplings can be compared.

    Source:
        Single weights: Hassibi and Stork, "Optimal brain surgeon", 1993; blocks of them: Kurtic et al., "ZipLM", 2023.
    """
    layout = WeightUnits.of(network)
    modules = {name: held[0][1] for name, held in prunable_modules(network, layout).items()}
    parameters = dict(network.named_parameters())
    scores = [_cumulative_losses(coupling, modules, parameters, statistics, damping) for coupling in units.couplings]
    return np.concatenate(scores).astype(np.float32)


@dataclass
class _Reader:
    """A layer that reads the units of a coupling, with those that are gone eliminated.

    Attributes:
        weight: float64 (groups, n_rows, n_columns).
        inverse: float64 (groups, n_columns, n_columns), of the damped curvature.
        sensitivity: float64 (groups, n_rows).
        columns: int64 (n_units, n_columns of a unit).
    """

    weight: Tensor
    inverse: Tensor
    sensitivity: Tensor
    columns: Tensor

    def losses(self, units: Tensor) -> Tensor:
        """What removing each of some units (n,) costs, float64 (n,)."""
        at = self.columns[units]
        blocks = self.inverse[:, at[:, :, None], at[:, None, :]]
        weights = self.weight[:, :, at].permute(0, 2, 1, 3)
        solved = torch.linalg.solve(blocks, weights.mT).mT
        return torch.einsum("gr,gnrk,gnrk->n", self.sensitivity, weights, solved)

    def remove(self, unit: int) -> None:
        """Eliminate the columns of a unit."""
        at = self.columns[unit]
        rows = self.inverse[:, at]
        step = torch.linalg.solve(rows[:, :, at], rows)
        self.weight -= self.weight[:, :, at] @ step
        self.inverse -= rows.mT @ step
        # Rounding leaves a trace, which the inverse of a later block would magnify.
        self.inverse[:, at] = 0
        self.inverse[:, :, at] = 0
        self.weight[:, :, at] = 0


def _cumulative_losses(
    coupling: Coupling,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    damping: float,
) -> np.ndarray:
    readers, alone = [], torch.zeros(coupling.n_units, dtype=torch.float64)
    for part in coupling.parts:
        if not part.reads or part.tensor not in statistics or part.tensor not in modules:
            continue
        module, found = modules[part.tensor], statistics[part.tensor]
        weight = weight_matrix(module, parameters[part.tensor].detach().double())
        n_kernel = weight.shape[2] // len(part.unit_of)
        unit_of = np.repeat(part.unit_of, n_kernel)
        sensitivity = found.sensitivity.double().view(weight.shape[:2])
        counts = np.bincount(unit_of[unit_of != STAYS], minlength=coupling.n_units)
        if weight.shape[2] > MOST_COLUMNS or counts.min() != counts.max():
            diagonal = found.curvature.diagonal(dim1=1, dim2=2).double()
            each = torch.einsum("gr,grc,gc->c", sensitivity, weight.square(), diagonal)
            owned = torch.from_numpy(unit_of)
            alone.index_add_(0, owned[owned != STAYS], each[owned != STAYS])
            continue
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(found.curvature.double(), damping)))
        columns = torch.from_numpy(np.argsort(unit_of, kind="stable")[(unit_of == STAYS).sum() :])
        readers.append(_Reader(weight.clone(), inverse, sensitivity, columns.view(coupling.n_units, -1)))
    left = torch.arange(coupling.n_units)
    total, scores = 0.0, np.zeros(coupling.n_units)
    while len(left):
        losses = alone[left].clone()
        for reader in readers:
            losses += reader.losses(left)
        i = int(losses.argmin())
        unit = int(left[i])
        total += max(float(losses[i]), 0.0)
        scores[unit] = total
        for reader in readers:
            reader.remove(unit)
        left = torch.cat([left[:i], left[i + 1 :]])
    return scores
