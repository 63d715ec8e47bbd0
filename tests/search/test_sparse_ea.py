"""SparseEA and MSKEA: scores, variation of packed words against booleans, and what each stage follows."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import n_words_for, pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.search import sparse_ea as sparse
from paretoprune.search.sparse_ea import (
    StagedVariation,
    TournamentVariation,
    cut_into_groups,
    masks_without_each,
    penalties_of_weights,
    sample_by_tournaments,
    win_tournaments,
)

N = 394
GUIDES = ("prior", "front", "statistics")
# Penalties of 1 to 4 in four groups, the last the lowest.
PENALTIES = np.repeat(np.array([4, 3, 2, 1], dtype=np.float32), [100, 100, 100, 94])


def packed(mask: np.ndarray) -> np.ndarray:
    words: np.ndarray = pack_rows(mask[None])[0]
    return words


def booleans(words: np.ndarray, n: int = N) -> np.ndarray:
    """Check that the padding is 0, and unpack the mask."""
    assert words.dtype == np.uint64
    assert words.shape == (n_words_for(n),)
    assert np.bitwise_count(words).sum() == unpack_row(words, n).sum()
    return unpack_row(words, n)


def random_mask(seed: int, density: float) -> np.ndarray:
    mask = np.random.default_rng(seed).random(N) < density
    mask[seed % N] = True
    return mask


def staged(guide: str, least_share: float = 0.01) -> StagedVariation:
    """MSKEA's variation that has seen a front of three members."""
    variation = StagedVariation(PENALTIES, least_share)
    members = [Genome(packed(random_mask(i, 0.1 * (i + 1)))) for i in range(3)]
    variation.learn(members, 0.1, np.random.default_rng(0))
    variation.guide = guide  # type: ignore[assignment]
    return variation


# Every variation by name, as a function of its least share.
VARIATIONS: dict[str, Callable[[float], TournamentVariation]] = {
    "sparse_ea": partial(TournamentVariation, PENALTIES),
    **{guide: partial(staged, guide) for guide in GUIDES},
}
each_variation = pytest.mark.parametrize("name", VARIATIONS)


# Groups and scores


layouts = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6).map(
    lambda shapes: WeightUnits(tuple(map(str, range(len(shapes)))), tuple(shapes))
)


@given(layouts, st.integers(2, 40))
def test_groups_are_runs_of_whole_filters_or_of_whole_layers(layout: WeightUnits, n_groups: int) -> None:
    filters = sum(shape[0] for shape in layout.shapes)
    if filters < 2:
        return
    bounds = cut_into_groups(layout, n_groups).tolist()
    assert len(bounds) - 1 == min(n_groups, filters)
    assert (bounds[0], bounds[-1]) == (0, layout.n_weights)
    assert all(start < stop for start, stop in pairwise(bounds))
    if n_groups <= layout.n_groups:
        assert set(bounds) <= set(layout.offsets.tolist())
    else:
        starts = zip(layout.offsets.tolist(), layout.shapes, strict=False)
        edges = {start + i * width for start, (rows, width) in starts for i in range(rows + 1)}
        assert set(layout.offsets.tolist()) <= set(bounds) <= edges


def test_groups_are_of_similar_size() -> None:
    layout = WeightUnits(("a", "b", "c"), ((8, 10), (16, 20), (3, 2)))
    # The smallest layer is one group; the others share eight groups by their sizes, in whole filters.
    assert np.diff(cut_into_groups(layout, 9)).tolist() == [40, 40, 40, 60, 60, 40, 60, 60, 6]
    assert np.diff(cut_into_groups(layout, 2)).tolist() == [80, 326]


def test_a_single_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two groups of whole output filters to compare, found 1"):
        cut_into_groups(WeightUnits(("a",), ((1, 70),)), 5)


def test_a_group_is_evaluated_by_the_mask_that_lacks_it() -> None:
    masks = masks_without_each(np.array([0, 3, 65, 70]))
    expected = np.ones((3, 70), dtype=bool)
    expected[0, :3] = expected[1, 3:65] = expected[2, 65:] = False
    np.testing.assert_array_equal([masks.unpack(i) for i in range(3)], expected)


def test_weights_are_the_more_penalised_the_better_the_network_without_their_group() -> None:
    penalties = penalties_of_weights(np.array([0, 2, 3, 6]), np.array([0, 2, 1]))
    assert penalties.tolist() == [3, 3, 1, 2, 2, 2]
    assert penalties.dtype == np.float32


# Tournaments


