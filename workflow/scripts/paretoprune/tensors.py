"""Tensors in safetensors files, written whole or not at all.

torch is imported where it is needed: fronts can be read without it, as reports do.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paretoprune.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(
    path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and text metadata to a safetensors file."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, dict(metadata or {}))


def load_tensors(path: str | os.PathLike[str]) -> "dict[str, Tensor]":
    """Read the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the text metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return dict(handle.metadata() or {})


def save_networks(
    path: str | os.PathLike[str], states: "Sequence[Mapping[str, Tensor]]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write the states of several networks to one safetensors file, each tensor under `<member>/<name>`."""
    tensors = {f"{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}
    save_tensors(path, tensors, metadata)


def load_networks(path: str | os.PathLike[str]) -> "list[dict[str, Tensor]]":
    """Read what `save_networks` wrote."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        member, _, name = key.partition("/")
        states.setdefault(int(member), {})[name] = tensor
    return [states[i] for i in range(len(states))]
