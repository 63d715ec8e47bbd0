"""Splits: disjoint, complete, stratified and fixed by a seed; normalisation by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import SPLITS, LabelledImages, Splits, channel_statistics, normalise, split_images
from small_networks import numpy_state


def arrays_of(splits: Splits) -> dict[str, np.ndarray]:
    return {name: getattr(splits, name) for name in SPLITS}


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def check_structure(splits: Splits, n: int) -> None:
    """Disjoint, complete, int64; train and test sorted, so that only what is looked at first is in random order."""
    parts = arrays_of(splits)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(n))
    for name, part in parts.items():
        assert part.dtype == np.int64, name
        if name in ("train", "test"):
            assert np.all(np.diff(part) > 0), name


def check_stratified(taken: np.ndarray, rest: np.ndarray, labels: np.ndarray) -> None:
    """Each class of `rest` has its share of `taken`, to within one image."""
    for label in np.unique(labels[rest]):
        expected = len(taken) * np.mean(labels[rest] == label)
        assert abs(np.sum(labels[taken] == label) - expected) < 1, label


def outcome(
    labels: np.ndarray, *, calibration: float, search: float, test: float, seed: int
) -> tuple[Splits | None, str]:
    """The splits, or None and the error's message."""
    try:
        nothing = np.zeros(len(labels), dtype=bool)
        return split_images(labels, nothing, calibration=calibration, search=search, test=test, seed=seed), ""
    except ValueError as error:
        return None, str(error)


sizes = st.floats(0.05, 0.2) | st.integers(5, 10)


@given(
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=5),
    calibration=sizes,
    search=sizes,
    test=sizes,
    own_test=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_splits_are_disjoint_complete_stratified_and_of_the_wanted_size(
    counts: list[int], calibration: float, search: float, test: float, own_test: bool, seed: int
) -> None:
    labels = labels_of(counts, seed)
    is_test = np.zeros(len(labels), dtype=bool)
    if own_test:
        is_test[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 5]] = True
    pool = np.flatnonzero(~is_test)
    wanted = {
        name: size if size >= 1 else round(size * len(pool))
        for name, size in (("calibration", calibration), ("search", search), ("test", test))
    }
    assume(min(wanted.values()) >= len(counts))
    splits = split_images(labels, is_test, calibration=calibration, search=search, test=test, seed=seed)
    check_structure(splits, len(labels))
    if own_test:
        assert np.array_equal(splits.test, np.flatnonzero(is_test))
    else:
        assert len(splits.test) == wanted["test"]
        check_stratified(splits.test, pool, labels)
    assert len(splits.search) == wanted["search"]
    assert len(splits.calibration) == wanted["calibration"]
    # The test split is taken first, the search split from what is left, the calibration split from the rest of it.
    left = np.setdiff1d(pool, splits.test)
    check_stratified(splits.search, left, labels)
    check_stratified(splits.calibration, np.setdiff1d(left, splits.search), labels)
    for name, part in arrays_of(splits).items():
        if name != "test" or not own_test:
            # One image for each of at most three draws that share a class's images out.
            for label, count in enumerate(np.bincount(labels[pool])):
                assert abs(np.sum(labels[part] == label) - len(part) * count / len(pool)) < 3
    assert set(labels[splits.train]) == set(range(len(counts)))


def test_the_first_calibration_and_search_images_stand_for_all_also_where_images_lie_sorted_by_class() -> None:
    labels = np.repeat(np.arange(10), 100)
    splits = split_images(labels, np.zeros(1000, dtype=bool), calibration=300, search=300, test=0.1, seed=0)
    for part in (splits.calibration, splits.search):
        assert set(labels[part[:100]]) == set(range(10))
        assert np.bincount(labels[part[:100]]).max() <= 20


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    calibration=st.integers(0, 12),
    search=st.integers(0, 12),
    test=st.integers(0, 12),
    seed=st.integers(0, 99),
)
@example(counts=[4, 30], calibration=5, search=5, test=20, seed=2)
@settings(max_examples=150, deadline=None)
def test_scarce_images_give_sound_splits_or_an_error_that_names_the_remedy(
    counts: list[int], calibration: int, search: int, test: int, seed: int
) -> None:
    labels = labels_of(counts, seed)
    splits, complaint = outcome(labels, calibration=calibration, search=search, test=test, seed=seed)
    if splits is None:
        remedies = ("add images", "change `calibration`", "change `search`", "change `test`", "larger `search`")
        assert any(remedy in complaint for remedy in remedies), complaint
    else:
        check_structure(splits, len(labels))
        assert (len(splits.calibration), len(splits.search), len(splits.test)) == (calibration, search, test)


