"""Feature selection: which of 10,000 features a classifier uses, its error against the number of features.

Features come from 20 sensors. A few of them are informative, each of these equally by itself. The informative features
of one sensor share its noise, which is stronger in some sensors than in others. scikit-learn's F-values say how
informative a feature is by itself. So they are right within a sensor, but not between sensors: if noise is shared, a
second feature of the sensor adds little.

Run it from the root of the repository: `PYTHONPATH=workflow/scripts python -m examples.feature_selection`
"""

from dataclasses import dataclass

import numpy as np
from paretoprune.fronts import Front, hypervolume
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.recorder import SearchResult
from sklearn.feature_selection import f_classif

from examples.comparison import compare, table

N_SENSORS = 20
N_TRAIN, N_SEARCH, N_TEST = 400, 1500, 1500


def draw_samples(n_features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples of all splits, float32 (n_samples, n_features), and their classes, 0 or 1, int64 (n_samples,)."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, N_TRAIN + N_SEARCH + N_TEST)
    shared = rng.uniform(0, 2, N_SENSORS)
    signal = np.outer(classes - 0.5, 0.4 * np.sqrt(1 + shared**2))
    by_sensor = signal + shared * rng.standard_normal((len(classes), N_SENSORS))
    features = rng.standard_normal((len(classes), n_features), dtype=np.float32)
    informative = rng.permutation(n_features)[: n_features * 3 // 100]
    features[:, informative] += by_sensor[:, informative // (n_features // N_SENSORS)]
    return features, classes


@dataclass(frozen=True)
class NearestCentroid:
    """A nearest-centroid classifier on standardised features, for many sets of features at once.

    The vote of a feature does not depend on the others, so that a set of features is evaluated by adding votes.

    Attributes:
        votes: float32 (n_samples, n_features), above 0 for class 1.
        classes: int64 (n_samples,), 0 or 1.
    """

    votes: np.ndarray
    classes: np.ndarray

    def error(self, masks: PackedMasks) -> np.ndarray:
        """Share of wrong classes, float64 (n_masks,); without any feature all samples are classified as 0."""
        chosen = np.stack([masks.unpack(i) for i in range(len(masks))], axis=1).astype(np.float32)
        return np.asarray(((self.votes @ chosen > 0) != self.classes[:, None]).mean(axis=0))

    def hypervolume(self, front: Front) -> float:
        """The hypervolume of a front's masks with their errors on these samples."""
        return hypervolume(np.column_stack([self.error(front.masks), front.costs]), front.reference)


def run(n_features: int, effort: Effort) -> tuple[NearestCentroid, dict[str, SearchResult]]:
    """Run all methods on the search split; returns the classifier on the test split, and results by method."""
    features, classes = draw_samples(n_features, effort.seed)
    train, search, test = np.split(np.arange(len(classes)), [N_TRAIN, N_TRAIN + N_SEARCH])
    f_values, _ = f_classif(features[train], classes[train])
    zero, one = (features[train][classes[train] == k].mean(axis=0) for k in (0, 1))
    votes = (features - (zero + one) / 2) * ((one - zero) / features[train].var(axis=0))
    on_search, on_test = (NearestCentroid(votes[split], classes[split]) for split in (search, test))
    sensors = PlainUnits(tuple(f"sensor {i}" for i in range(N_SENSORS)), (n_features // N_SENSORS,) * N_SENSORS)
    return on_test, compare(Problem(sensors, on_search.error), f_values, effort)


def main() -> None:
    """Search three data sets with 1500 evaluations each, and print the tables of docs/problems.md."""
    results = [run(10_000, Effort(evaluations=1500, population=60, seed=seed)) for seed in range(3)]
    on_search, on_test, n_features, error = {}, {}, {}, {}
    for name in results[0][1]:
        fronts = [(test, found[name].front) for test, found in results]
        # The member of least error on the search split, whose error there is partly luck.
        best = [(test, front.masks.select([int(front.error.argmin())])) for test, front in fronts]
        on_search[name] = [front.hypervolume() for _, front in fronts]
        on_test[name] = [test.hypervolume(front) for test, front in fronts]
        n_features[name] = [int(mask.n_kept[0]) for _, mask in best]
        error[name] = [float(test.error(mask)[0]) for test, mask in best]
    print(table("hypervolume, search split", on_search, gains=True), end="\n\n")
    print(table("hypervolume, test split", on_test, gains=True), end="\n\n")
    print(table("features of the best on search", n_features, digits=0), end="\n\n")
    print(table("its error on the test split", error))


if __name__ == "__main__":
    main()
