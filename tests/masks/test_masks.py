"""Masks: packing against booleans, layouts of real networks, and exact counts under ties."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import PackedMasks, fingerprint, n_words_for, pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits, keep_top, ranks_within_groups


def random_masks(n_masks: int, n_weights: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((n_masks, n_weights)) < rng.random((n_masks, 1))


def flat_layout(sizes: list[int]) -> WeightUnits:
    return WeightUnits(tuple(f"layer{i}" for i in range(len(sizes))), tuple((size,) for size in sizes))


@given(n_masks=st.integers(0, 4), n_weights=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(n_masks: int, n_weights: int, seed: int) -> None:
    masks = random_masks(n_masks, n_weights, seed)
    packed = PackedMasks.pack(masks)
    assert packed.words.shape == (n_masks, -(-n_weights // 64))
    assert packed.words.dtype == np.uint64
    assert len(packed) == n_masks
    for i in range(n_masks):
        assert packed.unpack(i).dtype == bool
        np.testing.assert_array_equal(packed.unpack(i), masks[i])


@pytest.mark.parametrize(("n_bits", "n_words"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_words_are_as_many_as_the_bits_need(n_bits: int, n_words: int) -> None:
    assert n_words_for(n_bits) == n_words
    assert pack_rows(np.ones((2, n_bits), dtype=bool)).shape == (2, n_words)


def test_the_first_weight_is_the_lowest_bit_of_the_first_word() -> None:
    row = np.zeros((1, 70), dtype=bool)
    row[0, [0, 3, 65]] = True
    np.testing.assert_array_equal(pack_rows(row), np.array([[0b1001, 0b10]], dtype=np.uint64))


def test_rows_that_are_views_into_larger_arrays_unpack_as_well() -> None:
    masks = random_masks(4, 130)
    every_second = PackedMasks.pack(masks).words[::2]
    np.testing.assert_array_equal(unpack_row(every_second[1], 130), masks[2])


def test_counts_and_densities_are_those_of_the_booleans() -> None:
    masks = random_masks(5, 131)
    packed = PackedMasks.pack(masks)
    np.testing.assert_array_equal(packed.n_kept, masks.sum(axis=1))
    np.testing.assert_allclose(packed.density, masks.mean(axis=1), rtol=1e-15)


def test_one_mask_alone_packs_to_one_row() -> None:
    assert PackedMasks.pack(np.ones(70, dtype=bool)).n_kept.tolist() == [70]


def test_masks_are_selected_by_position_and_by_boolean() -> None:
    masks = random_masks(4, 70)
    packed = PackedMasks.pack(masks)
    np.testing.assert_array_equal(packed.select([3, 0]).unpack(0), masks[3])
    np.testing.assert_array_equal(packed.select([3, 0]).unpack(1), masks[0])
    chosen = packed.select(np.array([False, True, True, False]))
    np.testing.assert_array_equal(np.array([chosen.unpack(i) for i in range(len(chosen))]), masks[1:3])


def test_selecting_nothing_gives_no_masks() -> None:
    nothing = PackedMasks.pack(random_masks(2, 70)).select([])
    assert len(nothing) == 0
    assert nothing.n_units == 70


def test_concatenation_keeps_the_order() -> None:
    masks = random_masks(3, 70)
    both = PackedMasks.pack(masks[:2]).concatenate(PackedMasks.pack(masks[2:]))
    np.testing.assert_array_equal(np.array([both.unpack(i) for i in range(3)]), masks)
    assert len(PackedMasks.empty(70).concatenate(both)) == 3


def test_masks_over_different_numbers_of_weights_do_not_concatenate() -> None:
    with pytest.raises(ValueError, match="expected masks of 70 units, found 71"):
        PackedMasks.empty(70).concatenate(PackedMasks.empty(71))


@pytest.mark.parametrize(
    "words",
    [
        np.zeros((1, 1), dtype=np.uint64),
        np.zeros((1, 3), dtype=np.uint64),
        np.zeros((1, 2), dtype=np.int64),
        np.zeros(2, dtype=np.uint64),
    ],
)
def test_words_of_another_shape_or_type_are_refused(words: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint64 words of shape \(n_masks, 2\) for 70 units"):
        PackedMasks(words, 70)


@pytest.mark.parametrize("bit", [6, 63])
def test_padding_bits_that_are_set_are_refused(bit: int) -> None:
    words = np.array([[0, 1 << bit]], dtype=np.uint64)
    with pytest.raises(ValueError, match="padding bits beyond the last unit must be 0"):
        PackedMasks(words, 70)
    words[0, 1] = 1 << 5
    assert PackedMasks(words, 70).n_kept.tolist() == [1]


def test_a_mask_that_fills_its_last_word_has_no_padding() -> None:
    assert PackedMasks.pack(np.ones((1, 128), dtype=bool)).n_kept.tolist() == [128]


def test_equal_masks_have_equal_fingerprints_and_others_do_not() -> None:
    masks = random_masks(3, 70)
    masks[2] = masks[0]
    keys = PackedMasks.pack(masks).fingerprints()
    assert keys[0] == keys[2] != keys[1]
    wide = np.repeat(PackedMasks.pack(masks).words[0], 2)
    assert fingerprint(wide[::2]) == keys[0]
    assert len(keys[0]) == 16


@given(n_masks=st.integers(0, 4), n_weights=st.integers(1, 200))
def test_masks_packed_one_by_one_are_those_packed_at_once(n_masks: int, n_weights: int) -> None:
    masks = random_masks(n_masks, n_weights)
    one_by_one = PackedMasks.pack_each(iter(masks), n_weights)
    np.testing.assert_array_equal(one_by_one.words, PackedMasks.pack(masks).words)
    assert one_by_one.n_units == n_weights


@pytest.mark.parametrize("n", [0, 3])
def test_the_masks_of_genomes_are_in_their_order(n: int) -> None:
    packed = PackedMasks.pack(random_masks(3, 70))
    masks = PackedMasks.of_genomes([Genome(row) for row in packed.words[:n][::-1]], 70)
    np.testing.assert_array_equal(masks.words, packed.words[:n][::-1])


def test_a_genome_owns_its_words_and_nothing_can_change_them() -> None:
    words = PackedMasks.pack(random_masks(3, 70)).words
    genome = Genome(words[1])
    # A view into the masks of a generation would keep all of them in memory.
    assert genome.words.base is None
    assert genome.fingerprint == fingerprint(words[1])
    with pytest.raises(ValueError, match="read-only"):
        genome.words[0] = 0
    own = words[2].copy()
    assert Genome(own).words is own


def test_a_genome_is_edited_in_a_copy_and_a_draft_in_place() -> None:
    words = PackedMasks.pack(random_masks(1, 70)).words[0].copy()
    draft = Genome(words.copy(), draft=True)
    assert draft.edit() is draft.words
    genome = Genome(words)
    edited = genome.edit()
    edited[0] ^= np.uint64(1)
    assert genome.fingerprint == fingerprint(genome.words) != Genome(edited).fingerprint


def test_a_fingerprint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    genome = Genome(np.zeros(3, dtype=np.uint64))
    first = genome.fingerprint
    monkeypatch.setattr("paretoprune.masks.genomes.fingerprint", lambda words: b"again")
    assert genome.fingerprint == first


def test_saved_masks_load_as_they_were(tmp_path: Path) -> None:
    packed = PackedMasks.pack(random_masks(3, 70))
    packed.save(tmp_path / "masks.npz")
    loaded = PackedMasks.load(tmp_path / "masks.npz")
    assert loaded.n_units == 70
    assert loaded.words.dtype == np.uint64
    np.testing.assert_array_equal(loaded.words, packed.words)


def test_a_layout_knows_where_each_layer_lies(layout: WeightUnits) -> None:
    assert layout.n_weights == 394
    assert layout.n_groups == 3
    assert layout.sizes.tolist() == [108, 216, 70]
    assert layout.offsets.tolist() == [0, 108, 324, 394]
    np.testing.assert_array_equal(layout.group_of, np.repeat([0, 1, 2], [108, 216, 70]))


def test_splitting_undoes_flattening(layout: WeightUnits) -> None:
    flat = np.arange(layout.n_weights)
    parts = layout.split(flat)
    assert [part.shape for part in parts.values()] == list(layout.shapes)
    assert parts["conv2.weight"].ravel()[0] == 108
    reordered = {name: parts[name] for name in reversed(layout.names)}
    np.testing.assert_array_equal(layout.flatten(reordered | {"another": np.zeros(3)}), flat)


def test_flattening_names_the_tensor_that_does_not_fit(layout: WeightUnits) -> None:
    parts = layout.split(np.arange(layout.n_weights))
    with pytest.raises(ValueError, match=r"expected 'linear.weight' of shape \(10, 7\), found \(7, 10\)"):
        layout.flatten(parts | {"linear.weight": np.zeros((7, 10))})
    del parts["conv2.weight"]
    with pytest.raises(ValueError, match=r"expected 'conv2\.weight' .* found nothing"):
        layout.flatten(parts)


@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5), n_masks=st.integers(0, 3))
def test_kept_weights_are_counted_per_layer(sizes: list[int], n_masks: int) -> None:
    several = flat_layout(sizes)
    masks = random_masks(n_masks, several.n_weights)
    counts = several.n_kept(PackedMasks.pack(masks))
    assert counts.shape == (n_masks, len(sizes))
    assert counts.dtype == np.int64
    for row, mask in zip(counts, masks, strict=True):
        assert row.tolist() == [int(part.sum()) for part in several.split(mask).values()]


def test_ranks_follow_the_scores_and_break_ties_by_position() -> None:
    ranks = ranks_within_groups(np.array([2.0, 5.0, 2.0, 7.0, 0.0, 0.0]), flat_layout([4, 2]))
    assert ranks.tolist() == [2, 1, 3, 0, 0, 1]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), values=st.integers(1, 3), data=st.data())
def test_exactly_the_wanted_number_is_kept_under_ties(sizes: list[int], values: int, data: st.DataObject) -> None:
    several = flat_layout(sizes)
    scores = np.array(data.draw(st.lists(st.integers(0, values), min_size=sum(sizes), max_size=sum(sizes))), float)
    wanted = [data.draw(st.integers(0, size)) for size in sizes]
    kept = keep_top(ranks_within_groups(scores, several), wanted, several)
    assert kept.dtype == bool
    for mask, score, n in zip(several.split(kept).values(), several.split(scores).values(), wanted, strict=True):
        assert mask.sum() == n
        if 0 < n < len(mask):
            assert score[mask].min() >= score[~mask].max()


def test_kept_sets_nest_as_the_number_grows() -> None:
    one = flat_layout([30])
    ranks = ranks_within_groups(np.random.default_rng(0).integers(0, 4, 30).astype(float), one)
    masks = [keep_top(ranks, [n], one) for n in range(31)]
    assert all(not np.any(fewer & ~more) for fewer, more in pairwise(masks))


class TestLayoutOfNetworks:
    """These alone import torch, inside the tests."""

    def test_weights_of_convolutions_and_linear_layers_are_found_in_order(self) -> None:
        from torch import nn

        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 2))
        found = WeightUnits.of(network)
        assert found.names == ("0.weight", "3.weight")
        assert found.shapes == ((4, 3, 3, 3), (2, 8))

    def test_a_single_layer_is_a_network_too(self) -> None:
        from torch import nn

        assert WeightUnits.of(nn.Linear(3, 2)).names == ("weight",)

    def test_a_shared_weight_appears_once(self) -> None:
        from torch import nn

        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        network[2].weight = network[0].weight
        assert WeightUnits.of(network).names == ("0.weight", "1.weight")

    def test_excluded_patterns_stay_dense(self) -> None:
        from torch import nn

        network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
        assert WeightUnits.of(network, ["0.*", "2.weight"]).names == ("1.weight",)

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        from torch import nn

        with pytest.raises(ValueError, match=r"exclude pattern 'conv1\.\*' matches none .*\(weight\)"):
            WeightUnits.of(nn.Linear(2, 3), ["conv1.*"])

    def test_excluding_everything_is_refused(self) -> None:
        from torch import nn

        with pytest.raises(ValueError, match=r"outside exclude=\['\*'\]; exclude less"):
            WeightUnits.of(nn.Linear(2, 3), ["*"])

    def test_a_network_without_prunable_layers_is_refused(self) -> None:
        from torch import nn

        with pytest.raises(ValueError, match="at least one convolution or linear layer to prune, found none in this"):
            WeightUnits.of(nn.BatchNorm2d(3))

    def test_a_weight_that_is_computed_from_others_is_refused(self) -> None:
        from torch import nn
        from torch.nn.utils.parametrizations import weight_norm

        with pytest.raises(ValueError, match=r"'0\.weight' is computed from other tensors"):
            WeightUnits.of(nn.Sequential(weight_norm(nn.Linear(2, 3))))