@given(seed=st.integers(0, 2**31 - 1), other=st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_a_seed_fixes_the_splits_and_another_gives_others(seed: int, other: int) -> None:
    assume(seed != other)
    labels, nothing = labels_of([50, 60, 70]), np.zeros(180, dtype=bool)

    def split(seed: int) -> dict[str, np.ndarray]:
        return arrays_of(split_images(labels, nothing, calibration=20, search=0.2, test=0.2, seed=seed))

    first, second, third = split(seed), split(seed), split(other)
    assert all(np.array_equal(first[name], second[name]) for name in SPLITS)
    # The chance of drawing the same 36 of 180 images twice is nil.
    assert all(not np.array_equal(first[name], third[name]) for name in SPLITS)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    labels, nothing = labels_of([50, 50]), np.zeros(100, dtype=bool)
    state = numpy_state()
    split_images(labels, nothing, calibration=10, search=10, test=10, seed=0)
    assert numpy_state() == state


def test_a_share_and_the_same_number_give_the_same_splits() -> None:
    labels, nothing = labels_of([50, 50]), np.zeros(100, dtype=bool)
    by_share = split_images(labels, nothing, calibration=0.1, search=0.2, test=0.3, seed=0)
    by_count = split_images(labels, nothing, calibration=10, search=20, test=30, seed=0)
    assert all(np.array_equal(arrays_of(by_share)[name], arrays_of(by_count)[name]) for name in SPLITS)
    assert [len(arrays_of(by_count)[name]) for name in SPLITS] == [40, 10, 20, 30]


def test_size_one_is_a_number_and_not_everything() -> None:
    with pytest.raises(ValueError, match=r"expected a test split of 2 to 98 images, found 1; change `test`"):
        split_images(labels_of([50, 50]), np.zeros(100, dtype=bool), calibration=0, search=0, test=1, seed=0)


def test_zero_gives_an_empty_split() -> None:
    labels, nothing = labels_of([50, 50]), np.zeros(100, dtype=bool)
    splits = split_images(labels, nothing, calibration=0, search=20, test=0, seed=0)
    assert [len(arrays_of(splits)[name]) for name in SPLITS] == [80, 0, 20, 0]
    check_structure(splits, 100)
    everything = split_images(labels, nothing, calibration=0, search=0, test=0, seed=0)
    assert np.array_equal(everything.train, np.arange(100))


def test_images_that_the_source_sets_apart_are_the_test_split_whatever_test_says() -> None:
    labels, is_test = labels_of([50, 50]), np.arange(100) >= 90
    for test in (0, 0.5, 30):
        splits = split_images(labels, is_test, calibration=10, search=10, test=test, seed=0)
        assert np.array_equal(splits.test, np.arange(90, 100))
        assert len(splits.train) == 70


def test_shares_are_of_the_images_that_are_not_set_apart_for_testing() -> None:
    labels, is_test = labels_of([100, 100]), np.arange(200) >= 100
    splits = split_images(labels, is_test, calibration=0.1, search=0.2, test=0.5, seed=0)
    assert (len(splits.calibration), len(splits.search)) == (10, 20)


def test_a_class_with_too_few_images_is_named() -> None:
    labels = np.repeat([0, 1, 2], [20, 3, 20])
    with pytest.raises(
        ValueError, match=r"classes with 4 images each, .*: class 1 has 3; add images or leave the class"
    ):
        split_images(labels, np.zeros(43, dtype=bool), calibration=5, search=5, test=5, seed=0)
    # With test images of its own a set needs one split less.
    is_test = np.arange(43) == 0
    splits = split_images(labels, is_test, calibration=5, search=5, test=5, seed=0)
    assert splits.test.tolist() == [0]


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected at least two classes .* found 1 classes"):
        split_images(np.zeros(50, dtype=int), np.zeros(50, dtype=bool), calibration=5, search=5, test=5, seed=0)


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="found 0 classes"):
        split_images(np.zeros(0, dtype=int), np.zeros(0, dtype=bool), calibration=5, search=5, test=5, seed=0)


