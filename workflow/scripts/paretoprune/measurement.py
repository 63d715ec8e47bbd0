"""The final measurement of a front: one row per member, and one per member and layer."""

from typing import Any

import numpy as np

from paretoprune.fronts import Front
from paretoprune.masks import MaskLayout

FRONT_COLUMNS = ("id", "stage", "density", "sparsity", "search_error", "test_error")
LAYER_COLUMNS = ("id", "layer", "n_weights", "n_kept")


def front_rows(front: Front, test_errors: np.ndarray) -> list[dict[str, Any]]:
    """Describe each member; its id is its position in the front.

    Args:
        front: A final front; its objectives were measured in float32 already.
        test_errors: float (n_members,), top-1 errors of its finished networks on the test split.
    """
    return [
        {
            "id": i,
            "stage": front.stages[i],
            "density": float(front.density[i]),
            "sparsity": float(front.sparsity[i]),
            "search_error": float(front.error[i]),
            "test_error": float(test_errors[i]),
        }
        for i in range(len(front))
    ]


def layer_rows(front: Front, layout: MaskLayout) -> list[dict[str, Any]]:
    """Count the kept weights of each member, layer by layer."""
    return [
        {"id": i, "layer": name, "n_weights": int(size), "n_kept": int(kept)}
        for i, counts in enumerate(layout.n_kept(front.masks))
        for name, size, kept in zip(layout.names, layout.sizes, counts, strict=True)
    ]
