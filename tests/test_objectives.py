"""Costs against sums over booleans, prices that are refused, and reference points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import PlainUnits
from paretoprune.objectives import Cost, Density, GroupCost, UnitCost, reference_point

UNITS = PlainUnits(("a", "b", "c"), (60, 30, 10))
PRICES = np.array([1.0, 4.0, 0.5])
COSTS: list[Cost] = [
    Density(),
    GroupCost("macs", UNITS, PRICES),
    GroupCost("bytes", UNITS, PRICES, fixed=40.0),
    UnitCost("weight", np.random.default_rng(0).exponential(size=100)),
]
each_cost = pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.name)
SEEDS = st.integers(0, 2**32 - 1)


def random_masks(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((n, 100)) < rng.random((n, 1))


def test_the_density_is_the_share_of_kept_units() -> None:
    masks = random_masks(4, seed=0)
    np.testing.assert_array_equal(Density().of(PackedMasks.pack(masks)), masks.sum(axis=1) / 100)
    assert Density().name == "density"


@given(SEEDS)
def test_a_group_cost_adds_the_price_of_each_kept_unit_of_a_group_to_what_is_fixed(seed: int) -> None:
    masks = random_masks(3, seed)
    found = GroupCost("bytes", UNITS, PRICES, fixed=40.0).of(PackedMasks.pack(masks))
    each = np.repeat(PRICES, [60, 30, 10])
    np.testing.assert_allclose(found, [(40 + each[mask].sum()) / (40 + each.sum()) for mask in masks], rtol=1e-12)


@given(SEEDS)
def test_a_unit_cost_adds_the_price_of_each_kept_unit(seed: int) -> None:
    masks, prices = random_masks(3, seed), np.random.default_rng(seed).integers(0, 9, 100) + 0.25
    found = UnitCost("weight", prices).of(PackedMasks.pack(masks))
    np.testing.assert_allclose(found, [prices[mask].sum() / prices.sum() for mask in masks], rtol=1e-12)


def test_prices_by_hand() -> None:
    masks = PackedMasks.pack(np.array([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]))
    units = PlainUnits(("a", "b"), (2, 2))
    # Of 2 + 2 a's at 3 and b's at 1: 3 + 1 + 1 of 8, 1 of 8, nothing.
    np.testing.assert_allclose(GroupCost("macs", units, np.array([3.0, 1.0])).of(masks), [5 / 8, 1 / 8, 0])
    np.testing.assert_allclose(GroupCost("macs", units, np.array([3.0, 1.0]), 2.0).of(masks), [7 / 10, 3 / 10, 2 / 10])
    np.testing.assert_allclose(UnitCost("weight", np.array([1.0, 2.0, 3.0, 4.0])).of(masks), [8 / 10, 4 / 10, 0])


@each_cost
def test_the_mask_that_keeps_everything_costs_1_and_no_mask_costs_nothing(cost: Cost) -> None:
    assert cost.of(PackedMasks.pack(np.ones((1, 100), dtype=bool))).tolist() == [pytest.approx(1.0, abs=1e-15)]
    none = cost.of(PackedMasks.empty(100))
    assert none.shape == (0,)
    assert none.dtype == np.float64


@each_cost
@given(seed=SEEDS)
def test_to_keep_more_never_costs_less_and_equal_masks_cost_the_same(cost: Cost, seed: int) -> None:
    masks = random_masks(2, seed)
    less, more, again = cost.of(PackedMasks.pack(np.array([masks[0], masks[0] | masks[1], masks[0]])))
    assert 0 <= less <= more <= 1 + 1e-12
    assert less == again


@pytest.mark.parametrize(
    ("prices", "fixed", "found"),
    [
        ([1.0, 2.0], 0.0, r"shape \(2,\) and fixed costs 0.0"),
        ([[1.0, 2.0, 3.0]], 0.0, r"shape \(1, 3\)"),
        ([1.0, -2.0, 3.0], 0.0, r"shape \(3,\)"),
        ([1.0, 2.0, 3.0], -1.0, r"fixed costs -1.0"),
    ],
)
def test_prices_of_groups_that_are_missing_or_negative_are_refused(
    prices: list[float], fixed: float, found: str
) -> None:
    with pytest.raises(ValueError, match=f"a price of at least 0 for each of 3 groups .* found .*{found}"):
        GroupCost("macs", UNITS, np.array(prices), fixed)


def test_a_cost_that_no_mask_has_is_refused() -> None:
    with pytest.raises(ValueError, match="cost 'macs' is 0 for every mask; give at least one group a price"):
        GroupCost("macs", UNITS, np.zeros(3))
    assert GroupCost("macs", UNITS, np.zeros(3), fixed=1.0).of(PackedMasks.pack(random_masks(2, 0))).tolist() == [1, 1]


@pytest.mark.parametrize("prices", [np.zeros(100), -np.ones(100), np.ones((1, 100)), np.zeros(0)])
def test_prices_of_units_that_are_negative_or_all_0_are_refused(prices: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least 0 for each unit and one above 0 of cost 'weight', found"):
        UnitCost("weight", prices)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("error", "density"), (1.0, 1.0)),
        (("divergence", "density"), (1.0, 1.0)),
        (("error", "macs"), (1.0, 1.1)),
        (("error", "density", "macs"), (1.0, 1.1, 1.1)),
        (("error", "macs", "density"), (1.0, 1.1, 1.1)),
    ],
)
def test_the_dense_network_adds_to_a_hypervolume_unless_density_is_the_only_cost(
    names: tuple[str, ...], expected: tuple[float, ...]
) -> None:
    assert reference_point(names) == expected
