"""Adaptive variation: what it learns, and what it leaves as it was."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import pack_rows
from paretoprune.search.adaptive import MOVES, AdaptiveVariation
from spaces import SEEDS, SIZES, Space, boolean, booleans, padding_is_zero, some_words


@given(SIZES, SEEDS)
def test_variation_changes_at_least_one_searched_bit_of_every_genome_and_no_other(sizes: list[int], seed: int) -> None:
    space = Space(sizes, seed)
    extremes = pack_rows(np.array([[False], [True]]).repeat(space.n_bits, axis=1).repeat(6, axis=0))
    words = np.concatenate([extremes, some_words(6, space.n_bits, seed)])
    changed = space.variation().vary([Genome(row) for row in words], np.random.default_rng(seed))
    for genome, row in zip(changed, words, strict=True):
        assert padding_is_zero(genome.words, space.n_bits)
        difference = boolean(genome.words ^ row, space.n_bits)
        assert difference.any()
        assert not np.any(difference & ~space.searched)


def test_variation_changes_no_genome_in_place_but_drafts() -> None:
    space, rng = Space([80, 70], seed=0), np.random.default_rng(0)
    genome, draft = Genome(some_words(1, 150, 0)[0]), Genome(some_words(1, 150, 1)[0], draft=True)
    before = genome.words.copy()
    first, second = space.variation().vary([genome, draft], rng)
    np.testing.assert_array_equal(genome.words, before)
    assert not np.shares_memory(first.words, genome.words)
    assert second.words is draft.words
    assert not second.words.flags.writeable


def first_changes(space: Space, n: int, seed: int) -> np.ndarray:
    """Index of the first group that a move changed, for `n` moves."""
    words, rng = some_words(1, space.n_bits, seed)[0], np.random.default_rng(seed)
    children = space.variation(first_rate=0.2).vary([Genome(words)] * n, rng)
    changed = booleans([child.words ^ words for child in children], space.n_bits)
    return np.searchsorted(space.offsets, changed.argmax(axis=1), side="right") - 1


def test_a_move_is_as_likely_to_begin_in_a_late_group_as_its_size_says() -> None:
    # If all groups of a move were drawn alike, the earliest of them would mostly be an early group.
    space = Space([400, 400, 100, 400], seed=0, share=1.0)
    shares = np.bincount(first_changes(space, 4000, 0), minlength=4) / 4000
    # Not exactly: only the first side of a swap is drawn this way, and a drop may find all its bits in a later group.
    np.testing.assert_allclose(shares, np.array([2, 2, 1, 2]) / 7, atol=0.03)


def test_groups_of_a_move_are_drawn_from_the_earliest_on_and_in_order() -> None:
    space, rng = Space([50] * 8, seed=0), np.random.default_rng(0)
    variation = space.variation()
    drawn = [variation._draw_groups(rng, earliest) for earliest in (0, 3, 7) for _ in range(1000)]
    assert all(groups == sorted(set(groups)) for groups in drawn)
    assert all(min(groups) >= 3 for groups in drawn[1000:])
    assert drawn[2000:] == [[7]] * 1000
    counts = np.bincount([len(groups) for groups in drawn[:1000] if groups[0] <= 2], minlength=4)
    np.testing.assert_allclose(counts[1:4] / counts.sum(), [1 / 2, 1 / 4, 1 / 8], atol=0.06)
    assert {groups[0] for groups in drawn[:1000]} == set(range(8))


def test_a_swap_may_move_weights_to_earlier_groups_as_well_as_to_later_ones() -> None:
    space, rng = Space([300, 300], seed=0, share=1.0), np.random.default_rng(0)
    variation, words = space.variation(), pack_rows(rng.random((1, 600)) < 0.5)[0]
    before = boolean(words, 600)[:300].sum()
    gains = []
    for _ in range(300):
        changed = words.copy()
        variation._apply(variation._arms[MOVES.index("swap")], changed, 20, rng)
        assert np.bitwise_count(changed).sum() == np.bitwise_count(words).sum()
        gains.append(int(boolean(changed, 600)[:300].sum()) - int(before))
    assert min(gains) < -10
    assert max(gains) > 10


def test_variation_is_fixed_by_its_generator() -> None:
    space = Space([80, 70], seed=0)
    first, again, other = (
        [child.fingerprint for child in space.variation().vary(space.genomes(8, 0), np.random.default_rng(seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@given(outcomes=st.lists(st.booleans(), max_size=60), floor=st.floats(0.01, 0.9), n_rankings=st.integers(1, 3))
def test_probabilities_sum_to_one_and_never_fall_below_the_floor(
    outcomes: list[bool], floor: float, n_rankings: int
) -> None:
    space, rng = Space([40, 30], 0, n_rankings=n_rankings), np.random.default_rng(0)
    variation = space.variation(floor=floor)
    for success in outcomes:
        variation.reward(variation.vary(space.genomes(1, int(rng.integers(1000))), rng)[0], success)
    probabilities = variation.probabilities()
    assert len(probabilities) == 3 * n_rankings
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities.min() >= floor / len(probabilities)


def test_before_anything_is_learnt_all_arms_are_alike() -> None:
    np.testing.assert_allclose(Space([40, 30], 0).variation().probabilities(), 1 / 6)


@pytest.mark.parametrize("success", [True, False])
def test_the_arm_that_made_a_genome_gains_by_its_success_and_loses_by_its_failure(success: bool) -> None:
    space = Space([40, 30], 0)
    variation = space.variation()
    before = variation.probabilities()
    variation.reward(variation.vary(space.genomes(1, 0), np.random.default_rng(0))[0], success)
    gain = variation.probabilities() - before
    arm = int(np.argmax(np.abs(gain)))
    assert gain[arm] > 0 if success else gain[arm] < 0
    assert np.all(np.delete(gain, arm) < 0) if success else np.all(np.delete(gain, arm) > 0)


def n_kept(genome: Genome) -> int:
    return int(np.bitwise_count(genome.words).sum())


def test_growing_becomes_the_most_probable_move_when_only_growing_succeeds() -> None:
    space, rng = Space([200, 100], 0, n_rankings=1), np.random.default_rng(0)
    variation, genomes = space.variation(), space.genomes(300, 0)
    for genome, child in zip(genomes, variation.vary(genomes, rng), strict=True):
        variation.reward(child, n_kept(child) > n_kept(genome))
    probabilities = dict(zip(MOVES, variation.probabilities(), strict=True))
    assert probabilities["grow"] > 0.6
    assert max(probabilities["drop"], probabilities["swap"]) < 0.2


def distances(variation: AdaptiveVariation, genomes: list[Genome], children: list[Genome]) -> np.ndarray:
    return np.array([np.bitwise_count(a.words ^ b.words).sum() for a, b in zip(genomes, children, strict=True)])


def test_failures_shrink_the_steps() -> None:
    space, rng = Space([1000, 1000], 0, share=1.0), np.random.default_rng(0)
    variation, genomes = space.variation(first_rate=0.1), space.genomes(200, 0)
    before = distances(variation, genomes, variation.vary(genomes, rng)).mean()
    for _ in range(3):
        for child in variation.vary(genomes, rng):
            variation.reward(child, False)
    assert distances(variation, genomes, variation.vary(genomes, rng)).mean() < 0.4 * before


def test_success_of_larger_steps_enlarges_the_steps() -> None:
    space, rng = Space([1000, 1000], 0, share=1.0), np.random.default_rng(0)
    variation, genomes = space.variation(first_rate=0.01), space.genomes(200, 0)
    found = []
    for _ in range(6):
        children = variation.vary(genomes, rng)
        found.append(distances(variation, genomes, children))
        for child, distance in zip(children, found[-1], strict=True):
            if distance > np.median(found[-1]):
                variation.reward(child, True)
    assert found[-1].mean() > 2 * found[0].mean()


@pytest.mark.parametrize("success", [True, False])
def test_genomes_made_elsewhere_are_ignored(success: bool) -> None:
    space, rng = Space([40, 30], 0), np.random.default_rng(0)
    variation = space.variation()
    before = variation.probabilities()
    for genome in space.genomes(5, 3):
        variation.reward(genome, success)
    np.testing.assert_array_equal(variation.probabilities(), before)
    made = variation.vary(space.genomes(1, 0), rng)[0]
    variation.reward(made, success)
    once = variation.probabilities()
    assert np.any(once != before)
    variation.reward(made, success)
    np.testing.assert_array_equal(variation.probabilities(), once)


def test_two_operators_learn_apart() -> None:
    space = Space([40, 30], 0)
    first, second = space.variation(), space.variation()
    made = first.vary(space.genomes(1, 0), np.random.default_rng(0))[0]
    second.reward(made, True)
    np.testing.assert_allclose(second.probabilities(), 1 / 6)
    first.reward(made, True)
    assert first.probabilities().max() > 1 / 6 + 0.01


def test_a_variation_that_does_not_adapt_stays_as_it_was() -> None:
    space, rng = Space([200, 100], 0), np.random.default_rng(0)
    fixed, learning = space.variation(adaptive=False), space.variation()
    for variation in (fixed, learning):
        genomes = space.genomes(40, 0)
        for genome, child in zip(genomes, variation.vary(genomes, rng), strict=True):
            variation.reward(child, n_kept(child) > n_kept(genome))
        assert not variation._pending
    np.testing.assert_allclose(fixed.probabilities(), 1 / 6)
    assert {arm.log_rate for arm in fixed._arms} == {np.log(0.02)}
    assert learning.probabilities().max() > 1 / 6 + 0.01
    assert len({arm.log_rate for arm in learning._arms}) > 1


def test_moves_follow_a_ranking_of_the_candidate_of_the_mask_itself() -> None:
    space = Space([120, 90, 60], 0, share=1.0)

    def moving(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        # The first bit of the mask decides the direction of the order.
        ranking = space.rankings[int(words[0]) & 1]
        return {k: ranking[k] for k in chosen}

    settings: dict[str, Any] = {"softness": 0.0}
    for genome in space.genomes(20, 3):
        static = AdaptiveVariation(space.groups, [space.rankings[int(genome.words[0]) & 1]], **settings)
        expected = static.vary([genome], np.random.default_rng(5))[0]
        found = AdaptiveVariation(space.groups, [moving], **settings).vary([genome], np.random.default_rng(5))[0]
        assert found.fingerprint == expected.fingerprint
    other = AdaptiveVariation(space.groups, [space.rankings[0]], **settings)
    differing = [g for g in space.genomes(20, 3) if int(g.words[0]) & 1]
    assert any(
        other.vary([g], np.random.default_rng(5))[0].fingerprint
        != AdaptiveVariation(space.groups, [moving], **settings).vary([g], np.random.default_rng(5))[0].fingerprint
        for g in differing
    )


def test_a_ranking_of_the_candidate_learns_beside_others_and_is_only_asked_when_it_is_drawn() -> None:
    space, asked = Space([120, 90, 60], 0), []

    def moving(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        asked.append(list(chosen))
        return {k: space.rankings[1][k] for k in chosen}

    variation = AdaptiveVariation(space.groups, [space.rankings[0], moving])
    np.testing.assert_allclose(variation.probabilities(), 1 / 6)
    variation.vary(space.genomes(200, 0), np.random.default_rng(0))
    assert len(asked) == pytest.approx(100, abs=30)
    assert all(chosen == sorted(set(chosen)) for chosen in asked)