@pytest.mark.parametrize("name", ["calibration", "search", "test"])
@pytest.mark.parametrize("size", [0.001, 1, 500, 0.999])
def test_a_size_that_does_not_fit_is_named(name: str, size: float) -> None:
    wanted = {"calibration": 10, "search": 10, "test": 10} | {name: size}
    with pytest.raises(ValueError, match=rf"expected a {name} split of 2 to \d+ images, found .*; change `{name}`"):
        split_images(labels_of([50, 50]), np.zeros(100, dtype=bool), seed=0, **wanted)


def test_sizes_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a calibration split of 2 to 18 images, found 40"):
        split_images(labels_of([50, 50]), np.zeros(100, dtype=bool), calibration=40, search=40, test=40, seed=0)


def test_a_search_split_of_one_class_is_refused() -> None:
    labels = np.repeat([0, 1], [9990, 10])
    with pytest.raises(ValueError, match=r"search split holds images of one class only.*larger `search`"):
        split_images(labels, np.zeros(10_000, dtype=bool), calibration=0, search=5, test=0, seed=0)


def test_splits_survive_saving(tmp_path: Path) -> None:
    splits = split_images(labels_of([20, 20]), np.zeros(40, dtype=bool), calibration=4, search=4, test=4, seed=0)
    splits.save(tmp_path / "splits.npz")
    loaded = Splits.load(tmp_path / "splits.npz")
    for name in SPLITS:
        assert np.array_equal(arrays_of(loaded)[name], arrays_of(splits)[name])
        assert arrays_of(loaded)[name].dtype == np.int64


def test_channel_statistics_by_hand() -> None:
    images = torch.zeros(2, 2, 1, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor([[[0, 51]], [[102, 255]]])
    images[:, 1] = 51
    mean, std = channel_statistics(images)
    # Channel 0 holds 0, 0.2, 0.4 and 1; channel 1 is constant, and nothing may be divided by 0.
    assert mean == pytest.approx((0.4, 0.2))
    assert std[0] == pytest.approx(np.std([0, 0.2, 0.4, 1], ddof=1))
    assert std[1] == 1


def test_normalised_images_have_mean_zero_and_deviation_one() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = normalise(images, *channel_statistics(images))
    assert found.dtype == torch.float32
    # Sums of 3,200 float32 values.
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)


def test_normalisation_by_hand() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = normalise(images, (0.0, 0.5, 0.5), (1.0, 0.1, 0.25)).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, -3.0, 2.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,)), ((0.5,) * 4, (0.5,) * 4)])
def test_a_normalisation_for_other_channels_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected 3 values in the normalisation's mean and std.*correct `normali"):
        normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), mean, std)


def image_set() -> ImageSet:
    images = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    return ImageSet(images, torch.arange(10), torch.zeros(10, dtype=torch.bool), tuple("abcdefghij"))


def test_labelled_images_are_those_at_the_indices() -> None:
    chosen = LabelledImages.of(image_set(), np.array([7, 2]), (0.0,), (1.0,))
    assert chosen.labels.tolist() == [7, 2]
    assert len(chosen) == 2
    torch.testing.assert_close(chosen.images[0].flatten() * 255, torch.tensor([28.0, 29.0, 30.0, 31.0]))


def test_a_sample_is_without_repetition_and_fixed_by_its_seed() -> None:
    whole = LabelledImages.of(image_set(), np.arange(10), (0.0,), (1.0,))
    sample = whole.sample(6, seed=3)
    assert len(set(sample.labels.tolist())) == 6
    for image, label in zip(sample.images, sample.labels, strict=True):
        assert torch.equal(image, whole.images[label])
    assert torch.equal(whole.sample(6, seed=3).labels, sample.labels)
    assert not torch.equal(whole.sample(6, seed=4).labels, sample.labels)
    assert sorted(whole.sample(100, seed=0).labels.tolist()) == list(range(10))
