"""Which candidates pymoo's survival drops, whatever the images say that they have not been judged on.

A candidate that is judged on some images only has a lower bound for its error. These functions say how far judging must
go at least to be of use (`bounds`), and afterwards which bounds do not settle a candidate's fate (`undecided`): those
candidates are judged on all images before pymoo sees them. What pymoo then makes of the generation is, to the last
bit, what it would have made of all errors in full: a candidate it drops anyway leaves no trace.

Errors that candidates are dropped for are always those of members judged in full, so none of them is on the front.
"""

from typing import Protocol

import numpy as np
from pymoo.algorithms.moo.moead import ParallelMOEAD
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.algorithm import Algorithm
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting


class Survival(Protocol):
    """The survival of one generation."""

    def bounds(self, density: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Errors above which a candidate is most likely of no use, and certainly dominated.

        Args:
            density: float (n_candidates,), exact.
            front: float (n_members, 2), objectives of all non-dominated networks that were judged in full.

        Returns:
            float (n_candidates,); infinite where a candidate matters whatever its error.
        """
        ...

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Candidates that may survive or change what does.

        Args:
            objectives: float (n_candidates, 2); errors of candidates that are not complete are lower bounds.
            complete: bool (n_candidates,).

        Returns:
            bool (n_candidates,), never true for a complete one.
        """
        ...


def least_error_within(density: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The least error among members that are at least as sparse.

    Args:
        density: float (n,).
        members: float (n_members, 2), error and density.

    Returns:
        float (n,), infinite where every member is denser.
    """
    fits = members[None, :, 1] <= density[:, None]
    return np.where(fits, members[None, :, 0], np.inf).min(axis=1, initial=np.inf)


class RankSurvival:
    """NSGA-II's: whole ranks survive until one does not fit, of which the least crowded do.

    A candidate beyond that rank is dropped. A larger error of it could only move it further back, and it does not
    matter for the ranks before its own.

    Args:
        parents: float (n, 2), objectives of the population.
        n_survive: How many survive.
    """

    def __init__(self, parents: np.ndarray, n_survive: int) -> None:
        self._parents, self._n_survive = parents, n_survive

    def bounds(self, density: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Errors with which a candidate lies behind the population's last rank; see `Survival`."""
        last = NonDominatedSorting().do(self._parents)[-1]
        return least_error_within(density, self._parents[last])

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Those in the ranks from which survivors are taken; see `Survival`."""
        together = np.concatenate([self._parents, objectives])
        ranks = NonDominatedSorting().do(together, n_stop_if_ranked=self._n_survive)
        counts = np.zeros(len(together), dtype=bool)
        counts[np.concatenate(ranks)] = True
        return counts[len(self._parents) :] & ~complete


class NeighbourSurvival:
    """MOEA/D's: a candidate replaces the neighbours of its subproblem that it is better than, one after the other.

    Args:
        algorithm: With a population and the places of the candidates that it has just made.
    """

    def __init__(self, algorithm: ParallelMOEAD) -> None:
        self._parents = algorithm.pop.get("F")
        self._ideal = algorithm.ideal
        self._neighbours = algorithm.neighbors[algorithm.indices]
        self._weights, self._decomposition = algorithm.ref_dirs, algorithm.decomposition

    def _values(self, objectives: np.ndarray, at: np.ndarray, ideal: np.ndarray) -> np.ndarray:
        values: np.ndarray = self._decomposition.do(objectives, weights=self._weights[at], ideal_point=ideal)
        return values

    def bounds(self, density: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Errors with which a candidate is dominated and better than no neighbour as it stands; see `Survival`."""
        ideal = np.minimum(self._ideal, [np.inf, density.min(initial=np.inf)])
        found = least_error_within(density, front)
        for i, at in enumerate(self._neighbours):
            values = self._values(self._parents[at], at, ideal)
            weights = self._weights[at]
            open_ = weights[:, 1] * (density[i] - ideal[1]) < values
            with np.errstate(divide="ignore"):
                needed = ideal[0] + values[open_] / weights[open_, 0]
            found[i] = max(found[i], needed.max(initial=-np.inf))
        return found

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Those that would replace a neighbour or move the ideal point; see `Survival`."""
        ideal = np.min(np.vstack([self._ideal, objectives[complete]]), axis=0)
        ideal[1] = min(ideal[1], objectives[:, 1].min())
        found = (objectives[:, 0] < ideal[0]) & ~complete
        parents = self._parents.copy()
        for i, at in enumerate(self._neighbours):
            better = self._values(objectives[i : i + 1], at, ideal) < self._values(parents[at], at, ideal)
            if complete[i]:
                parents[at[better]] = objectives[i]
            elif better.any():
                found[i] = True
        return found


def survival_of(algorithm: Algorithm) -> Survival | None:
    """The survival that awaits what an algorithm has just made; None where all of it is kept or nothing is known."""
    if not algorithm.is_initialized or algorithm.pop is None or not len(algorithm.pop):
        return None
    if isinstance(algorithm, NSGA2):
        return RankSurvival(algorithm.pop.get("F"), algorithm.pop_size)
    if isinstance(algorithm, ParallelMOEAD):
        return NeighbourSurvival(algorithm)
    return None
