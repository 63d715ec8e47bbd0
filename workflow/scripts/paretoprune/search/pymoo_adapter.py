"""pymoo's algorithms, unmodified, on packed genomes: problem, operators, and the loop that asks and tells."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from pymoo.core.algorithm import Algorithm
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination

from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import Problem as SearchProblem
from paretoprune.search.recorder import BudgetSpentError, Recorder
from paretoprune.search.survival import survival_of

# Generations in a row without a new mask after which a search ends: the algorithm only repeats itself.
PATIENCE = 50


class MaskEvaluator(Protocol):
    """The part of a `Recorder` that pymoo's problem calls."""

    @property
    def problem(self) -> SearchProblem:
        """What is searched."""
        ...

    def __call__(self, masks: PackedMasks) -> tuple[np.ndarray, np.ndarray]:
        """Objectives, float64 (n_masks, n_objectives), and whether each mask joined the front, bool (n_masks,)."""
        ...


class PruningProblem(Problem):
    """The search as a problem of pymoo: individuals are decoded to masks, which the recorder evaluates.

    Args:
        n_var: Number of variables of an individual.
        decode: From individuals (n, n_var) to masks.
        recorder: Evaluates masks.
        reward: Called with each packed genome and whether its mask joined the front.
        bounds: Lower and upper bound of real-valued individuals. None for packed genomes, whose values pymoo must not
            repair.
    """

    def __init__(
        self,
        n_var: int,
        decode: Callable[[np.ndarray], PackedMasks],
        recorder: MaskEvaluator,
        reward: Callable[[Genome, bool], None] | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        low, high = bounds or (None, None)
        super().__init__(n_var=n_var, n_obj=len(recorder.problem.objectives), xl=low, xu=high)
        self._decode, self._recorder, self._reward = decode, recorder, reward

    @classmethod
    def packed(cls, recorder: MaskEvaluator, reward: Callable[[Genome, bool], None] | None = None) -> "PruningProblem":
        """The problem whose individuals are genomes: object arrays (n, 1), of which pymoo copies only the pointers."""
        n_units = recorder.problem.units.n_units
        return cls(1, lambda x: PackedMasks.of_genomes(x[:, 0], n_units), recorder, reward)

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"], joined = self._recorder(self._decode(x))
        if self._reward:
            for (genome,), success in zip(x, joined, strict=True):
                self._reward(genome, bool(success))


def individuals(genomes: Sequence[Genome]) -> np.ndarray:
    """Genomes as pymoo's variables: an object array (n, 1)."""
    x = np.empty((len(genomes), 1), dtype=object)
    x[:, 0] = genomes
    return x


class PackedDuplicates(DuplicateElimination):
    """Finds equal genomes by their fingerprints; pymoo's default would compute a float distance of all pairs."""

    def _do(self, pop: Population, other: Population | None, is_duplicate: np.ndarray) -> np.ndarray:
        seen = {individual.X[0].fingerprint for individual in other} if other is not None else set()
        for i, individual in enumerate(pop):
            key = individual.X[0].fingerprint
            is_duplicate[i] = key in seen
            if other is None:
                seen.add(key)
        return is_duplicate


class PackedCrossover(Crossover):
    """One child of two genomes: a draft that a function (first, second, rng) -> words makes, or either parent itself.

    Args:
        cross: Makes the words of a child.
        probability: Probability that a child has two parents.
    """

    def __init__(
        self, cross: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray], probability: float
    ) -> None:
        # With a probability of its own, pymoo would cross all pairs and then discard some of the results.
        super().__init__(n_parents=2, n_offsprings=1, prob=1.0)
        self._cross, self._probability = cross, probability

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        pairs = zip(x[0, :, 0], x[1, :, 0], strict=True)
        return individuals([self._child(first, second, random_state) for first, second in pairs])[None]

    def _child(self, first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
        if rng.random() < self._probability:
            return Genome(self._cross(first.words, second.words, rng), draft=True)
        return first if rng.random() < 0.5 else second


class PackedMutation(Mutation):
    """Varies genomes by a function (genomes, rng) -> genomes."""

    def __init__(self, vary: Callable[[Sequence[Genome], np.random.Generator], Sequence[Genome]]) -> None:
        super().__init__()
        self._vary = vary

    def _do(self, problem: Problem, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        return individuals(self._vary(x[:, 0].tolist(), random_state))


class Run:
    """One of pymoo's algorithms, run generation by generation."""

    def __init__(self, algorithm: Algorithm, problem: PruningProblem, recorder: Recorder, seed: int) -> None:
        algorithm.setup(problem, termination=NoTermination(), seed=seed)
        self._algorithm, self._problem, self._recorder = algorithm, problem, recorder
        self._n_stale = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the algorithm finds nothing new, or the budget is spent."""
        return self._ended or self._n_stale >= PATIENCE or self._recorder.remaining <= 0

    def step(self) -> None:
        """Evaluate one more generation, as far as the budget pays for it."""
        recorder, algorithm = self._recorder, self._algorithm
        evaluations_before = recorder.evaluations
        candidates = algorithm.ask()
        if candidates is None or not len(candidates):
            self._ended = True
            return
        recorder.survival = survival_of(algorithm)
        try:
            algorithm.evaluator.eval(self._problem, candidates)
        except BudgetSpentError:
            self._ended = True
            return
        recorder.close_generation()
        algorithm.tell(infills=candidates)
        # pymoo would keep its last offspring in memory until the next generation, though most did not survive.
        candidates = algorithm.off = None
        self._n_stale = 0 if recorder.evaluations > evaluations_before else self._n_stale + 1


def run_algorithm(algorithm: Algorithm, problem: PruningProblem, recorder: Recorder, seed: int) -> None:
    """Run an algorithm until it repeats itself or the budget is spent; no mask beyond the budget is evaluated."""
    run = Run(algorithm, problem, recorder, seed)
    while not run.ended:
        run.step()
    recorder.close_generation()
