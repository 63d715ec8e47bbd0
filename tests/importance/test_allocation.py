"""Allocations: the classical rules against their definitions, exact totals, and no layer beyond its size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.importance.allocation import ALLOCATIONS, STARTS, allocate, starting_allocations
from paretoprune.masks.units import WeightUnits

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
)


def layout_of(shapes: list[tuple[int, ...]]) -> WeightUnits:
    return WeightUnits(tuple(f"layer{i}" for i in range(len(shapes))), tuple(shapes))


@pytest.mark.parametrize("rule", ALLOCATIONS)
@given(shapes=SHAPES, density=st.floats(0, 1), n_values=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_allocations_add_up_exactly_and_never_exceed_a_layer(
    rule: str, shapes: list[tuple[int, ...]], density: float, n_values: int, seed: int
) -> None:
    several = layout_of(shapes)
    scores = np.random.default_rng(seed).integers(0, n_values, several.n_weights).astype(float)
    counts = allocate(rule, scores, several, density)
    assert counts.dtype == np.int64
    assert counts.shape == (several.n_layers,)
    assert counts.sum() == round(density * several.n_weights)
    assert np.all(counts >= 0)
    assert np.all(counts <= several.sizes)


@given(SHAPES, st.floats(0, 1))
def test_uniform_gives_every_layer_the_same_density_to_within_a_weight(
    shapes: list[tuple[int, ...]], density: float
) -> None:
    several = layout_of(shapes)
    counts = allocate("uniform", np.zeros(several.n_weights), several, density)
    share = round(density * several.n_weights) / several.n_weights
    assert np.all(np.abs(counts - several.sizes * share) < 1)


@given(SHAPES, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_global_ranking_counts_the_best_of_a_full_sort(
    shapes: list[tuple[int, ...]], density: float, seed: int
) -> None:
    several = layout_of(shapes)
    scores = np.random.default_rng(seed).permutation(several.n_weights).astype(float)
    n_keep = round(density * several.n_weights)
    best = sorted(range(several.n_weights), key=lambda i: scores[i], reverse=True)[:n_keep]
    expected = [
        sum(start <= i < stop for i in best)
        for start, stop in zip(several.offsets[:-1], several.offsets[1:], strict=True)
    ]
    assert allocate("global", scores, several, density).tolist() == expected


def test_global_ranking_follows_the_scores_across_layers() -> None:
    scores = np.concatenate([np.full(12, 3.0), np.full(20, 1.0), np.full(8, 2.0)])
    several = layout_of([(3, 4), (4, 5), (2, 4)])
    assert allocate("global", scores, several, 0.4).tolist() == [12, 0, 4]


def test_erdos_renyi_kernel_follows_the_paper_where_a_layer_is_capped_at_one() -> None:
    # Evci et al.: density of layer l is eps * (sum of its dimensions) / (their product), and 1 where that exceeds 1.
    # Ratios: (2+3+3+3)/54 = 0.2037, (8+8+3+3)/576 = 0.0382, (4+8)/32 = 0.375; the sums are 11, 22 and 12.
    # 164 of 662 weights: eps = 164/45 = 3.64 would give densities 0.742, 0.139 and 1.37, so the third layer stays
    # dense; the others share 132: eps = 132/33 = 4, which gives 4 * 11 and 4 * 22 weights.
    several = layout_of([(2, 3, 3, 3), (8, 8, 3, 3), (4, 8)])
    assert allocate("erdos_renyi_kernel", np.zeros(662), several, 164 / 662).tolist() == [44, 88, 32]
    # 200 weights: eps = 4.44 caps the third; the others share 168: eps = 168/33 = 5.09 gives densities 1.037 and
    # 0.194, so the first stays dense as well and the second gets what is left, 200 - 54 - 32 = 114.
    assert allocate("erdos_renyi_kernel", np.zeros(662), several, 200 / 662).tolist() == [54, 114, 32]


def test_erdos_renyi_kernel_is_proportional_to_the_sum_of_dimensions_where_nothing_is_capped() -> None:
    # The sums are 11, 22 and 12 of 45 in all; 45 weights are shared without a remainder.
    several = layout_of([(2, 3, 3, 3), (8, 8, 3, 3), (4, 8)])
    assert allocate("erdos_renyi_kernel", np.zeros(662), several, 45 / 662).tolist() == [11, 22, 12]


@pytest.mark.parametrize("rule", ALLOCATIONS)
def test_the_ends_keep_nothing_and_everything(rule: str, layout: WeightUnits) -> None:
    scores = np.arange(layout.n_weights, dtype=float)
    assert allocate(rule, scores, layout, 0.0).tolist() == [0, 0, 0]
    assert allocate(rule, scores, layout, 1.0).tolist() == layout.sizes.tolist()


def test_an_unknown_rule_is_refused_with_the_known_ones(layout: WeightUnits) -> None:
    with pytest.raises(ValueError, match="among uniform, global, erdos_renyi_kernel, found 'lamp'"):
        allocate("lamp", np.zeros(layout.n_weights), layout, 0.5)


@pytest.mark.parametrize("density", [-0.1, 1.1, 80.0, float("nan")])
def test_a_density_that_is_no_share_is_refused(density: float, layout: WeightUnits) -> None:
    with pytest.raises(ValueError, match="expected a density between 0 and 1"):
        allocate("uniform", np.zeros(layout.n_weights), layout, density)


def test_starts_follow_their_own_scores_at_every_density(layout: WeightUnits) -> None:
    rng = np.random.default_rng(0)
    scores = {"magnitude": rng.random(layout.n_weights), "lamp": rng.random(layout.n_weights)}
    found = starting_allocations(["lamp", "uniform", "global_magnitude"], [0.5, 0.1], scores, layout)
    expected = [
        allocate(rule, scores[score], layout, density)
        for density in (0.5, 0.1)
        for rule, score in (("global", "lamp"), ("uniform", "magnitude"), ("global", "magnitude"))
    ]
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("name", STARTS)
def test_every_start_adds_up(name: str, layout: WeightUnits) -> None:
    scores = dict.fromkeys(("magnitude", "lamp", "elimination"), np.arange(layout.n_weights, dtype=float))
    (counts,) = starting_allocations([name], [0.25], scores, layout)
    assert counts.sum() == round(0.25 * layout.n_weights)


def test_unknown_starts_are_all_named(layout: WeightUnits) -> None:
    with pytest.raises(ValueError, match="found global, snip"):
        starting_allocations(["uniform", "global", "snip"], [0.5], {}, layout)
