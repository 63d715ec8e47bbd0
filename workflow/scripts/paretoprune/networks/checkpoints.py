"""Weights and dense networks as the workflow writes and reads them."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from paretoprune.copies import copied
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.wrapping import Adaptation, adapt
from paretoprune.shapes import with_state
from paretoprune.tensors import load_tensors, read_metadata, save_tensors


def with_weights(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network of the same architecture with other weights, or with fewer channels, on the CPU, in evaluation mode."""
    return with_state(copied(network).cpu().eval(), state)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network in place.

    Args:
        network: The network to fill.
        state: Names to tensors.
        source: Where the weights come from, for the error.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape; all of them are named.
    """
    if problems := misfits(network, state):
        raise ValueError(
            f"{source} does not fit the network: {'; '.join(problems)}; check `architecture`, its `arguments`, and "
            "that the dataset has the number of classes and channels that the checkpoint was trained with"
        )
    network.load_state_dict(dict(state), strict=False)


def misfits(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from fitting a network: missing, unexpected and misshapen names, none where they fit."""
    own = network.state_dict()
    missing = [name for name in own if name not in state and not is_counter(name)]
    unexpected = [name for name in state if name not in own and not is_counter(name)]
    misshapen = [
        f"{name} (expected {tuple(own[name].shape)}, found {tuple(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    near = {name: difflib.get_close_matches(name, unexpected, n=1, cutoff=0.6) for name in missing[:8]}
    missing = [f"{name} (near: {near[name][0]})" if near.get(name) else name for name in missing]
    return [
        f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]


def is_counter(name: str) -> bool:
    """Whether a tensor only counts something while a network is trained or profiled, so that it may come or not.

    Batch norm counts batches, averaged networks what they average, and thop operations and parameters.
    """
    return name.rpartition(".")[2] in ("num_batches_tracked", "n_averaged", "total_ops", "total_params")


@dataclass(frozen=True)
class DenseNetwork:
    """A trained network with what its file says about it.

    Attributes:
        network: In evaluation mode, on the CPU.
        architecture: How to build it again.
        mean: Per-channel mean that images, scaled to [0, 1], are normalised with.
        std: Per-channel standard deviation, likewise.
        exclude: Patterns of weights that are never pruned.
        adaptation: What the network was given so that it runs like any other.
    """

    network: nn.Module
    architecture: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exclude: tuple[str, ...] = ()
    adaptation: Adaptation = field(default_factory=Adaptation)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and description to one safetensors file."""
        description = {
            "architecture": asdict(self.architecture),
            "mean": self.mean,
            "std": self.std,
            "exclude": self.exclude,
            "adaptation": asdict(self.adaptation),
        }
        save_tensors(path, self.network.state_dict(), {"paretoprune": json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DenseNetwork":
        """Read what `save` wrote.

        Raises:
            ValueError: The file has no description, so another program wrote it.
        """
        description = json.loads(read_metadata(path).get("paretoprune", "null"))
        if description is None:
            raise ValueError(f"'{path}' has no description of its network; let the `dense` step write it")
        architecture = Architecture(**description["architecture"])
        network = architecture.build()
        load_weights(network, load_tensors(path), str(path))
        network.eval()
        adaptation = Adaptation(**description.get("adaptation", {}))
        return cls(
            adapt(network, adaptation),
            architecture,
            tuple(description["mean"]),
            tuple(description["std"]),
            tuple(description["exclude"]),
            adaptation,
        )
