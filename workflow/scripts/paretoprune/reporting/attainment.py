"""What several seeds reach together: attainment surfaces of their fronts, and bands of their hypervolumes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def attained_errors(front: pd.DataFrame, densities: np.ndarray, column: str) -> np.ndarray:
    """Least error that a front reaches without keeping more than a given share of the weights.

    Args:
        front: Columns `density` and `column`.
        densities: float (n,), shares that may be kept.
        column: "test_error" or "search_error".

    Returns:
        float (n,); infinite where every member is denser.
    """
    members = front.sort_values("density", kind="stable")
    least = np.minimum.accumulate(members[column].to_numpy(dtype=float))
    position = np.searchsorted(members["density"].to_numpy(dtype=float), densities, side="right") - 1
    # Position -1, below the sparsest member, picks the value at the end.
    return np.append(least, np.inf)[position]


def attainment_surfaces(fronts: pd.DataFrame, seeds: Sequence[int], column: str) -> pd.DataFrame:
    """What the best, at least half, and all of the seeds reach at each density: empirical attainment surfaces.

    On test errors, the test split picks among members here: fit to describe fronts, not to choose a network.

    Args:
        fronts: Members of one method on one dataset and network: columns `seed`, `density` and `column`.
        seeds: All seeds that were run; one whose front is empty reaches nothing.
        column: "test_error" or "search_error".

    Returns:
        Columns `density` (every density of a member, ascending), `best`, `median` and `worst`: the first, the
        ceil(n/2)-th and the last of the errors that the n seeds reach. Each value holds from its density up to the
        next; infinite where not enough seeds have a member that sparse.

    Raises:
        ValueError: There is no seed.

    Source:
        Grunert da Fonseca, Fonseca and Hall, "Inferential performance assessment of stochastic optimisers and the
        attainment function", 2001.
    """
    if not len(seeds):
        raise ValueError("expected at least one seed, found none; name those that were run")
    densities = np.unique(fronts["density"].to_numpy(dtype=float))
    reached = np.stack([attained_errors(fronts[fronts["seed"] == seed], densities, column) for seed in seeds])
    reached.sort(axis=0)
    half = (len(seeds) + 1) // 2
    return pd.DataFrame({"density": densities, "best": reached[0], "median": reached[half - 1], "worst": reached[-1]})


def hypervolume_at(history: pd.DataFrame, evaluations: np.ndarray) -> np.ndarray:
    """Hypervolume reached after a number of evaluations.

    Args:
        history: Columns `evaluations` (cumulative, ascending) and `hypervolume`.
        evaluations: float (n,), budgets asked for.

    Returns:
        float (n,); NaN before the first row, the last value beyond the last.
    """
    position = np.searchsorted(history["evaluations"].to_numpy(dtype=float), evaluations, side="right") - 1
    # Position -1, before the first row, picks the NaN at the end.
    return np.append(history["hypervolume"].to_numpy(dtype=float), np.nan)[position]


def hypervolume_bands(histories: pd.DataFrame, evaluations: np.ndarray) -> pd.DataFrame:
    """Least, median and largest hypervolume over seeds after each number of evaluations.

    Args:
        histories: Rows of one method on one dataset and network: columns `seed`, `evaluations`, `hypervolume`.
        evaluations: float (n,), the grid common to all seeds.

    Returns:
        Columns `evaluations`, `low`, `median`, `high`; NaN until every seed has its first row, and a seed that has
        ended keeps its last value.
    """
    values = np.stack([hypervolume_at(history, evaluations) for _, history in histories.groupby("seed")])
    return pd.DataFrame(
        {
            "evaluations": evaluations,
            "low": values.min(axis=0),
            "median": np.median(values, axis=0),
            "high": values.max(axis=0),
        }
    )
