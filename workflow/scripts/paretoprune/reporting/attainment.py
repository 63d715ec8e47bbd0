"""What several seeds reach together: attainment surfaces of their fronts, and bands of their hypervolumes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def attained_errors(front: pd.DataFrame, densities: np.ndarray, column: str) -> np.ndarray:
    """Find the least error of a front's members that keep at most a given share of the weights.

    Args:
        front: Columns `density` and `column`.
        densities: float (n,), shares of weights that may be kept, 0 to 1.
        column: "test_error" or "search_error".

    Returns:
        float (n,), 0 to 1; infinite where every member is denser.
    """
    members = front.sort_values("density", kind="stable")
    least = np.minimum.accumulate(members[column].to_numpy(dtype=float))
    position = np.searchsorted(members["density"].to_numpy(dtype=float), densities, side="right") - 1
    # Where even the sparsest member is denser, the position is -1 and picks the infinity appended at the end.
    return np.append(least, np.inf)[position]


def attainment_surfaces(fronts: pd.DataFrame, seeds: Sequence[int], column: str) -> pd.DataFrame:
    """Compute the error that the best, at least half, and all of the seeds reach at each density.

    These are empirical attainment surfaces. On test errors, the test split picks among the members. That describes
    fronts, but does not choose a network.

    Args:
        fronts: Members of one method on one dataset and network: columns `seed`, `density` and `column`.
        seeds: All seeds that were run. A seed with an empty front reaches nothing.
        column: "test_error" or "search_error".

    Returns:
        Columns `density` (every density of a member, ascending), `best`, `median` and `worst`: the smallest, the
        ceil(n/2)-th smallest and the largest of the errors that the n seeds reach. Each value holds from its density up
        to the next. It is infinite where too few seeds have a member that sparse.

    Raises:
        ValueError: There is no seed.

    Source:
        Grunert da Fonseca, Fonseca and Hall, "Inferential performance assessment of stochastic optimisers and the
        attainment function", 2001.
    """
    if not len(seeds):
        raise ValueError("expected at least one seed, found none; name those that were run")
    densities = np.unique(fronts["density"].to_numpy(dtype=float))
    errors = np.stack([attained_errors(fronts[fronts["seed"] == seed], densities, column) for seed in seeds])
    # Sorted over the seeds at each density: row k is what k + 1 seeds reach.
    errors.sort(axis=0)
    half = (len(seeds) + 1) // 2
    return pd.DataFrame({"density": densities, "best": errors[0], "median": errors[half - 1], "worst": errors[-1]})


def hypervolume_at(history: pd.DataFrame, evaluations: np.ndarray) -> np.ndarray:
    """Look up the hypervolume reached after given numbers of evaluations.

    Args:
        history: Columns `evaluations` (cumulative, ascending) and `hypervolume`.
        evaluations: float (n,), numbers of evaluations.

    Returns:
        float (n,); NaN before the first row of the history, the last value after its last row.
    """
    position = np.searchsorted(history["evaluations"].to_numpy(dtype=float), evaluations, side="right") - 1
    # Before the first row, the position is -1 and picks the NaN appended at the end.
    return np.append(history["hypervolume"].to_numpy(dtype=float), np.nan)[position]


def hypervolume_bands(histories: pd.DataFrame, evaluations: np.ndarray) -> pd.DataFrame:
    """Compute the smallest, the median and the largest hypervolume over seeds after each number of evaluations.

    Args:
        histories: Rows of one method on one dataset and network: columns `seed`, `evaluations`, `hypervolume`.
        evaluations: float (n,), the grid common to all seeds.

    Returns:
        Columns `evaluations`, `low`, `median`, `high`. They are NaN until every seed has its first row. A seed that has
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
