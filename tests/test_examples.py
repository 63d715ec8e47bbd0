"""The examples of problems without networks, smaller than they are run: ours is ahead of each comparison every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paretoprune.masks.packed import PackedMasks
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult
from sklearn.neighbors import NearestCentroid

from examples import feature_selection, knapsack
from examples.comparison import FLAT, OURS, PYMOO, SORTED, table

SEEDS = range(3)


def effort(seed: int) -> Effort:
    return Effort(evaluations=400, population=40, seed=seed)


def gains(found: dict[str, SearchResult]) -> dict[str, float]:
    """Hypervolume of ours over that of each other method, once it is sure that all have spent as much."""
    assert {result.history[-1]["evaluations"] for result in found.values()} == {400}
    ours = found[OURS].front.hypervolume()
    return {name: ours / result.front.hypervolume() for name, result in found.items() if name != OURS}


@pytest.mark.parametrize("seed", SEEDS)
def test_knapsack(seed: int) -> None:
    problem, found = knapsack.run(2000, effort(seed))
    gain = gains(found)
    assert gain[FLAT] > 1.15
    assert gain[PYMOO] > 1.5
    assert gain[SORTED] > 1.01
    front = found[OURS].front
    assert front.hypervolume() < problem.best_hypervolume(front.reference)


@pytest.mark.parametrize("seed", SEEDS)
def test_feature_selection(seed: int) -> None:
    test, found = feature_selection.run(2000, effort(seed))
    gain = gains(found)
    assert gain[FLAT] > 1.1
    assert gain[PYMOO] > 1.5
    assert gain[SORTED] > 1
    # Also on samples that no search has seen.
    assert test.hypervolume(found[OURS].front) > 1.1 * test.hypervolume(found[FLAT].front)


def test_votes_are_the_nearest_centroid_of_scikit_learn() -> None:
    features, classes = feature_selection.draw_samples(200, 0)
    evaluate, _ = feature_selection.run(200, Effort(evaluations=80, population=8, seed=0))
    n_train = feature_selection.N_TRAIN
    scaled = features / features[:n_train].std(axis=0)
    chosen = np.random.default_rng(0).random(200) < 0.1
    peer = NearestCentroid().fit(scaled[:n_train][:, chosen], classes[:n_train])
    expected = (peer.predict(scaled[-feature_selection.N_TEST :][:, chosen]) != evaluate.classes).mean()
    assert evaluate.error(PackedMasks.pack(chosen))[0] == pytest.approx(expected, abs=1e-3)


def test_a_table_says_how_far_ours_is_above_the_others() -> None:
    lines = table("hypervolume", {OURS: [0.6, 0.9], "other": [0.5, 0.6]}, gains=True).splitlines()
    assert lines[0].split() == ["hypervolume", "seed", "0", "seed", "1", "ours", "above", "it", "by"]
    assert lines[1].split() == [*OURS.split(), "0.6000", "0.9000"]
    assert lines[2].split() == ["other", "0.5000", "0.6000", "20.0%", "50.0%"]


def test_the_code_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "problems.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "documentation"}
    exec(text.split("```python\n")[1].split("```")[0], namespace)
    assert 0 < len(namespace["packed_items"]) < 1000
    assert len(capsys.readouterr().out.splitlines()) == 10
