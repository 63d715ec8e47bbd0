"""Rungs, and moves between them."""

import copy

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.search.levels import nearest_rungs, switch_levels
from spaces import SEEDS

RUNGS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8, unique=True).map(lambda rungs: np.array(sorted(rungs)))


@given(rungs=RUNGS, densities=st.lists(st.floats(0.0005, 1.0), min_size=1, max_size=10))
def test_the_nearest_rung_is_nearest_in_the_logarithm(rungs: np.ndarray, densities: list[float]) -> None:
    found = nearest_rungs(np.array(densities), rungs)
    for density, level in zip(densities, found, strict=True):
        distances = np.abs(np.log(density) - np.log(rungs))
        assert distances[level] <= distances.min() + 1e-9


@given(RUNGS)
def test_rungs_are_nearest_to_themselves_and_the_ends_to_the_ends(rungs: np.ndarray) -> None:
    np.testing.assert_array_equal(nearest_rungs(rungs, rungs), np.arange(len(rungs)))
    table = np.array([[0.0, 1.0], [rungs[0], rungs[-1]]])
    np.testing.assert_array_equal(nearest_rungs(table, rungs), [[0, len(rungs) - 1]] * 2)


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8), n_rungs=st.integers(1, 12), seed=SEEDS)
def test_level_switches_keep_the_total_to_within_one_step(sizes: list[int], n_rungs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = np.rint(np.geomspace(0.005, 1.0, n_rungs) * np.array(sizes)[:, None]).astype(int)
    groups = np.arange(len(sizes))
    levels = rng.integers(0, n_rungs, len(sizes))
    before = levels.copy()
    way = 1 if copy.deepcopy(rng).random() < 0.5 else -1
    found = switch_levels(levels, kept, rng)
    np.testing.assert_array_equal(levels, before)
    moved = found - levels
    assert np.abs(moved).max() <= 1
    assert found.min() >= 0
    assert found.max() < n_rungs
    # One group moves in one direction, all others that move in the other.
    first = np.flatnonzero(moved == way)
    assert len(first) <= 1
    change = kept[groups, found] - kept[groups, levels]
    if len(first):
        assert abs(int(change.sum())) <= abs(int(change[first[0]]))
    else:
        assert not np.any(moved)


def test_level_switches_go_either_way_from_any_group_and_are_compensated_by_others() -> None:
    rng = np.random.default_rng(0)
    kept = np.array([[10, 20, 40]] * 6)
    levels = np.ones(6, dtype=int)
    moves = [switch_levels(levels, kept, rng) - levels for _ in range(300)]
    # 20 up is compensated by two groups 10 down; 10 down by one group 20 up, exactly twice the excess.
    kinds = {((m == 1).sum().item(), (m == -1).sum().item()) for m in moves}
    assert kinds == {(1, 2), (1, 1)}
    assert {int(np.flatnonzero(m == 1)[0]) for m in moves} == set(range(6))
    assert len({int(np.flatnonzero(m == -1)[0]) for m in moves}) >= 5


def test_a_group_much_larger_than_the_excess_does_not_move() -> None:
    kept = np.array([[1, 2], [1000, 5000]])
    found = {tuple(switch_levels(np.array([0, 1]), kept, np.random.default_rng(i)).tolist()) for i in range(50)}
    # A step of the large group is too large to compensate the small one; the small one moves if the large one does.
    assert found == {(1, 1), (1, 0)}
