"""Tensors in safetensors files, written whole or not at all."""

import os
from collections.abc import Mapping

from safetensors.torch import load_file, save_file
from torch import Tensor

from paretoprune.files import atomic_path


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and text metadata to a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, dict(metadata or {}))


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file."""
    return load_file(path)