@given(st.sets(st.integers(0, N - 1)), st.integers(0, N), st.sampled_from(["low", "high"]), st.integers(0, 99))
def test_tournaments_choose_so_many_different_candidates(candidates: set[int], n: int, prefer: str, seed: int) -> None:
    chosen = win_tournaments(
        np.array(sorted(candidates), dtype=np.int64),
        PENALTIES,
        n,
        np.random.default_rng(seed),
        prefer=prefer,  # type: ignore[arg-type]
    )
    assert len(chosen) == len(set(chosen.tolist())) == min(n, len(candidates))
    assert set(chosen.tolist()) <= candidates


def frequencies(penalties: list[float], prefer: str, n: int = 1, trials: int = 4000) -> np.ndarray:
    """How often each of three bits is chosen."""
    bits, rng = np.array([5, 70, 99]), np.random.default_rng(0)
    all_penalties = np.zeros(100)
    all_penalties[bits] = penalties
    counts = np.zeros(100)
    for _ in range(trials):
        counts[win_tournaments(bits, all_penalties, n, rng, prefer=prefer)] += 1  # type: ignore[arg-type]
    assert counts.sum() == counts[bits].sum() == n * trials
    return counts[bits] / trials


def test_a_tournament_is_between_two_and_chance_settles_ties() -> None:
    # The best one wins unless both contestants are others: 1 - (2 / 3) ** 2.
    assert frequencies([1, 2, 3], "low") == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.03)
    assert frequencies([1, 2, 3], "high") == pytest.approx([1 / 9, 3 / 9, 5 / 9], abs=0.03)
    assert frequencies([2, 2, 2], "low") == pytest.approx([1 / 3] * 3, abs=0.03)
    assert frequencies([2, 1, 2], "high") == pytest.approx([4 / 9, 1 / 9, 4 / 9], abs=0.03)


def test_who_has_won_a_tournament_is_in_none_of_the_next_round() -> None:
    # One is not chosen, mostly that of the highest penalty; the two winners are different.
    lost = 1 - frequencies([1, 2, 3], "low", n=2)
    assert lost.sum() == pytest.approx(1)
    assert lost[0] < lost[1] < lost[2]


def test_many_tournaments_are_held_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "TOURNAMENTS_AT_ONCE", 7)
    chosen = win_tournaments(np.arange(N), PENALTIES, 200, np.random.default_rng(0), prefer="low")
    assert len(set(chosen.tolist())) == 200
    shares = [np.isin(np.arange(a, b), chosen).mean() for a, b in ((0, 100), (100, 200), (200, 300), (300, 394))]
    assert shares == sorted(shares)
    assert shares[3] - shares[0] > 0.4


