"""Fronts: hypervolume and non-dominated sets against brute force, the choice of members, and files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.fronts import Front, hypervolume, hypervolume_subset, knee, non_dominated
from paretoprune.masks.packed import PackedMasks
from torch import nn

N_WEIGHTS = 70
# Coordinates in tenths, some beyond the reference point, so that ties and equal points are common.
POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12)


def front_of(points: list[tuple[float, float]], stage: str = "phase1", first_mask: int = 0) -> Front:
    """Points (error, density) as members whose masks are all different, but do not have that density."""
    masks = (np.arange(first_mask, first_mask + len(points))[:, None] >> np.arange(N_WEIGHTS)) & 1
    return Front(PackedMasks.pack(masks.reshape(-1, N_WEIGHTS)), np.array(points), [stage] * len(points))


def sorted_front(n: int, seed: int, highest_error: float = 1.0) -> np.ndarray:
    """A non-dominated set, sparsest first."""
    rng = np.random.default_rng(seed)
    return np.column_stack([np.sort(rng.random(n) * highest_error)[::-1], np.sort(rng.random(n))])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),
        ([(0.5, 0.5)], 0.25),
        ([(0.0, 0.0)], 1.0),
        ([(1.0, 0.2)], 0.0),
        ([(0.3, 1.0)], 0.0),
        ([(0.6, 0.2), (0.2, 0.7)], 0.4 * 0.8 + 0.4 * 0.3),
        ([(0.6, 0.2), (0.2, 0.7), (0.7, 0.7)], 0.4 * 0.8 + 0.4 * 0.3),
        ([(0.5, 0.5), (1.4, 0.1)], 0.25),
        ([(1.4, 0.1), (0.2, 1.5)], 0.0),
        ([(0.5, 0.5), (0.5, 0.5)], 0.25),
    ],
)
def test_hypervolume_is_the_area_computed_by_hand(points: list[tuple[float, float]], expected: float) -> None:
    assert hypervolume(np.array(points)) == pytest.approx(expected, abs=1e-12)


@given(POINTS)
def test_hypervolume_counts_the_dominated_cells_of_a_grid(points: list[tuple[int, int]]) -> None:
    row, column = np.indices((10, 10))
    dominated = np.zeros((10, 10), dtype=bool)
    for error, density in points:
        dominated |= (row >= error) & (column >= density)
    assert hypervolume(np.array(points) / 10) == pytest.approx(dominated.sum() / 100, abs=1e-12)


@given(POINTS)
def test_non_dominated_points_are_those_of_a_brute_force(points: list[tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    expected = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points) and p not in points[:i]]
    found = non_dominated(np.array(points) / 10).tolist()
    assert sorted(found) == expected
    assert [points[i][1] for i in found] == sorted(points[i][1] for i in found)


@pytest.mark.parametrize("highest_error", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_subset_takes_the_least_contributor_away_each_time(seed: int, highest_error: float) -> None:
    objectives = sorted_front(12, seed, highest_error)
    kept = list(range(12))
    for size in range(11, 1, -1):
        without = [hypervolume(objectives[[k for k in kept if k != i]]) for i in kept]
        kept.pop(int(np.argmax(without)))
        subset = hypervolume_subset(objectives, size)
        assert len(subset) == size
        assert hypervolume(objectives[subset]) == pytest.approx(hypervolume(objectives[kept]), abs=1e-12)


def test_hypervolume_subset_sorts_by_density_whatever_the_order() -> None:
    objectives = sorted_front(8, seed=3)
    shuffled = np.random.default_rng(0).permutation(8)
    subset = hypervolume_subset(objectives[shuffled], 4)
    np.testing.assert_array_equal(objectives[shuffled][subset], objectives[hypervolume_subset(objectives, 4)])


def test_a_front_that_is_small_enough_is_kept_whole() -> None:
    assert hypervolume_subset(sorted_front(5, seed=0), 9).tolist() == [0, 1, 2, 3, 4]


def test_the_knee_is_farthest_below_the_line_between_the_ends() -> None:
    # Scaled to the unit square the middle points sum to 0.9, 0.6 and 1.1: the third member of five.
    errors, densities = np.array([1.0, 0.6, 0.3, 0.2, 0.0]), np.array([0.0, 0.3, 0.3, 0.9, 1.0])
    assert knee(np.column_stack([0.1 + 0.5 * errors, 0.05 + 0.2 * densities])) == 2


def test_the_knee_does_not_depend_on_the_scale_of_an_axis() -> None:
    objectives = sorted_front(9, seed=1)
    assert knee(objectives) == knee(objectives * [100.0, 0.001] + [3.0, 0.2])


@pytest.mark.parametrize("points", [[(0.3, 0.5)], [(0.5, 0.2), (0.1, 0.9)], [(0.1, 0.9), (0.5, 0.2)]])
def test_a_front_of_one_or_two_has_its_sparsest_as_knee(points: list[tuple[float, float]]) -> None:
    densities = [density for _, density in points]
    assert densities[knee(np.array(points))] == min(densities)


def test_an_empty_front_has_no_knee() -> None:
    with pytest.raises(ValueError, match="at least one member, found none"):
        Front.empty(N_WEIGHTS).knee()


def test_merging_keeps_the_non_dominated_of_both_sparsest_first() -> None:
    first = front_of([(0.6, 0.2), (0.1, 0.9)], "phase1")
    merged = first.merge(front_of([(0.3, 0.5), (0.7, 0.3)], "phase2", first_mask=5))
    assert merged.objectives.tolist() == [[0.6, 0.2], [0.3, 0.5], [0.1, 0.9]]
    assert merged.stages == ["phase1", "phase2", "phase1"]
    np.testing.assert_array_equal(merged.masks.n_kept, np.bitwise_count(np.array([0, 5, 1])))
    assert merged.sparsity.tolist() == [0.8, 0.5, pytest.approx(0.1)]


def test_of_equal_points_the_fronts_own_member_stays() -> None:
    own, other = front_of([(0.5, 0.5)], "phase1", first_mask=1), front_of([(0.5, 0.5)], "phase2", first_mask=2)
    assert own.merge(other).stages == ["phase1"]
    assert other.merge(own).stages == ["phase2"]


@given(POINTS, POINTS)
def test_a_merged_front_never_loses_hypervolume(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    first = front_of([(e / 10, d / 10) for e, d in ours])
    second = front_of([(e / 10, d / 10) for e, d in theirs], "phase2", first_mask=20)
    merged = first.merge(second)
    assert merged.hypervolume() >= max(first.hypervolume(), second.hypervolume()) - 1e-12
    assert len(non_dominated(merged.objectives)) == len(merged)


def test_fronts_over_different_numbers_of_weights_do_not_merge() -> None:
    with pytest.raises(ValueError, match="expected masks of 70 units, found 71"):
        Front.empty(70).merge(Front.empty(71))


def test_thinning_keeps_what_hypervolume_subset_keeps_and_none_keeps_all() -> None:
    front = front_of([(e, d) for e, d in sorted_front(7, seed=2)])
    np.testing.assert_array_equal(
        front.thinned(3).objectives, front.objectives[hypervolume_subset(front.objectives, 3)]
    )
    assert len(front.thinned(None)) == 7


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("sparsities", [[0.9], [0.35, 0.05], [0.61, 0.6], [0.2, 0.5, 0.8], [1.0]])
def test_thinning_keeps_the_best_member_beyond_each_sparsity_while_it_can(size: int, sparsities: list[float]) -> None:
    # Sparsities 0.9, 0.8, ..., 0.0; those in the middle add hardly any hypervolume.
    front = front_of([(0.9 - 0.3 * d, d) for d in np.arange(1, 11) / 10])
    left = front.thinned(size, sparsities)
    assert len(left) == min(size, 10)
    best = [max(m for m in front.density if 1 - m >= s - 1e-6) for s in sparsities if s < 0.95]
    found = sum(bool(np.any(np.abs(left.density - density) < 1e-6)) for density in set(best))
    assert found == min(size, len(set(best)))
    np.testing.assert_array_equal(front.thinned(size, []).objectives, front.thinned(size).objectives)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.8, 0), (1.0, 0), (0.5, 1), (0.0, 2), (0.2, 2)])
def test_the_closest_member_has_the_nearest_sparsity(sparsity: float, expected: int) -> None:
    assert front_of([(0.6, 0.2), (0.3, 0.5), (0.1, 0.9)]).closest(sparsity=sparsity) == expected


def test_of_two_equally_close_members_the_one_with_less_error_is_chosen() -> None:
    assert front_of([(0.6, 0.25), (0.3, 0.75)]).closest(sparsity=0.5) == 1


@pytest.mark.parametrize("sparsity", [-0.1, 80])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"expected a sparsity between 0 and 1, found .*; 80 % is 0\.8"):
        front_of([(0.5, 0.5)]).closest(sparsity=sparsity)


def test_an_empty_front_has_no_closest_member() -> None:
    with pytest.raises(ValueError, match="no members"):
        Front.empty(N_WEIGHTS).closest(sparsity=0.5)


@pytest.mark.parametrize(("n_masks", "n_objectives", "n_stages"), [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_lengths_that_do_not_match_are_refused(n_masks: int, n_objectives: int, n_stages: int) -> None:
    masks = PackedMasks.pack(np.ones((n_masks, N_WEIGHTS), dtype=bool))
    message = f"found {n_masks} masks, {n_objectives} objectives and {n_stages} stages"
    with pytest.raises(ValueError, match=message):
        Front(masks, np.zeros((n_objectives, 2)), ["phase1"] * n_stages)


@pytest.mark.parametrize("points", [[(0.6, 0.2), (0.1, 0.9)], []])
def test_a_saved_front_loads_as_it_was_without_pickle(tmp_path: Path, points: list[tuple[float, float]]) -> None:
    front = front_of(points, "phase2")
    front.save(tmp_path / "front.npz")
    with np.load(tmp_path / "front.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"words", "n_weights", "objectives", "stages"}
        assert all(arrays[name].dtype != object for name in arrays.files)
    loaded = Front.load(tmp_path / "front.npz")
    np.testing.assert_array_equal(loaded.masks.words, front.masks.words)
    np.testing.assert_array_equal(loaded.objectives, front.objectives)
    assert loaded.masks.n_units == N_WEIGHTS
    assert loaded.stages == front.stages
    assert all(type(stage) is str for stage in loaded.stages)


def test_a_front_from_a_file_builds_no_networks() -> None:
    with pytest.raises(RuntimeError, match="read from a file and knows no network; call pareto_prune"):
        front_of([(0.5, 0.5)]).network(0)


def test_a_front_hands_out_the_state_of_the_member_in_a_network_of_its_own() -> None:
    front, dense = front_of([(0.6, 0.2), (0.1, 0.9)], first_mask=4), nn.Linear(2, 1)
    front.dense, front.states = dense, [nn.Linear(2, 1).state_dict() for _ in range(2)]
    before = dense.weight.clone()
    chosen = front.select(np.array([1]))
    network = chosen.network(0)
    assert torch.equal(network.get_parameter("weight"), front.states[1]["weight"])
    network.get_parameter("weight").data.zero_()
    assert torch.equal(chosen.network(0).get_parameter("weight"), front.states[1]["weight"])
    assert torch.equal(dense.weight, before)


BOXES = np.array([[0.5, 0.5, 0.5], [0.75, 0.25, 0.5], [0.25, 0.75, 0.8]])


def test_three_objectives_have_the_volume_of_their_boxes() -> None:
    front = Front(PackedMasks.pack(np.eye(3, 70, dtype=bool)), BOXES, ["x"] * 3, ("error", "density", "macs"))
    assert front.reference == (1.0, 1.1, 1.1)
    first, second, third = (np.prod(front.reference - row) for row in BOXES)
    # Two boxes up to the reference point overlap in the box of the larger value in each objective.
    both = [np.prod(front.reference - np.maximum(BOXES[a], BOXES[b])) for a, b in ((0, 1), (0, 2), (1, 2))]
    every = np.prod(front.reference - BOXES.max(axis=0))
    assert front.hypervolume() == pytest.approx(first + second + third - sum(both) + every, abs=1e-12)


def test_three_objectives_are_merged_thinned_and_kept_in_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("error", "density", "macs")
    masks, points = PackedMasks.pack(rng.random((40, 70)) < 0.5), rng.random((40, 3))
    whole = Front(masks, points, ["a"] * 40, names)
    front = Front.empty(70, names).merge(whole.select(np.arange(20))).merge(whole.select(np.arange(20, 40)))
    dominated = [any(np.all(q <= p) and np.any(q < p) for q in points) for p in points]
    assert sorted(front.objectives.tolist()) == sorted(points[~np.array(dominated)].tolist())
    assert np.all(np.diff(front.costs[:, 0]) >= 0)
    small = front.thinned(5)
    # By hand: one after the other, the member whose removal loses least.
    expected = front
    while len(expected) > 5:
        losses = [expected.select(np.delete(np.arange(len(expected)), i)).hypervolume() for i in range(len(expected))]
        expected = expected.select(np.delete(np.arange(len(expected)), int(np.argmax(losses))))
    assert np.array_equal(small.objectives, expected.objectives)
    front.save(tmp_path / "front.npz")
    loaded = Front.load(tmp_path / "front.npz")
    assert loaded.names == names
    assert np.array_equal(loaded.objectives, front.objectives)
    with pytest.raises(ValueError, match="same objectives, found error, density, macs and error, density"):
        front.merge(Front.empty(70))


def test_a_front_of_error_and_density_has_the_arrays_it_always_had(tmp_path: Path) -> None:
    front_of([(0.6, 0.2), (0.1, 0.9)]).save(tmp_path / "front.npz")
    with np.load(tmp_path / "front.npz") as arrays:
        assert set(arrays) == {"words", "n_weights", "objectives", "stages"}


@pytest.mark.parametrize("shape", [(4, 3), (6,), (2, 1)])
def test_points_that_do_not_fit_the_reference_have_no_hypervolume(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected points with 2 objectives as the reference has, found shape"):
        hypervolume(np.full(shape, 0.5))
