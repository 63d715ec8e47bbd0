"""Importance of units by what hangs on them: magnitude, Taylor, and the scale of batch norms."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from paretoprune.copies import copied
from paretoprune.structured.parts import STAYS
from paretoprune.structured.units import ChannelUnits

BATCH_SIZE = 64


def group_magnitude(network: nn.Module, units: ChannelUnits) -> np.ndarray:
    """Norm of all weights of layers that hang on a unit, relative to the mean of its coupling.

    Returns:
        float32 (n_units,), higher = keep.

    Source:
        Fang et al., "DepGraph: Towards any structural pruning", 2023, group norm and its normalisation by the mean.
    """
    squares = {name: parameter.detach().double().square() for name, parameter in network.named_parameters()}
    return _relative(units, np.sqrt(_summed(units, squares, matrices_only=True)))


def group_taylor(network: nn.Module, units: ChannelUnits, images: Tensor, labels: Tensor) -> np.ndarray:
    """First-order estimate of how the loss changes without a unit, relative to the mean of its coupling.

    Args:
        network: The whole network; it is left as it is.
        units: What can be cut.
        images: float (n, ...), normalised.
        labels: int64 (n,).

    Returns:
        float32 (n_units,), higher = keep.

    Source:
        Molchanov et al., "Importance estimation for neural network pruning", 2019.
    """
    network = copied(network).float()
    network.requires_grad_(True)
    with torch.enable_grad():
        for batch, classes in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            (functional.cross_entropy(network(batch), classes, reduction="sum") / len(images)).backward()
    products = {
        name: (parameter * parameter.grad).detach().double()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return _relative(units, np.abs(_summed(units, products, matrices_only=False)))


def norm_scale(network: nn.Module, units: ChannelUnits) -> np.ndarray:
    """Size of the scales by which batch norms multiply a unit's channels, added up; magnitude where none does.

    Returns:
        float32 (n_units,), higher = keep.

    Source:
        Liu et al., "Learning efficient convolutional networks through network slimming", 2017.
    """
    scales = {
        f"{name}.weight": module.weight.detach().double().abs()
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None
    }
    found = _summed(units, scales, matrices_only=False)
    magnitude = group_magnitude(network, units)
    for start, stop in zip(units.offsets[:-1], units.offsets[1:], strict=True):
        if not found[start:stop].any():
            found[start:stop] = magnitude[start:stop]
    return found.astype(np.float32)


def _summed(units: ChannelUnits, values: dict[str, Tensor], *, matrices_only: bool) -> np.ndarray:
    """Sum of the values of the entries that go with each unit, float64 (n_units,)."""
    total = np.zeros(units.n_units)
    for coupling, start in zip(units.couplings, units.offsets[:-1], strict=True):
        for part in coupling.parts:
            value = values.get(part.tensor)
            if value is None or (matrices_only and value.ndim < 2):
                continue
            others = [dim for dim in range(value.ndim) if dim != part.axis]
            each = (value.sum(dim=others) if others else value).cpu().numpy()
            mine = part.unit_of != STAYS
            np.add.at(total, start + part.unit_of[mine], each[mine])
    return total


def _relative(units: ChannelUnits, values: np.ndarray) -> np.ndarray:
    """Values as multiples of the mean of their coupling, so that couplings can be compared, float32 (n_units,)."""
    means = np.add.reduceat(values, units.offsets[:-1]) / units.sizes
    return (values / np.where(means > 0, means, 1.0)[units.group_of]).astype(np.float32)