def test_the_first_masks_have_any_density_and_lack_the_highest_penalties() -> None:
    masks = np.array([booleans(words) for words in sample_by_tournaments(PENALTIES, 300, np.random.default_rng(0))])
    density = masks.mean(axis=1)
    # Uniform: a share q of the densities lies below q.
    assert np.quantile(density, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    assert 0 < density.min() < 0.02
    assert 0.98 < density.max() < 1
    kept = [masks[:, a:b].mean() for a, b in ((0, 100), (100, 200), (200, 300), (300, 394))]
    assert kept == sorted(kept)
    assert kept[3] - kept[0] > 0.3


def test_no_first_mask_is_empty_even_of_two_weights() -> None:
    masks = [booleans(words, 2) for words in sample_by_tournaments(np.ones(2), 50, np.random.default_rng(0))]
    assert {mask.sum() for mask in masks} == {1}


# Variation, against the same on booleans with the same draws


def naive_step(n_bits: int, least: float, rng: np.random.Generator) -> int:
    return int(np.ceil(n_bits * np.exp(rng.uniform(np.log(least), 0))))


def naive_flip(
    mask: np.ndarray, candidates: np.ndarray, n: int, penalties: np.ndarray, prefer: str, rng: np.random.Generator
) -> np.ndarray:
    result = mask.copy()
    for bit in win_tournaments(np.flatnonzero(candidates), penalties, n, rng, prefer=prefer):  # type: ignore[arg-type]
        result[bit] = not result[bit]
    return result


def naive_cross(
    first: np.ndarray, second: np.ndarray, penalties: np.ndarray, least: float, rng: np.random.Generator
) -> np.ndarray:
    if rng.random() < 0.5:
        only = first & ~second
        n = min(naive_step(only.sum(), least, rng), first.sum() - 1)
        return naive_flip(first, only, n, penalties, "high", rng)
    only = second & ~first
    return naive_flip(first, only, naive_step(only.sum(), least, rng), penalties, "low", rng)


def naive_mutation(mask: np.ndarray, penalties: np.ndarray, least: float, rng: np.random.Generator) -> np.ndarray:
    n = naive_step(mask.sum(), least, rng)
    if rng.random() < 0.5:
        return naive_flip(mask, mask, min(n, mask.sum() - 1), penalties, "high", rng)
    return naive_flip(mask, ~mask, n, penalties, "low", rng)


@pytest.mark.parametrize("name", ["sparse_ea", "prior"])
@pytest.mark.parametrize("seed", range(8))
def test_scores_lead_crossover_and_mutation_as_they_do_on_booleans(name: str, seed: int) -> None:
    variation = VARIATIONS[name](0.05)
    first, second = random_mask(seed, 0.4), random_mask(seed + 50, 0.2)
    words = [packed(first), packed(second)]
    before = [row.copy() for row in words]
    crossed = variation.cross(words[0], words[1], np.random.default_rng(seed))
    expected = naive_cross(first, second, variation.penalties, 0.05, np.random.default_rng(seed))
    np.testing.assert_array_equal(booleans(crossed), expected)
    assert not np.array_equal(expected, first)
    np.testing.assert_array_equal(words, before)

    (varied,) = variation.vary([Genome(words[0])], np.random.default_rng(seed))
    expected = naive_mutation(first, variation.penalties, 0.05, np.random.default_rng(seed))
    np.testing.assert_array_equal(booleans(varied.words), expected)
    assert not np.array_equal(expected, first)
    assert not varied.words.flags.writeable
    np.testing.assert_array_equal(words, before)


def test_steps_up_and_down_have_any_size_from_the_least_share_to_all() -> None:
    variation, mask = TournamentVariation(PENALTIES, 0.05), random_mask(0, 0.25)
    rng = np.random.default_rng(0)
    sizes = np.array([booleans(g.words).sum() for g in variation.vary([Genome(packed(mask))] * 400, rng)]) - mask.sum()
    least = int(np.ceil(0.05 * mask.sum()))
    for steps in (sizes[sizes > 0], -sizes[sizes < 0]):
        assert len(steps) > 150
        assert least <= steps.min() <= 1.2 * least
        assert 0.9 * mask.sum() < steps.max() <= mask.sum()
        # Log-uniform: half of them below the geometric mean of the ends.
        assert np.median(steps) == pytest.approx(mask.sum() * 0.05**0.5, rel=0.25)


@each_variation
@given(seed=st.integers(0, 10**6), densities=st.tuples(*[st.sampled_from([0.0, 0.02, 0.5, 1.0])] * 2))
def test_no_child_is_empty_and_its_padding_stays_0(name: str, seed: int, densities: tuple[float, float]) -> None:
    variation, rng = VARIATIONS[name](0.3), np.random.default_rng(seed)
    first, second = packed(random_mask(seed, densities[0])), packed(random_mask(seed + 1, densities[1]))
    child = variation.cross(first, second, rng)
    assert booleans(child).any()
    (varied,) = variation.vary([Genome(child, draft=True)], rng)
    assert booleans(varied.words).any()


@each_variation
def test_variation_repeats_itself_with_equal_draws(name: str) -> None:
    first, second = packed(random_mask(0, 0.4)), packed(random_mask(1, 0.3))

    def children(seed: int) -> np.ndarray:
        variation, rng = VARIATIONS[name](0.05), np.random.default_rng(seed)
        crossed = [variation.cross(first, second, rng) for _ in range(4)]
        return np.array([genome.words for genome in variation.vary(list(map(Genome, crossed)), rng)])

    np.testing.assert_array_equal(children(1), children(1))
    assert not np.array_equal(children(1), children(2))


# The stages of MSKEA


def test_frequencies_remember_earlier_fronts_by_the_size_of_the_last() -> None:
    fronts = [np.array([random_mask(10 * k + i, 0.3) for i in range(n)]) for k, n in enumerate((4, 2, 6))]
    variation = StagedVariation(PENALTIES, 0.01)
    expected, n_last = np.zeros(N), 0
    for front in fronts:
        variation.learn([Genome(row) for row in pack_rows(front)], 0.9, np.random.default_rng(0))
        n = len(front)
        expected = n_last / (n_last + n) * expected + n / (n_last + n) * front.mean(axis=0)
        n_last = n
        np.testing.assert_allclose(variation._frequency, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(variation._votes, front.sum(axis=0))


def test_weights_that_fronts_rarely_keep_are_penalised_until_the_last_stage() -> None:
    variation = StagedVariation(PENALTIES, 0.01)
    front, rng = np.array([random_mask(i, 0.3) for i in range(5)]), np.random.default_rng(0)
    genomes = [Genome(row) for row in pack_rows(front)]
    penalties = PENALTIES.astype(np.float64)
    for spent in (0.2, 0.6):
        variation.learn(genomes, spent, rng)
        penalties = penalties * (1 - front.mean(axis=0)) * np.sqrt(spent) + penalties
        np.testing.assert_allclose(np.exp(variation.penalties), penalties, rtol=1e-5)
    before = variation.penalties.copy()
    variation.learn(genomes, 0.62, rng)
    np.testing.assert_array_equal(variation.penalties, before)
    # Thousands of generations do not overflow.
    for _ in range(2000):
        variation.learn(genomes[:1], 0.6, rng)
    assert np.isfinite(variation.penalties).all()
    np.testing.assert_array_equal(PENALTIES, np.repeat([4, 3, 2, 1], [100, 100, 100, 94]))


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        (0.0, {"front": 1.0}),
        (0.38, {"front": 0.62, "prior": 0.38}),
        (0.39, {"statistics": 0.5, "front": 0.305, "prior": 0.195}),
        (0.61, {"statistics": 0.5, "front": 0.195, "prior": 0.305}),
        (0.62, {"statistics": 1.0}),
        (1.0, {"statistics": 1.0}),
    ],
)
def test_each_stage_has_its_guides(spent: float, expected: dict[str, float]) -> None:
    variation, rng = StagedVariation(np.ones(3, dtype=np.float32), 0.01), np.random.default_rng(0)
    genome, guides = Genome(pack_rows(np.ones((1, 3), dtype=bool))[0]), []
    for _ in range(1000):
        variation.learn([genome], spent, rng)
        guides.append(variation.guide)
    assert {guide: guides.count(guide) / 1000 for guide in set(guides)} == pytest.approx(expected, abs=0.05)


