"""Gated layers whose two halves come from one layer: rows of both go together, which no graph of channels shows."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn

from paretoprune.structured.parts import Coupling, Part


def packed_gates(network: nn.Module, order: Mapping[str, int]) -> Iterator[Coupling]:
    """Layers whose outputs may be two halves of which one gates the other: a module's linear layer makes twice as much
    as a later one of it reads.

    Args:
        network: The whole network.
        order: When each module is first called, by name.

    Returns:
        Couplings under the name of the layer that makes both halves, to be checked.
    """
    for name, module in network.named_modules():
        layers = {
            own: child
            for own, child in module.named_children()
            if isinstance(child, nn.Linear) and f"{name}.{own}".removeprefix(".") in order
        }
        for own, maker in layers.items():
            readers = [other for other, layer in layers.items() if 2 * layer.in_features == maker.out_features]
            if readers and readers[-1] != own:
                yield _gate(name, module, own, readers[-1], maker.out_features // 2)


def _gate(name: str, module: nn.Module, maker: str, reader: str, n_units: int) -> Coupling:
    """A unit is a channel of both halves, with what norms of the module have for it."""
    prefix = f"{name}.".removeprefix(".")
    both, one = np.tile(np.arange(n_units), 2), np.arange(n_units)
    parts = [Part(f"{prefix}{maker}.weight", 0, both)]
    if module.get_submodule(maker).bias is not None:
        parts.append(Part(f"{prefix}{maker}.bias", 0, both))
    for own, child in module.named_modules():
        if "norm" not in type(child).__name__.lower():
            continue
        for tensor_name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if tensor.ndim == 1 and len(tensor) in (n_units, 2 * n_units):
                unit_of = one if len(tensor) == n_units else both
                together = not isinstance(child, nn.modules.batchnorm._NormBase)
                parts.append(Part(f"{prefix}{own}.{tensor_name}", 0, unit_of, together=together))
    parts.append(Part(f"{prefix}{reader}.weight", 1, one, reads=True))
    return Coupling(f"{prefix}{maker}", n_units, tuple(parts))
