"""What holds for every search: determinism, sound fronts and histories."""

import numpy as np
from paretoprune.masks.units import WeightUnits
from searches import (
    SEARCHES,
    assert_sound,
    each_search,
    same,
    without_seconds,
)


@each_search
def test_the_same_seed_gives_the_same_front_and_history(name: str, layout: WeightUnits) -> None:
    first, again = SEARCHES[name](layout, 3), SEARCHES[name](layout, 3)
    assert same(first, again)


@each_search
def test_another_seed_gives_another_front(name: str, layout: WeightUnits) -> None:
    first, other = SEARCHES[name](layout, 3), SEARCHES[name](layout, 4)
    assert not np.array_equal(first.front.masks.words, other.front.masks.words)
    assert without_seconds(first) != without_seconds(other)


@each_search
def test_fronts_and_histories_are_sound(name: str, layout: WeightUnits) -> None:
    assert_sound(SEARCHES[name](layout, 0), layout)


@each_search
def test_no_search_draws_from_the_global_random_state(name: str, layout: WeightUnits) -> None:
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    SEARCHES[name](layout, 0)
    np.testing.assert_equal(np.random.get_state(legacy=False), before)  # noqa: NPY002