def test_the_front_has_set_what_members_keep_and_cleared_what_none_does() -> None:
    variation = staged("front", 0.05)
    used = variation._votes > 0
    mask = random_mask(77, 0.3)
    rng = np.random.default_rng(0)
    votes_of_set, n_cleared = [], 0
    for genome in variation.vary([Genome(packed(mask))] * 100, rng):
        changed = booleans(genome.words) ^ mask
        went, came = changed & mask, changed & ~mask
        assert changed.any()
        assert not (went.any() and came.any())
        assert not (went & used).any()
        assert not (came & ~used).any()
        n_cleared += went.any()
        votes_of_set.extend(variation._votes[came])
    assert 30 < n_cleared < 70
    # Bits that most members keep come first.
    assert np.mean(votes_of_set) > variation._votes[used & ~mask].mean() + 0.05


def test_where_parents_differ_frequencies_decide() -> None:
    variation = staged("statistics")
    first, second = random_mask(0, 0.6), random_mask(1, 0.5)
    rng = np.random.default_rng(0)
    children = np.array([booleans(variation.cross(packed(first), packed(second), rng)) for _ in range(600)])
    same = first == second
    assert (children[:, same] == first[same]).all()
    np.testing.assert_allclose(children[:, ~same].mean(axis=0), variation._frequency[~same], atol=0.09)


def test_a_mutation_of_the_last_stage_redraws_some_bits_by_their_frequency() -> None:
    variation, mask = staged("statistics", 0.2), random_mask(3, 0.5)
    # With frequencies of 0 and 1, each picked bit has the value of its frequency.
    variation._frequency = np.round(variation._frequency)
    target = variation._frequency > 0.5
    rng = np.random.default_rng(0)
    changed = np.array([booleans(g.words) ^ mask for g in variation.vary([Genome(packed(mask))] * 300, rng)])
    assert not changed[:, mask == target].any()
    # Bits are drawn with replacement: a share s of draws picks 1 - exp(-s) of them.
    shares = changed[:, mask != target].mean(axis=1)
    assert 0.1 < shares.min() < 0.2
    assert 0.57 < shares.max() < 0.72


def test_frequencies_that_would_leave_nothing_are_not_followed() -> None:
    variation = staged("statistics", 1.0)
    variation._frequency[:] = 0
    first, second = packed(random_mask(0, 0.0)), packed(random_mask(1, 0.0))
    np.testing.assert_array_equal(variation.cross(first, second, np.random.default_rng(0)), first)
    # One time in three the only weight is not picked.
    for kept in variation.vary([Genome(first)] * 20, np.random.default_rng(0)):
        assert booleans(kept.words).sum() == 1
