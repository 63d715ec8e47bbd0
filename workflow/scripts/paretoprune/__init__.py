"""Multi-objective evolutionary search for pruned networks: the whole Pareto set of accuracy against size."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretoprune.api import distil as distil
    from paretoprune.api import pareto_prune as pareto_prune
    from paretoprune.fronts import Front as Front

__all__ = ["Front", "distil", "pareto_prune"]
__version__ = "0.1.0"

_HOMES = {"pareto_prune": "paretoprune.api", "distil": "paretoprune.api", "Front": "paretoprune.fronts"}


def __getattr__(name: str) -> Any:
    # Resolved on first use: figures must not wait for torch, and a workflow step must not depend on modules
    # that it never touches.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'paretoprune' has no attribute '{name}'")
