"""Which candidates pymoo's survival drops, whatever the images say that they have not been evaluated on.

A candidate that is evaluated on some images only has a lower bound for its loss. These functions say how far its
evaluation must go to be of use (`bounds`), and afterwards which bounds do not settle its fate (`undecided`): those
candidates are evaluated on all images before pymoo sees them. What pymoo then makes of the generation is, to the last
bit, what it would have made of all losses in full: a candidate it drops anyway leaves no trace.

Losses that candidates are dropped for are always those of members evaluated in full, so none of them is on the front.
"""

from typing import Protocol

import numpy as np
from pymoo.algorithms.moo.moead import ParallelMOEAD
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.algorithm import Algorithm
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting


class Survival(Protocol):
    """The survival of one generation."""

    def bounds(self, costs: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Losses above which a candidate is most likely of no use, and certainly dominated.

        Args:
            costs: float (n_candidates, n_costs), exact.
            front: float (n_members, 1 + n_costs), objectives of all non-dominated networks that were evaluated in full.

        Returns:
            float (n_candidates,); infinite where a candidate matters whatever its error.
        """
        ...

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Candidates that may survive or change what does.

        Args:
            objectives: float (n_candidates, 1 + n_costs); losses of candidates that are not complete are lower bounds.
            complete: bool (n_candidates,).

        Returns:
            bool (n_candidates,), never true for a complete one.
        """
        ...


def least_loss_within(costs: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The least loss among members that cost no more in any respect.

    Args:
        costs: float (n, n_costs).
        members: float (n_members, 1 + n_costs), loss and costs.

    Returns:
        float (n,), infinite where every member costs more.
    """
    fits = (members[None, :, 1:] <= costs[:, None, :]).all(axis=2)
    return np.where(fits, members[None, :, 0], np.inf).min(axis=1, initial=np.inf)


class RankSurvival:
    """NSGA-II's: whole ranks survive until one does not fit, of which the least crowded do.

    A candidate beyond that rank is dropped. A larger loss of it could only move it further back, and it does not
    matter for the ranks before its own.

    Args:
        parents: float (n, n_objectives), objectives of the population.
        n_survive: How many survive.
    """

    def __init__(self, parents: np.ndarray, n_survive: int) -> None:
        self._parents, self._n_survive = parents, n_survive

    def bounds(self, costs: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Losses with which a candidate lies behind the population's last rank; see `Survival`."""
        last = NonDominatedSorting().do(self._parents)[-1]
        return least_loss_within(costs, self._parents[last])

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

    def bounds(self, costs: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Losses with which a candidate is dominated and better than no neighbour as it stands; see `Survival`."""
        # What is not known of the ideal point of the losses can only lower it, which the ideal so far stands in for.
        ideal = self._ideal.copy()
        ideal[1:] = np.minimum(ideal[1:], costs.min(axis=0, initial=np.inf))
        found = least_loss_within(costs, front)
        for i, at in enumerate(self._neighbours):
            values = self._values(self._parents[at], at, ideal)
            weights = self._weights[at]
            # A neighbour whose value the costs alone exceed is safe whatever the loss.
            exposed = (weights[:, 1:] * (costs[i] - ideal[1:]) < values[:, None]).all(axis=1)
            with np.errstate(divide="ignore"):
                needed = ideal[0] + values[exposed] / weights[exposed, 0]
            found[i] = max(found[i], needed.max(initial=-np.inf))
        return found

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Those that would replace a neighbour or move the ideal point; see `Survival`."""
        ideal = np.min(np.vstack([self._ideal, objectives[complete]]), axis=0)
        ideal[1:] = np.minimum(ideal[1:], objectives[:, 1:].min(axis=0))
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
