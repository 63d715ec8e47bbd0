"""Kept activations: who finds which, which are given up, and what may never be written over."""

import mmap
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.evaluation.prefixes import NO_PLAN, Plan, PrefixCache
from paretoprune.masks.packed import pack_rows
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.tracing import Cut
from torch import fx

N_IMAGES, N_CALIBRATION = 5, 3
LAYOUT = WeightUnits(("a", "b", "c", "d"), ((30,), (50,), (70,), (11,)))


def cuts() -> list[Cut]:
    """After a, and after a, b and c; the last layer is behind all cuts."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(2)]
    return [
        Cut(1, nodes[0], (4, 3, 2), frozenset("a"), 0.3),
        Cut(3, nodes[1], (2, 1, 1), frozenset("abc"), 0.8),
    ]


SLOT = (N_IMAGES + N_CALIBRATION) * (24 + 2) * 4


def cache(n_slots: int, dtype: torch.dtype = torch.float32) -> PrefixCache:
    budget = n_slots * SLOT * dtype.itemsize // 4
    return PrefixCache(cuts(), LAYOUT, N_IMAGES, N_CALIBRATION, dtype, budget)


def words_of(a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> np.ndarray:
    """A candidate whose layers hold these numbers, in bits."""
    mask = np.zeros(LAYOUT.n_weights, dtype=bool)
    for offset, number in zip(LAYOUT.offsets, (a, b, c, d), strict=False):
        mask[offset : offset + 8] = [number >> bit & 1 for bit in range(8)]
    return pack_rows(mask[None])[0]


def evaluated(kept: PrefixCache, words: np.ndarray, complete: bool = True) -> Plan:
    """Plan a candidate and close it at once."""
    plan = kept.plan(words)
    kept.close(plan, complete)
    return plan


def test_a_candidate_starts_at_the_last_cut_before_which_it_equals_an_earlier_one() -> None:
    kept = cache(4)
    assert evaluated(kept, words_of(1, 2, 3, 4)).start is None
    # All but the last layer are the same: the second cut.
    assert evaluated(kept, words_of(1, 2, 3, 5)).start == (1, 3)
    again = evaluated(kept, words_of(1, 2, 9, 4))
    assert again.start == (0, 3)
    assert set(again.keep) == {1}
    assert evaluated(kept, words_of(7, 2, 3, 4)).start is None
    assert (kept.hits, kept.misses) == (2, 2)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=30), st.integers(2, 6))
def test_a_start_always_holds_what_the_same_layers_have_left_there(
    candidates: list[tuple[int, int, int, int]], n_slots: int
) -> None:
    kept = cache(n_slots)
    wrote: dict[tuple[int, int], tuple[int, ...]] = {}
    for layers in candidates:
        plan = kept.plan(words_of(*layers))
        known = [layers[:1], layers[:3]]
        if plan.start is not None:
            assert wrote[plan.start] == known[plan.start[0]]
        for cut, slot in plan.keep.items():
            assert plan.start != (cut, slot)
            wrote[(cut, slot)] = known[cut]
        kept.close(plan, True)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=60))
def test_with_many_candidates_at_work_no_slot_has_two_writers_or_a_writer_and_a_reader(
    events: Sequence[tuple[bool, int, int, bool]],
) -> None:
    kept = cache(3)
    open_plans: list[Plan] = []
    for begins, a, b, complete in events:
        if begins or not open_plans:
            open_plans.append(kept.plan(words_of(a, b)))
        else:
            kept.close(open_plans.pop((a + b) % len(open_plans)), complete)
        writers = [place for plan in open_plans for place in plan.keep.items()]
        readers = {plan.start for plan in open_plans if plan.start is not None}
        assert len(writers) == len(set(writers))
        assert readers.isdisjoint(writers)
        assert all(0 <= slot < 3 for _, slot in writers)
    for plan in open_plans:
        kept.close(plan, False)
    # Nothing has got lost: as many new candidates as there are slots can be kept again.
    plans = [kept.plan(words_of(100 + i, 1)) for i in range(3)]
    assert all(set(plan.keep) == {0, 1} for plan in plans)


def test_the_candidate_that_was_of_no_use_the_longest_is_given_up() -> None:
    kept = cache(2)
    evaluated(kept, words_of(1, b=1))
    evaluated(kept, words_of(2, b=1))
    assert evaluated(kept, words_of(1, b=2)).start == (0, 1)
    evaluated(kept, words_of(3, b=1))
    assert evaluated(kept, words_of(1, b=3)).start == (0, 1)
    assert evaluated(kept, words_of(2, b=2)).start is None


def test_activations_that_somebody_reads_are_not_given_up() -> None:
    kept = cache(2)
    evaluated(kept, words_of(1))
    evaluated(kept, words_of(2))
    reader = kept.plan(words_of(1, d=1))
    assert reader.start is not None
    for number in range(3, 9):
        plan = evaluated(kept, words_of(number))
        assert plan.keep.get(reader.start[0]) != reader.start[1]
    kept.close(reader, True)
    assert evaluated(kept, words_of(1, d=2)).start == reader.start


def test_where_all_slots_are_in_use_a_candidate_keeps_nothing() -> None:
    kept = cache(2)
    plans = [kept.plan(words_of(i)) for i in range(3)]
    assert [len(plan.keep) for plan in plans] == [2, 2, 0]
    for plan in plans:
        kept.close(plan, True)
    assert [evaluated(kept, words_of(i, d=1)).start is not None for i in range(3)] == [True, True, False]


def test_a_candidate_that_was_stopped_leaves_nothing() -> None:
    kept = cache(2)
    evaluated(kept, words_of(1), complete=False)
    assert evaluated(kept, words_of(1, d=1)).start is None


def test_two_equal_beginnings_at_the_same_time_are_kept_once() -> None:
    kept = cache(2)
    first, second = kept.plan(words_of(1)), kept.plan(words_of(1, d=1))
    assert first.keep != second.keep
    kept.close(first, True)
    kept.close(second, True)
    assert kept.plan(words_of(1, d=2)).start == (1, first.keep[1])
    assert set(evaluated(kept, words_of(5)).keep) == {0, 1}


def test_forgetting_drops_all_activations_and_open_plans() -> None:
    kept = cache(2)
    evaluated(kept, words_of(1))
    kept.plan(words_of(1, d=1))
    kept.plan(words_of(2))
    kept.forget()
    assert evaluated(kept, words_of(1)).start is None
    assert set(evaluated(kept, words_of(2)).keep) == {0, 1}


def test_a_budget_for_less_than_two_candidates_keeps_nothing() -> None:
    kept = PrefixCache(cuts(), LAYOUT, N_IMAGES, N_CALIBRATION, torch.float32, 2 * SLOT - 1)
    assert (kept.n_slots, kept.cuts) == (0, ())
    assert kept.plan(words_of(1)) is NO_PLAN
    kept.close(NO_PLAN, True)
    assert kept.plan(words_of(1)) is NO_PLAN
    assert PrefixCache(cuts(), LAYOUT, N_IMAGES, N_CALIBRATION, torch.float32, 2 * SLOT).n_slots == 2
    assert PrefixCache([], LAYOUT, N_IMAGES, 0, torch.float32, 10**6).n_slots == 0


def test_half_the_bytes_a_number_hold_twice_the_candidates() -> None:
    budgets = [PrefixCache(cuts(), LAYOUT, 5, 3, dtype, 10 * SLOT) for dtype in (torch.float32, torch.bfloat16)]
    assert [kept.n_slots for kept in budgets] == [10, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_laid_out_as_convolutions_like_them_and_do_not_overlap(dtype: torch.dtype) -> None:
    kept = cache(3, dtype)
    for cut in range(2):
        for slot in range(3):
            images, calibration = kept.tensors(cut, slot)
            assert images.shape == (N_IMAGES, *kept.cuts[cut].shape)
            assert calibration.shape == (N_CALIBRATION, *kept.cuts[cut].shape)
            assert images.dtype == calibration.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
            images.fill_(10 * cut + slot)
            calibration.fill_(-10 * cut - slot)
    for cut in range(2):
        for slot in range(3):
            images, calibration = kept.tensors(cut, slot)
            assert bool((images == 10 * cut + slot).all())
            assert bool((calibration == -10 * cut - slot).all())


def test_the_memory_is_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []

    def recording(file: int, size: int) -> bytearray:
        taken.append((file, size))
        return bytearray(size)

    monkeypatch.setattr(mmap, "mmap", recording)
    small = cache(3)
    assert taken == []  # nothing is taken before it is needed
    small.allocate()
    small.allocate()
    assert [file for file, _ in taken] == [-1, -1]
    assert sum(size for _, size in taken) == 3 * SLOT


def test_keys_of_whole_masks_differ_where_and_only_where_layers_before_the_cut_do() -> None:
    kept = cache(2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = (tuple(rng.integers(0, 2, 4).tolist()) for _ in range(2))
        keys = [evaluated(kept, words_of(*layers)).keys for layers in (first, second)]
        assert (keys[0][0] == keys[1][0]) == (first[:1] == second[:1])
        assert (keys[0][1] == keys[1][1]) == (first[:3] == second[:3])
