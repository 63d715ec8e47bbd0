"""Which candidates an algorithm drops whatever their exact losses are, so that their evaluation may stop early.

A candidate that was evaluated on some images only has a lower bound for its loss. `bounds` says, before the evaluation,
how far it must go at least to be of use. `undecided` says, after it, for which candidates a lower bound is not enough;
these are evaluated on all images before pymoo sees them.

With that, pymoo selects exactly the members that it would have selected by complete losses: a candidate that is dropped
anyway leaves no trace. A candidate is only dropped for members with complete losses, so it is never on the front.
"""

from typing import Protocol

import numpy as np
from pymoo.algorithms.moo.moead import ParallelMOEAD
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.algorithm import Algorithm
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting


class Survival(Protocol):
    """How an algorithm selects the survivors of one generation."""

    def bounds(self, costs: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Losses above which a candidate is certainly dominated and most likely dropped.

        Args:
            costs: float (n_candidates, n_costs), exact.
            front: float (n_members, 1 + n_costs), objectives of all non-dominated networks with complete losses.

        Returns:
            float (n_candidates,); infinite where a candidate matters whatever its loss.
        """
        ...

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Candidates that may survive, or may change which others survive.

        Args:
            objectives: float (n_candidates, 1 + n_costs); losses of candidates that are not complete are lower bounds.
            complete: bool (n_candidates,).

        Returns:
            bool (n_candidates,), never true for a complete one.
        """
        ...


def least_loss_within(costs: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The least loss among the members that cost no more in any respect.

    Args:
        costs: float (n, n_costs).
        members: float (n_members, 1 + n_costs), loss and costs.

    Returns:
        float (n,), infinite where every member costs more.
    """
    affordable = (members[None, :, 1:] <= costs[:, None, :]).all(axis=2)
    return np.where(affordable, members[None, :, 0], np.inf).min(axis=1, initial=np.inf)


class RankSurvival:
    """NSGA-II's selection: whole ranks survive until one does not fit; of that rank, the least crowded survive.

    A candidate behind that rank is dropped. A larger loss could only move it further back, and a candidate never
    matters for the ranks before its own.

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
        merged = np.concatenate([self._parents, objectives])
        ranks = NonDominatedSorting().do(merged, n_stop_if_ranked=self._n_survive)
        in_surviving_ranks = np.zeros(len(merged), dtype=bool)
        in_surviving_ranks[np.concatenate(ranks)] = True
        return in_surviving_ranks[len(self._parents) :] & ~complete


class NeighbourSurvival:
    """MOEA/D's selection: one after the other, a candidate replaces those neighbours that it improves on.

    The neighbours are those of the candidate's subproblem. Each has a weight vector w, and is replaced by a candidate
    of a lower Tchebycheff value max_k w_k (f_k - ideal_k), where f are objectives and `ideal` is the ideal point.

    Args:
        algorithm: MOEA/D with a population, and with the subproblems of the candidates that it has just made.
    """

    def __init__(self, algorithm: ParallelMOEAD) -> None:
        self._parents = algorithm.pop.get("F")
        self._ideal = algorithm.ideal
        self._neighbours = algorithm.neighbors[algorithm.indices]
        self._weights, self._decomposition = algorithm.ref_dirs, algorithm.decomposition

    def _scalarise(self, objectives: np.ndarray, subproblems: np.ndarray, ideal: np.ndarray) -> np.ndarray:
        """Tchebycheff values of objectives, float (n_subproblems,).

        Args:
            objectives: float (n_subproblems, n_objectives), or (1, n_objectives) for the same ones in each subproblem.
            subproblems: int (n_subproblems,).
            ideal: float (n_objectives,), the ideal point.
        """
        values: np.ndarray = self._decomposition.do(objectives, weights=self._weights[subproblems], ideal_point=ideal)
        return values

    def bounds(self, costs: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Losses with which a candidate is dominated and improves on no neighbour as it stands; see `Survival`."""
        # MOEA/D will select by an ideal point that includes this generation. Its costs are known already. Its losses
        # are not: they can only lower ideal[0], so the ideal loss so far takes their place. That is a guess, which only
        # decides where evaluation stops: `undecided` puts it right.
        ideal = self._ideal.copy()
        ideal[1:] = np.minimum(ideal[1:], costs.min(axis=0, initial=np.inf))
        # Up to here a candidate may be non-dominated: it must be complete to join the front.
        bounds = least_loss_within(costs, front)
        for i, neighbours in enumerate(self._neighbours):
            values = self._scalarise(self._parents[neighbours], neighbours, ideal)
            weights = self._weights[neighbours]
            # The value of a candidate is the largest of its terms. So a neighbour that one of the cost terms already
            # reaches is not replaced, whatever the loss.
            replaceable = (weights[:, 1:] * (costs[i] - ideal[1:]) < values[:, None]).all(axis=1)
            # All others are replaced if the loss term is below their value too, w_0 (loss - ideal_0) < value; solved
            # for the loss. A weight of 0 gives infinity: there the loss does not count.
            with np.errstate(divide="ignore"):
                replacing = ideal[0] + values[replaceable] / weights[replaceable, 0]
            # Only a loss above the largest of these replaces no neighbour at all.
            bounds[i] = max(bounds[i], replacing.max(initial=-np.inf))
        return bounds

    def undecided(self, objectives: np.ndarray, complete: np.ndarray) -> np.ndarray:
        """Those that would replace a neighbour or move the ideal point; see `Survival`."""
        ideal = np.min(np.vstack([self._ideal, objectives[complete]]), axis=0)
        ideal[1:] = np.minimum(ideal[1:], objectives[:, 1:].min(axis=0))
        # A lower bound below the ideal loss may hide a new ideal point, which would change every value.
        undecided = (objectives[:, 0] < ideal[0]) & ~complete
        parents = self._parents.copy()
        # In the order in which MOEA/D replaces, as a later candidate competes with earlier ones.
        for i, neighbours in enumerate(self._neighbours):
            candidate_values = self._scalarise(objectives[i : i + 1], neighbours, ideal)
            improved = candidate_values < self._scalarise(parents[neighbours], neighbours, ideal)
            if complete[i]:
                parents[neighbours[improved]] = objectives[i]
            elif improved.any():
                undecided[i] = True
        return undecided


def survival_of(algorithm: Algorithm) -> Survival | None:
    """How an algorithm will select among the candidates that it has just made.

    Returns:
        None where it keeps all of them (the first population), and for algorithms whose selection is not modelled here.
    """
    if not algorithm.is_initialized or algorithm.pop is None or not len(algorithm.pop):
        return None
    if isinstance(algorithm, NSGA2):
        return RankSurvival(algorithm.pop.get("F"), algorithm.pop_size)
    if isinstance(algorithm, ParallelMOEAD):
        return NeighbourSurvival(algorithm)
    return None
