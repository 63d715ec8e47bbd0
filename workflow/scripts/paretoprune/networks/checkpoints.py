"""Reading and writing trained weights, never by unpickling code."""

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from paretoprune.networks.architectures import Architecture
from paretoprune.networks.wrapping import Adaptation, adapt, copied
from paretoprune.tensors import load_tensors, save_tensors


def save_networks(path: str | os.PathLike[str], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the states of several networks to one safetensors file, each tensor under `<member>/<name>`."""
    save_tensors(path, {f"{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()})


def load_networks(path: str | os.PathLike[str]) -> list[dict[str, Tensor]]:
    """Read what `save_networks` wrote."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        member, _, name = key.partition("/")
        states.setdefault(int(member), {})[name] = tensor
    return [states[i] for i in range(len(states))]


def with_weights(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network of the same architecture with other weights, on the CPU, in evaluation mode."""
    other = copied(network).cpu()
    other.eval()
    other.load_state_dict(dict(state))
    return other


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file.

    Understands safetensors, and torch files that hold a state dict, plain or under `state_dict`, `model` or `net`;
    prefixes left by wrappers (`module.`, `_orig_mod.`) are taken off.

    Args:
        path: The file.

    Returns:
        Parameter and buffer names to tensors, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or needs code to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint at '{path}', found no file; correct `checkpoint` or `data_directory`"
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"'{path}' cannot be read as plain weights ({reason[0]}); a checkpoint must hold tensors only: save it "
            "with torch.save(network.state_dict(), path) or as safetensors"
        ) from error
    for key in ("state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"'{path}' holds no state dict (names to tensors); save it with torch.save(network.state_dict(), path)"
        )
    state = {str(name): tensor for name, tensor in content.items()}
    # A compiled network inside a parallel wrapper has both, in either order.
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network in place.

    Args:
        network: The network to fill.
        state: Names to tensors.
        source: Where the weights come from, for the error.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape; all of them are named.
    """
    own = network.state_dict()
    # Counters of batches seen exist only for training and are absent from older checkpoints.
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} (expected {tuple(own[name].shape)}, found {tuple(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit the network: {'; '.join(problems)}; check `architecture`, its `arguments`, and "
            "that the dataset has the number of classes and channels that the checkpoint was trained with"
        )
    network.load_state_dict(dict(state), strict=False)


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
        with safe_open(path, framework="pt") as handle:
            description = json.loads((handle.metadata() or {}).get("paretoprune", "null"))
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
