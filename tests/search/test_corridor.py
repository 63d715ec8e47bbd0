"""The corridor: packed ends against boolean masks, and which members of a front become its anchors."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks, pack_rows, unpack_row
from paretoprune.masks.units import PlainUnits, WeightUnits
from paretoprune.search.corridor import Corridor, anchors_between, choose_anchors, corridors_of, describe_corridor

# Sparsest first; with a dense error of 0.1 and guessing at 0.9, a tolerance t allows errors up to 0.1 + 0.8 t.
ERRORS = [0.80, 0.50, 0.20, 0.12, 0.10]
DENSITIES = [0.1, 0.2, 0.4, 0.6, 0.8]


def random_corridor(sizes: list[int], seed: int) -> Corridor:
    """Anchors that do not nest, so that some groups may have nothing to search."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    light, heavy = rng.random(n) < 0.7, rng.random(n) < 0.3
    light[0], heavy[0] = True, False
    layout = WeightUnits(tuple(f"layer{i}" for i in range(len(sizes))), tuple((size,) for size in sizes))
    return Corridor.between(light, heavy, layout)


SIZES = st.lists(st.integers(1, 90), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**32 - 1)


def ends(corridor: Corridor) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper end as booleans (n_weights,)."""
    n = corridor.units.n_units
    return unpack_row(corridor.lower, n), unpack_row(corridor.upper, n)


def front_of(errors: list[float], densities: list[float], order: list[int] | None = None) -> Front:
    order = order if order is not None else list(range(len(errors)))
    members = np.array(order, dtype=np.int64)
    masks = PackedMasks.pack(np.eye(len(errors), 70, dtype=bool)[members])
    return Front(masks, np.column_stack([errors, densities])[members], ["phase1"] * len(errors))


@given(SIZES, SEEDS)
def test_anchors_that_do_not_nest_both_lie_in_the_corridor(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    light, heavy = rng.random(sum(sizes)) < 0.6, rng.random(sum(sizes)) < 0.4
    light[0] = not heavy[0]
    layout = WeightUnits(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
    corridor = Corridor.between(light, heavy, layout)
    lower, upper = ends(corridor)
    for anchor in (light, heavy):
        assert not np.any(lower & ~anchor)
        assert not np.any(anchor & ~upper)
    np.testing.assert_array_equal(unpack_row(corridor.searched, sum(sizes)), light != heavy)
    assert corridor.n_searched == int((light != heavy).sum())


@given(SIZES, SEEDS)
def test_masks_outside_move_to_the_nearest_mask_in_the_corridor(sizes: list[int], seed: int) -> None:
    corridor = random_corridor(sizes, seed)
    lower, upper = ends(corridor)
    masks = np.random.default_rng(seed).random((3, sum(sizes))) < 0.5
    # PackedMasks refuses padding bits that are set.
    moved = corridor.restrict(PackedMasks.pack(masks))
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(moved.unpack(i), (mask | lower) & upper)
    np.testing.assert_array_equal(corridor.restrict(moved).words, moved.words)


def test_no_masks_move_to_no_masks() -> None:
    assert len(random_corridor([50, 40], seed=0).restrict(PackedMasks.empty(90))) == 0


@given(SIZES, SEEDS)
def test_the_groups_and_their_rankings_cover_what_is_searched_once(sizes: list[int], seed: int) -> None:
    corridor = random_corridor(sizes, seed)
    scores = np.random.default_rng(seed).random(sum(sizes))
    ranking = corridor.rank(scores)
    lower, upper = ends(corridor)
    per_group = [part.sum() for part in np.split(upper & ~lower, corridor.units.offsets[1:-1])]
    assert [group.n_searched for group in corridor.groups] == [n for n in per_group if n]
    bits = [group.word_slice.start * 64 + order for group, order in zip(corridor.groups, ranking, strict=True)]
    np.testing.assert_array_equal(np.sort(np.concatenate(bits)), np.flatnonzero(upper & ~lower))
    assert corridor.n_searched == sum(per_group)
    assert all(np.all(np.diff(scores[order]) > 0) for order in bits)


def test_identical_anchors_are_refused(layout: WeightUnits) -> None:
    mask = np.arange(layout.n_weights) % 2 == 0
    with pytest.raises(ValueError, match="the same mask, so there is nothing between them to search; choose `anchors`"):
        Corridor.between(mask, mask, layout)


def test_a_lower_end_outside_the_upper_one_is_refused(layout: WeightUnits) -> None:
    upper = np.arange(layout.n_weights) % 2 == 0
    with pytest.raises(ValueError, match="must lie inside its upper end"):
        Corridor(pack_rows(~upper[None])[0], pack_rows(upper[None])[0], layout)


def test_ends_of_another_length_are_refused(layout: WeightUnits) -> None:
    with pytest.raises(ValueError, match="expected uint64 words of shape"):
        Corridor(pack_rows(np.zeros((1, 70), dtype=bool))[0], pack_rows(np.ones((1, 70), dtype=bool))[0], layout)


@pytest.mark.parametrize(
    ("light_tolerance", "heavy_tolerance", "expected"),
    [
        pytest.param(0.05, 0.6, (3, 1), id="both rules find a member"),
        pytest.param(0.05, 0.45, (3, 2), id="tolerances are shares of the way to guessing"),
        pytest.param(0.05, 1.0, (3, 0), id="everything is within the heavy tolerance"),
        pytest.param(0.05, 0.06, (3, 2), id="no heavy member beyond light: the next sparser one"),
        pytest.param(1.0, 1.0, (1, 0), id="everything is light: one is left for heavy"),
    ],
)
def test_anchors_are_the_sparsest_members_within_their_tolerances(
    light_tolerance: float, heavy_tolerance: float, expected: tuple[int, int]
) -> None:
    front = front_of(ERRORS, DENSITIES)
    tolerances = {"light_tolerance": light_tolerance, "heavy_tolerance": heavy_tolerance}
    assert choose_anchors(front, 0.1, 0.9, **tolerances) == expected
    order = [2, 4, 0, 3, 1]
    shuffled = choose_anchors(front_of(ERRORS, DENSITIES, order), 0.1, 0.9, **tolerances)
    assert tuple(order[i] for i in shuffled) == expected


def test_without_a_member_within_the_light_tolerance_the_densest_is_light() -> None:
    tolerances = {"light_tolerance": 0.01, "heavy_tolerance": 0.6}
    assert choose_anchors(front_of(ERRORS, DENSITIES), 0.05, 0.9, **tolerances) == (4, 1)


def test_a_network_far_worse_than_dense_gives_the_two_densest_members() -> None:
    tolerances = {"light_tolerance": 0.01, "heavy_tolerance": 0.02}
    assert choose_anchors(front_of(ERRORS, DENSITIES), 0.0, 0.9, **tolerances) == (4, 3)


def test_a_front_of_two_gives_both() -> None:
    front = front_of([0.3, 0.1], [0.2, 0.7])
    assert choose_anchors(front, 0.0, 0.9, light_tolerance=0.9, heavy_tolerance=1.0) == (1, 0)


@given(n=st.integers(2, 12), light=st.floats(0, 0.99), seed=SEEDS)
def test_the_heavy_anchor_is_always_sparser_than_the_light_one(n: int, light: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    front = front_of(np.sort(rng.random(n))[::-1].tolist(), np.sort(rng.random(n)).tolist())
    i, j = choose_anchors(front, 0.1, 0.9, light_tolerance=light, heavy_tolerance=light + 0.01)
    assert front.density[j] < front.density[i]


def test_the_only_member_of_a_front_is_both_anchors_and_leaves_all_masks_to_search() -> None:
    front = front_of(ERRORS[:1], DENSITIES[:1])
    assert choose_anchors(front, 0.1, 0.9, light_tolerance=0.1, heavy_tolerance=0.5) == (0, 0)
    assert anchors_between(front, 0, 0, 4) == [0]
    units = PlainUnits(("a", "b"), (30, 40))
    (corridor,) = corridors_of(front.masks, units)
    assert corridor.n_searched == 70


def test_an_empty_front_has_no_anchors() -> None:
    with pytest.raises(ValueError, match=r"at least one member, found none: .*empty_layers: allow"):
        choose_anchors(Front.empty(70), 0.1, 0.9, light_tolerance=0.1, heavy_tolerance=0.5)


# Several corridors


@given(SIZES, st.integers(1, 4), SEEDS)
def test_the_corridor_around_masks_is_the_smallest_that_holds_them(sizes: list[int], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((n + 1, sum(sizes))) < 0.5
    masks[0, 0], masks[1, 0] = True, False
    layout = WeightUnits(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
    corridor = Corridor.around(PackedMasks.pack(masks), layout)
    lower, upper = ends(corridor)
    np.testing.assert_array_equal(lower, masks.all(axis=0))
    np.testing.assert_array_equal(upper, masks.any(axis=0))
    np.testing.assert_array_equal(corridor.restrict(PackedMasks.pack(masks)).words, PackedMasks.pack(masks).words)
    two = Corridor.around(PackedMasks.pack(masks[:2]), layout)
    between = Corridor.between(masks[0], masks[1], layout)
    np.testing.assert_array_equal(np.stack([two.lower, two.upper]), np.stack([between.lower, between.upper]))


def test_the_corridor_around_one_mask_is_refused(layout: WeightUnits) -> None:
    with pytest.raises(ValueError, match="nothing between them to search"):
        Corridor.around(PackedMasks.pack(np.ones((1, layout.n_weights), dtype=bool)), layout)


@given(SIZES)
def test_everything_is_searched_without_a_corridor(sizes: list[int]) -> None:
    layout = WeightUnits(tuple(map(str, range(len(sizes)))), tuple((size,) for size in sizes))
    corridor = Corridor.everything(layout)
    assert corridor.n_searched == sum(sizes)
    assert [group.n_searched for group in corridor.groups] == sizes
    masks = PackedMasks.pack(np.random.default_rng(0).random((3, sum(sizes))) < 0.5)
    np.testing.assert_array_equal(corridor.restrict(masks).words, masks.words)


@given(n=st.integers(2, 30), n_corridors=st.integers(1, 8), seed=SEEDS)
def test_anchors_cut_the_front_into_stretches_of_about_equal_length(n: int, n_corridors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors, densities = np.sort(rng.random(n))[::-1], np.sort(rng.random(n))
    order = rng.permutation(n)
    front = front_of(errors.tolist(), densities.tolist(), order.tolist())
    light_at, heavy_at = sorted(rng.choice(n, 2, replace=False).tolist(), reverse=True)
    light, heavy = (int(np.flatnonzero(order == at)[0]) for at in (light_at, heavy_at))
    found = anchors_between(front, light, heavy, n_corridors)
    assert (found[0], found[-1]) == (light, heavy)
    assert all(type(i) is int for i in found)
    assert 2 <= len(found) <= n_corridors + 1
    assert np.all(np.diff(front.density[found]) < 0)

    def length(a: int, b: int) -> float:
        """Length of the front between two members: one objective falls and the other rises all the way."""
        return float(np.abs(front.objectives[a] - front.objectives[b]).sum())

    whole = length(light, heavy)
    members = np.concatenate([[light_at], np.arange(light_at - 1, heavy_at - 1, -1)])
    steps = [
        length(int(np.flatnonzero(order == a)[0]), int(np.flatnonzero(order == b)[0])) for a, b in pairwise(members)
    ]
    # Each anchor is as near to its cut as the distances between members allow.
    for i in range(1, n_corridors):
        wanted = whole * i / n_corridors
        nearest = min(abs(length(light, int(np.flatnonzero(order == m)[0])) - wanted) for m in members)
        assert min(abs(length(light, anchor) - wanted) for anchor in found) <= nearest + 1e-9
    assert max(length(a, b) for a, b in pairwise(found)) <= whole / n_corridors + 2 * max(steps) + 1e-9


def test_one_corridor_has_the_two_anchors() -> None:
    assert anchors_between(front_of(ERRORS, DENSITIES), 4, 1, 1) == [4, 1]
    assert anchors_between(front_of(ERRORS, DENSITIES), 1, 0, 5) == [1, 0]


def test_length_counts_error_and_density_alike() -> None:
    # From the densest on, the members lie at 0, 0.22, 0.5, 1.0 and 1.4.
    assert anchors_between(front_of(ERRORS, DENSITIES), 4, 0, 2) == [4, 2, 0]
    assert anchors_between(front_of(ERRORS, DENSITIES), 4, 0, 3) == [4, 2, 1, 0]


def test_corridors_lie_between_neighbouring_anchors_or_are_one_of_everything() -> None:
    rng = np.random.default_rng(0)
    layout = WeightUnits(("a", "b"), ((40,), (30,)))
    masks = PackedMasks.pack(rng.random((4, 70)) < np.array([[0.8], [0.6], [0.4], [0.2]]))
    found = corridors_of(masks, layout)
    assert len(found) == 3
    for i, corridor in enumerate(found):
        expected = Corridor.between(masks.unpack(i), masks.unpack(i + 1), layout)
        np.testing.assert_array_equal(corridor.lower, expected.lower)
        np.testing.assert_array_equal(corridor.upper, expected.upper)
    assert Corridor.everything(layout).n_searched == 70


# Descriptions


def test_the_description_accounts_for_every_weight_of_every_layer(layout: WeightUnits) -> None:
    rng = np.random.default_rng(0)
    light, heavy = rng.random((2, layout.n_weights)) < [[0.6], [0.3]]
    front = Front(PackedMasks.pack(np.array([heavy, light])), np.array([[0.5, 0.3], [0.1, 0.6]]), ["phase1"] * 2)
    corridor = Corridor.between(light, heavy, layout)
    description = describe_corridor(front, 1, 0, corridor)
    assert description["light"] == {"id": 1, "density": 0.6, "error": 0.1}
    assert description["heavy"] == {"id": 0, "density": 0.3, "error": 0.5}
    assert description["n_weights"] == 394
    assert description["n_corridor"] == int((light != heavy).sum())
    parts = zip(layout.split(light & heavy).values(), layout.split(light | heavy).values(), strict=True)
    for row, name, size, (lower, upper) in zip(description["layers"], layout.names, layout.sizes, parts, strict=True):
        assert row == {
            "layer": name,
            "n_weights": size,
            "n_always_kept": lower.sum(),
            "n_corridor": (upper & ~lower).sum(),
            "n_always_dropped": (~upper).sum(),
        }
        assert all(type(value) in (int, str) for value in row.values())
