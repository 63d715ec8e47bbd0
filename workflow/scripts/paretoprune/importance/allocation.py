"""Allocation: how many weights each layer keeps at a given total density, by the classical rules."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paretoprune.masks.units import WeightUnits


def uniform(scores: np.ndarray, layout: WeightUnits, n_keep: int) -> np.ndarray:
    """The same density in every layer."""
    return _round_to_total(layout.sizes * (n_keep / layout.n_weights), layout.sizes, n_keep)


def global_ranking(scores: np.ndarray, layout: WeightUnits, n_keep: int) -> np.ndarray:
    """As many as each layer has among the `n_keep` highest scores of the whole network."""
    best = np.argsort(-scores, kind="stable")[:n_keep]
    return np.bincount(layout.group_of[best], minlength=layout.n_groups).astype(np.int64)


def erdos_renyi_kernel(scores: np.ndarray, layout: WeightUnits, n_keep: int) -> np.ndarray:
    """Density proportional to the sum of a tensor's dimensions over their product, at most 1.

    Source:
        Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section 3.
    """
    ratio = np.array([sum(shape) / np.prod(shape) for shape in layout.shapes])
    full = np.zeros(layout.n_groups, dtype=bool)
    while True:
        # Layers whose share would exceed 1 stay dense, and the others divide what is left.
        open_weights = (ratio * layout.sizes)[~full].sum()
        scale = (n_keep - layout.sizes[full].sum()) / open_weights if open_weights else 0.0
        density = np.where(full, 1.0, ratio * max(scale, 0.0))
        if not np.any(density > 1.0):
            return _round_to_total(density * layout.sizes, layout.sizes, n_keep)
        full |= density > 1.0


def _round_to_total(wanted: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Integers near `wanted`, none above `sizes`, that add up to exactly `total` (largest remainders first)."""
    counts: np.ndarray = np.minimum(np.floor(wanted).astype(np.int64), sizes)
    order = np.argsort(-(wanted - counts), kind="stable")
    while (missing := total - int(counts.sum())) > 0:
        room = order[counts[order] < sizes[order]][:missing]
        counts[room] += 1
    return counts


Allocation = Callable[[np.ndarray, WeightUnits, int], np.ndarray]
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "global": global_ranking,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}


def allocate(rule: str, scores: np.ndarray, layout: WeightUnits, density: float) -> np.ndarray:
    """Number of weights to keep per layer.

    Args:
        rule: A key of `ALLOCATIONS`.
        scores: float (n_weights,), comparable over layers for `global`; the other rules do not look at them.
        layout: The layers.
        density: Share of all weights to keep, 0 to 1.

    Returns:
        int64 (n_layers,), adding up to round(density * n_weights).

    Raises:
        ValueError: There is no such rule, or the density is not a share.
    """
    if rule not in ALLOCATIONS:
        raise ValueError(f"expected an allocation among {', '.join(ALLOCATIONS)}, found '{rule}'")
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density between 0 and 1, found {density}")
    return ALLOCATIONS[rule](scores, layout, round(density * layout.n_weights))


# The classical allocations that a search starts from: a rule, and the score whose ranking it follows.
STARTS: dict[str, tuple[str, str]] = {
    "uniform": ("uniform", "magnitude"),
    "global_magnitude": ("global", "magnitude"),
    "lamp": ("global", "lamp"),
    "erdos_renyi_kernel": ("erdos_renyi_kernel", "magnitude"),
    "elimination": ("global", "elimination"),
}


def starting_allocations(
    names: Sequence[str], densities: Sequence[float], scores: Mapping[str, np.ndarray], layout: WeightUnits
) -> list[np.ndarray]:
    """The classical allocations at a ladder of densities.

    Args:
        names: Keys of `STARTS`.
        densities: Shares of all weights to keep.
        scores: For each score that the chosen starts follow, float (n_weights,).
        layout: The layers.

    Returns:
        One int64 (n_layers,) for each pair of density and name.

    Raises:
        ValueError: A name is unknown.
    """
    unknown = [name for name in names if name not in STARTS]
    if unknown:
        raise ValueError(f"expected starting allocations among {', '.join(STARTS)}, found {', '.join(unknown)}")
    chosen = [STARTS[name] for name in names]
    return [allocate(rule, scores[score], layout, density) for density in densities for rule, score in chosen]
