"""The final measurement of a front: its networks' errors, one row per member, and one per member and layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.data.splits import LabelledImages
from paretoprune.devices import repeatable
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.workers import can_fork, run_in_processes
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import channels_last, to_channels_last
from paretoprune.networks.checkpoints import with_weights

FRONT_COLUMNS = ("id", "stage", "density", "sparsity", "search_error", "test_error")
LAYER_COLUMNS = ("id", "layer", "n_weights", "n_kept")
BATCH_SIZE = 64


def measure_errors(
    dense: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    evaluated: LabelledImages,
    device: torch.device,
    n_workers: int = 1,
) -> np.ndarray:
    """Top-1 errors of finished networks, in float32.

    Args:
        dense: A network of their architecture.
        states: Of the networks.
        evaluated: The images to measure on.
        device: Where to compute.
        n_workers: Processes to compute in, on a CPU; the errors do not depend on it.

    Returns:
        float64 (n_networks,).
    """
    images, labels = channels_last(evaluated.images.to(device)), evaluated.labels.to(device)

    def error_of(i: int) -> float:
        network = to_channels_last(with_weights(dense, states[i]).to(device))
        with repeatable():
            return top1_error(predict(network, images, BATCH_SIZE), labels)

    n_workers = n_workers if device.type == "cpu" and can_fork() else 1
    return np.array(run_in_processes(error_of, len(states), n_workers), dtype=np.float64)


def front_columns(front: Front) -> tuple[str, ...]:
    """Columns of `front_rows`: those that every front has, and one for each cost that is not the density."""
    return (*FRONT_COLUMNS, *(name for name in front.names[1:] if name != "density"))


def front_rows(front: Front, test_errors: np.ndarray) -> list[dict[str, Any]]:
    """Describe each member with the columns `front_columns`; its id is its position in the front.

    Args:
        front: A final front; its objectives were measured in float32 already.
        test_errors: float (n_members,), top-1 errors of its finished networks on the test split.
    """
    further = {
        name: front.objectives[:, front.names.index(name)] for name in front_columns(front)[len(FRONT_COLUMNS) :]
    }
    return [
        {
            "id": i,
            "stage": front.stages[i],
            "density": float(front.density[i]),
            "sparsity": float(front.sparsity[i]),
            "search_error": float(front.error[i]),
            "test_error": float(test_errors[i]),
            **{name: float(costs[i]) for name, costs in further.items()},
        }
        for i in range(len(front))
    ]


def layer_rows(front: Front, layout: WeightUnits, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Count the kept weights of each member, layer by layer, by its mask or by what its smaller network has."""
    if front.units == "channels":
        every = [[state[name].numel() if name in state else 0 for name in layout.names] for state in states]
    else:
        every = layout.n_kept(front.masks).tolist()
    return [
        {"id": i, "layer": name, "n_weights": int(size), "n_kept": int(kept)}
        for i, counts in enumerate(every)
        for name, size, kept in zip(layout.names, layout.sizes, counts, strict=True)
    ]
