"""Reading and writing trained weights, never by unpickling code."""

import copy
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from paretoprune.networks.architectures import Architecture
from paretoprune.tensors import load_tensors, save_tensors


def save_networks(path: str | os.PathLike[str], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the state dicts of several networks to one safetensors file, each tensor under `<index>/<name>`."""
    save_tensors(path, {f"{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()})


def load_networks(path: str | os.PathLike[str]) -> list[dict[str, Tensor]]:
    """Read the state dicts that `save_networks` wrote, in the same order, on the CPU."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        member, _, name = key.partition("/")
        states.setdefault(int(member), {})[name] = tensor
    return [states[i] for i in range(len(states))]


def with_weights(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with the weights and buffers of `state`, on the CPU, in evaluation mode."""
    other = copy.deepcopy(network).cpu().eval()
    other.load_state_dict(dict(state))
    return other


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file.

    It may be a safetensors file, or a torch file that holds a state dict, plain or under `state_dict`, `model` or
    `net`. Prefixes left by wrappers (`module.`, `_orig_mod.`) are taken off.

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
        ValueError: Keys are missing, unexpected or of another shape; the message names up to eight of each.
    """
    expected = network.state_dict()
    # The counters of batches seen are used in training only, and older checkpoints lack them.
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in state and name not in optional]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} (expected {tuple(expected[name].shape)}, found {tuple(state[name].shape)})"
        for name in expected
        if name in state and expected[name].shape != state[name].shape
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
    """A trained network, and what is needed to build it again and to feed it.

    Attributes:
        network: In evaluation mode, on the CPU.
        architecture: How to build it again.
        mean: Per-channel mean that images, scaled to [0, 1], are normalised with.
        std: Per-channel standard deviation, likewise.
        exclude: Patterns of weights that are never pruned.
    """

    network: nn.Module
    architecture: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exclude: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and description to one safetensors file."""
        description = {
            "architecture": asdict(self.architecture),
            "mean": self.mean,
            "std": self.std,
            "exclude": self.exclude,
        }
        save_tensors(path, self.network.state_dict(), {"paretoprune": json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DenseNetwork":
        """Read what `save` wrote.

        Raises:
            ValueError: The file has no description (another program wrote it), or its weights do not fit the network.
        """
        with safe_open(path, framework="pt") as handle:
            description = json.loads((handle.metadata() or {}).get("paretoprune", "null"))
        if description is None:
            raise ValueError(f"'{path}' has no description of its network; let the `dense` step write it")
        architecture = Architecture(**description["architecture"])
        network = architecture.build()
        load_weights(network, load_tensors(path), str(path))
        network.eval()
        return cls(
            network, architecture, tuple(description["mean"]), tuple(description["std"]), tuple(description["exclude"])
        )
