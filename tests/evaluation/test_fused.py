"""Fused programs against naive pruned networks, and that they can be left and entered in the middle."""

from collections.abc import Callable
from itertools import pairwise

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, made
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.evaluation.fused import FusedNetwork, unpack_words
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import predict
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.packed import pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.tracing import Convolution, Cut, NotTraceableError
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import REPAIRS as REPAIRS_BY_NAME
from paretoprune.repair.repairs import Repair
from small_networks import calibration, digits, magnitude_mask, naive_network, some_masks, states_equal, trained
from torch import Tensor, nn

REPAIRS = ("none", "batchnorm")
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("residual", "foreign", *ARCHITECTURES)
# Without derivatives there are no statistics to re-fit by.
WITHOUT_DERIVATIVES = ("InPlace",)
N_IMAGES = 100


def network_of(name: str) -> nn.Module:
    return trained(name) if name in ("residual", "foreign") else made(ARCHITECTURES[name])


def placed(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def search_images(dtype: torch.dtype = torch.float32) -> Tensor:
    return placed(digits()[0][1000 : 1000 + N_IMAGES], dtype)


def reconstruction_of(network: nn.Module, layout: WeightUnits, repair: str) -> Refit | None:
    if repair != "reconstruct":
        return None
    return Refit(network, layout, collect_statistics(network, layout, calibration(), seed=0))


def fused(
    network: nn.Module, repair: str, dtype: torch.dtype = torch.float32, layout: WeightUnits | None = None
) -> FusedNetwork:
    layout = layout or WeightUnits.of(network)
    return FusedNetwork(
        network,
        layout,
        search_images(dtype)[:2],
        repair=repair,
        calibration_images=placed(calibration(), dtype),
        refit=reconstruction_of(network, layout, repair),
    )


def layerwise(network: nn.Module, repair: str) -> LayerwiseNetwork:
    layout = WeightUnits.of(network)
    return LayerwiseNetwork(
        network,
        layout,
        search_images()[:2],
        repair=repair,
        calibration_images=placed(calibration()),
        refit=reconstruction_of(network, layout, repair),
    )


def logits_of(
    network: FusedNetwork | LayerwiseNetwork, mask: np.ndarray, images: Tensor, batch_size: int = N_IMAGES
) -> Tensor:
    with torch.inference_mode():
        network.prepare(torch.from_numpy(mask))
        return torch.cat([network.answer(batch) for batch in images.split(batch_size)])


def spread(network: nn.Module) -> float:
    """How much the dense network's logits differ between images: what errors must be small against."""
    logits = predict(network, search_images(), N_IMAGES)
    return float((logits - logits.mean(0)).square().mean().sqrt())


def tolerance(dtype: torch.dtype, repair: str) -> float:
    """Largest error allowed, as a share of the logits' spread."""
    if dtype == torch.bfloat16:
        # Eight bits of mantissa: up to 0.4 % a value, through up to nine layers.
        return 0.15
    # float32 is good to 1e-7 a value. Repair divides by the deviation of channels that hardly vary, whose moments the
    # naive loop takes in float64.
    return 2e-5 if repair == "none" else 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_network_answers_as_the_naive_pruned_one(name: str, repair: str, dtype: torch.dtype) -> None:
    network = network_of(name)
    masks = some_masks(network)
    quick, plain = fused(network, repair, dtype), layerwise(network, repair)
    # Where a mask leaves channels all but constant, repair magnifies what bfloat16 has rounded away.
    for i in range(len(masks)) if dtype == torch.float32 else (0, 2, 3, 4, 5):
        expected = predict(naive_network(network, masks.unpack(i), repair), search_images(), N_IMAGES)
        found = logits_of(quick, masks.unpack(i), search_images(dtype))
        assert found.dtype == torch.float32
        # Such channels also keep float32 layer by layer from what the naive loop finds with moments in float64.
        inherent = float((logits_of(plain, masks.unpack(i), search_images()) - expected).abs().max())
        allowed = tolerance(dtype, repair) * spread(network) + 3 * inherent
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


class BiasedOnly(architectures.Small):
    """Convolutions with a bias and no batch norm to take up a shift."""

    def body(self) -> None:
        self.a, self.b = architectures.conv(8, 8, bias=True), architectures.conv(8, 8, groups=2, bias=True)

    def middle(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + x).relu()


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in WITHOUT_DERIVATIVES), "BiasedOnly"])
def test_a_fused_network_with_re_fitted_weights_answers_as_layer_by_layer(name: str) -> None:
    network = made(BiasedOnly) if name == "BiasedOnly" else network_of(name)
    masks, quick, plain = some_masks(network), fused(network, "reconstruct"), layerwise(network, "reconstruct")
    bare = layerwise(network, "batchnorm")
    for i in (5, 0, 1, 3, 4, 7, 5):
        expected = logits_of(plain, masks.unpack(i), search_images())
        found = logits_of(quick, masks.unpack(i), search_images())
        # Where a layer keeps no weights, what is normalised is rounding.
        allowed = (10 if i in (1, 7) else 1) * tolerance(torch.float32, "reconstruct") * spread(network)
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
        if i in (3, 4, 5):
            # It is not the masked network that both answer as.
            assert float((logits_of(bare, masks.unpack(i), search_images()) - expected).abs().max()) > 0.01 * spread(
                network
            )


@pytest.mark.parametrize("name", ["residual", "foreign", "BiasAndNorm"])
def test_in_bfloat16_re_fitted_networks_answer_about_the_same(name: str) -> None:
    network = network_of(name)
    quick, plain = fused(network, "reconstruct", torch.bfloat16), layerwise(network, "reconstruct")
    mask = some_masks(network).unpack(4)
    expected, found = logits_of(plain, mask, search_images()), logits_of(quick, mask, search_images(torch.bfloat16))
    allowed = tolerance(torch.bfloat16, "reconstruct") * spread(network)
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["residual", "foreign", "BiasAndNorm", "UsedTwice"])
def test_nothing_of_one_re_fitted_mask_is_left_for_the_next(name: str) -> None:
    network = network_of(name)
    masks, quick = some_masks(network), fused(network, "reconstruct")
    once = [logits_of(quick, masks.unpack(i), search_images()) for i in range(len(masks))]
    for i in np.random.default_rng(0).permutation(len(masks)):
        assert torch.equal(logits_of(quick, masks.unpack(i), search_images()), once[i])


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", ["residual", "foreign", "SqueezeExcite"])
def test_layers_that_are_excluded_stay_dense(name: str, repair: str) -> None:
    network = network_of(name)
    exclude = {"residual": ["conv1.weight", "layer2.0.*"], "foreign": ["grouped.weight", "first.weight", "line.*"]}
    excluded = exclude.get(name, ["stem.weight", "excite.weight", "head.weight"])
    layout = WeightUnits.of(network, excluded)
    assert layout.n_groups < WeightUnits.of(network).n_groups
    quick = fused(network, repair, layout=layout)
    for mask in (np.zeros(layout.n_weights, dtype=bool), magnitude_mask(network, layout, 0.4)):
        expected = predict(naive_network(network, mask, repair, excluded), search_images(), N_IMAGES)
        allowed = tolerance(torch.float32, repair) * spread(network)
        torch.testing.assert_close(logits_of(quick, mask, search_images()), expected, rtol=0, atol=allowed)


# Each of these computes something else if it is rewritten without care; to refuse them is as good as to be right.
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    "kind",
    [
        architectures.ReadAfterInPlace,
        architectures.ReadAfterSharedInPlace,
        architectures.ViewOfInPlace,
        architectures.InPlaceOnView,
        architectures.Hooked,
        architectures.OwnNorms,
    ],
)
def test_what_is_not_refused_is_right(kind: Callable[[], nn.Module], repair: str) -> None:
    network = made(kind)
    try:
        quick = fused(network, repair)
    except NotTraceableError:
        return
    for i in (3, 5):
        mask = some_masks(network).unpack(i)
        expected = predict(naive_network(network, mask, repair), search_images(), N_IMAGES)
        allowed = tolerance(torch.float32, repair) * spread(network)
        torch.testing.assert_close(logits_of(quick, mask, search_images()), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", ["residual", "foreign", "PreActivation", "Concatenated", "InPlace"])
def test_nothing_of_one_mask_is_left_for_the_next(name: str, repair: str, dtype: torch.dtype) -> None:
    network = network_of(name)
    masks, quick = some_masks(network), fused(network, repair, dtype)
    once = [logits_of(quick, masks.unpack(i), search_images(dtype)) for i in range(len(masks))]
    for i in np.random.default_rng(0).permutation(len(masks)):
        assert torch.equal(logits_of(quick, masks.unpack(i), search_images(dtype)), once[i])
    other = fused(network, repair, dtype)
    assert torch.equal(logits_of(other, masks.unpack(4), search_images(dtype)), once[4])


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_network_nor_the_images_are_changed(name: str) -> None:
    network, before = network_of(name), network_of(name)
    images, calibrating = search_images(), placed(calibration())
    quick = FusedNetwork(
        network, WeightUnits.of(network), images[:2], repair="batchnorm", calibration_images=calibrating
    )
    logits_of(quick, some_masks(network).unpack(5), images)
    assert states_equal(network, before)
    assert torch.equal(images, search_images())
    assert torch.equal(calibrating, placed(calibration()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_pruning_has_made_constant_gives_the_shift_of_its_norm(dtype: torch.dtype) -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = made(lambda: nn.Sequential(*layers))
    # Biases that bfloat16 does not hold exactly.
    network.get_parameter("0.bias").data.copy_(torch.tensor([0.1, 0.3, -0.7, 1.1]))
    nothing = np.zeros(WeightUnits.of(network).n_weights, dtype=bool)
    found = logits_of(fused(network, "batchnorm", dtype), nothing, search_images(dtype))
    # The shift itself may be rounded to eight bits. The deviation of a constant channel counts as sqrt(eps) = 0.003,
    # and float32 sums of thousands of its values are 1e-5 off.
    torch.testing.assert_close(found, network.get_parameter("1.bias").data.expand_as(found), rtol=0.004, atol=5e-3)


def test_weights_that_are_not_finite_can_be_pruned_away() -> None:
    network = trained("residual")
    layout = WeightUnits.of(network)
    network.get_parameter("layer1.0.conv1.weight").data[0, 0, 0, 0] = torch.inf
    mask = np.ones(layout.n_weights, dtype=bool)
    mask[layout.offsets[layout.names.index("layer1.0.conv1.weight")]] = False
    assert bool(logits_of(fused(network, "none"), mask, search_images()).isfinite().all())
    assert not bool(logits_of(fused(network, "none"), np.ones_like(mask), search_images()).isfinite().all())


def test_sums_are_written_over_their_shortcut_only_where_nobody_reads_it_again() -> None:
    def overwriting(name: str) -> dict[str, bool]:
        compiled = fused(network_of(name), "none").compiled
        return {
            step.module: i in compiled.overwriting
            for i, step in enumerate(compiled.steps)
            if isinstance(step, Convolution) and step.other is not None
        }

    assert overwriting("residual")["layer1.0.conv2"]
    assert overwriting("ReadAgain") == {"a": False, "b": False}
    assert overwriting("ViewReadAgain") == {"a": False}
    assert overwriting("SumOfInput") == {"a": False, "b": False}
    assert not any(overwriting("SqueezeExcite").values())


def test_only_repairs_that_recalibrate_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS_BY_NAME, "magic", Repair(lambda network, images: lambda pruned: None))
    with pytest.raises(NotTraceableError, match="repair 'magic' works layer by layer"):
        fused(trained("residual"), "magic")


def test_an_answer_that_is_no_matrix_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(NotTraceableError, match="its output is no matrix of logits"):
        fused(network, "none")


def test_a_convolution_of_something_else_than_batches_of_images_is_refused() -> None:
    class Unbatched(architectures.Plain):
        def between(self, x: Tensor) -> Tensor:
            return self.a(x[0])[None] + x

    with pytest.raises(NotTraceableError, match="'a' convolves something else than batches of images"):
        fused(made(Unbatched), "none")


# ------------------------------------------------------------------------------------------------------------- cuts


def room(cut: Cut, n: int, dtype: torch.dtype) -> Tensor:
    """Memory for activations at a cut, filled with what nobody may read."""
    return torch.full((n, *cut.shape), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)


WITH_CUTS = ("residual", "foreign", "Downsampled", "InPlace", "BiasAndNorm", "UsedTwice", "NormUsedTwice", "OtherNorms")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "repair"),
    [(name, repair) for name in WITH_CUTS for repair in REPAIRS]
    + [(name, "reconstruct") for name in WITH_CUTS if name not in WITHOUT_DERIVATIVES],
)
def test_a_run_from_a_cut_equals_the_whole_run_bit_for_bit(name: str, repair: str, dtype: torch.dtype) -> None:
    network = network_of(name)
    quick, masks = fused(network, repair, dtype), some_masks(network)
    calibrating = placed(calibration(), dtype) if repair != "none" else None
    assert quick.cuts
    for i in (3, 5, 7):
        kept = torch.from_numpy(masks.unpack(i))
        expected = logits_of(quick, masks.unpack(i), search_images(dtype), N_IMAGES)
        rows = {cut: room(cut, N_IMAGES, dtype) for cut in quick.cuts}
        calibrated = {cut: room(cut, 200, dtype) for cut in quick.cuts}
        with torch.inference_mode():
            quick.prepare(kept, keep=calibrated if calibrating is not None else None)
            assert torch.equal(quick.answer(search_images(dtype), keep=rows), expected)
            copies = [(rows[cut].clone(), calibrated[cut].clone()) for cut in quick.cuts]
            for cut, (row_copy, calibrated_copy) in zip(quick.cuts, copies, strict=True):
                # Another mask in between, so that nothing can be left over from the whole run.
                quick.prepare(torch.from_numpy(masks.unpack(1)))
                later = [other for other in quick.cuts if other.after > cut.after]
                anew = {other: (room(other, N_IMAGES, dtype), room(other, 200, dtype)) for other in later}
                quick.prepare(kept, cut, calibrated[cut], {other: anew[other][1] for other in later})
                found = quick.answer(rows[cut], cut, {other: anew[other][0] for other in later})
                assert torch.equal(found, expected), cut
                assert torch.equal(rows[cut], row_copy)
                if calibrating is not None:
                    assert torch.equal(calibrated[cut], calibrated_copy)
                for other in later:
                    assert torch.equal(anew[other][0], rows[other])
                    if calibrating is not None:
                        assert torch.equal(anew[other][1], calibrated[other])


@pytest.mark.parametrize("name", WITH_CUTS)
def test_activations_at_a_cut_depend_on_the_weights_before_it_only(name: str) -> None:
    network = network_of(name)
    layout, quick = WeightUnits.of(network), fused(network, "batchnorm")
    rng = np.random.default_rng(0)
    for cut in quick.cuts:
        assert cut.parameters <= set(layout.names)
        before = np.isin(layout.names, list(cut.parameters))[layout.group_of]
        mask = rng.random(layout.n_weights) < 0.6

        def kept(mask: np.ndarray, cut: Cut = cut) -> Tensor:
            rows = room(cut, N_IMAGES, torch.float32)
            with torch.inference_mode():
                quick.prepare(torch.from_numpy(mask))
                quick.answer(search_images(), keep={cut: rows})
            return rows

        expected = kept(mask)
        assert not bool(expected.isnan().any())
        assert torch.equal(kept(np.where(before, mask, rng.random(layout.n_weights) < 0.3)), expected)
        for name_before in cut.parameters:
            other = mask.copy()
            other[layout.group_of == layout.names.index(name_before)] ^= True
            assert not torch.equal(kept(other), expected), name_before


def test_cuts_lie_in_order_and_tell_the_share_of_work_before_them() -> None:
    cuts = fused(trained("residual"), "none").cuts
    assert len(cuts) >= 2
    assert all(a.after < b.after and a.share < b.share and a.parameters < b.parameters for a, b in pairwise(cuts))
    assert all(0 < cut.share < 1 for cut in cuts)


def test_where_more_than_one_tensor_is_needed_there_is_no_cut() -> None:
    # Every sum of this network is needed again at its end.
    assert len(fused(network_of("ReadAgain"), "none").cuts) == 0


# ------------------------------------------------------------------------------------------------ words and libraries


@given(st.integers(1, 300), st.randoms(use_true_random=False))
def test_words_are_unpacked_as_numpy_unpacks_them(n_weights: int, random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    for mask in (rng.random(n_weights) < 0.5, np.ones(n_weights, dtype=bool), np.arange(n_weights) % 64 == 63):
        row = pack_rows(mask[None])[0]
        found = unpack_words(torch.from_numpy(row.view(np.int64)), n_weights)
        assert found.dtype == torch.bool
        assert np.array_equal(found.numpy(), unpack_row(row, n_weights))
        assert np.array_equal(found.numpy(), mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_words_to_logits_is_the_same_as_step_by_step(dtype: torch.dtype) -> None:
    network = trained("foreign")
    masks, quick = some_masks(network), fused(network, "batchnorm", dtype)
    for i in range(len(masks)):
        words = torch.from_numpy(masks.words[i].copy().view(np.int64))
        with torch.inference_mode():
            found = quick.logits(words, search_images(dtype).split(64))
        assert torch.equal(found, logits_of(quick, masks.unpack(i), search_images(dtype), 64))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision_s_networks_answer_as_layer_by_layer(name: str) -> None:
    import torchvision

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.get_model(name, weights=None, num_classes=10).train()
        with torch.no_grad():
            for module in network.modules():
                # Otherwise what little is left of an image vanishes in the epsilon of the batch norms.
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
            for _ in range(8):
                network(images)
    network.eval()
    layout = WeightUnits.of(network)
    for repair in REPAIRS:
        options = {"repair": repair, "calibration_images": placed(images)}
        quick = FusedNetwork(network, layout, placed(images[:2]), **options)  # type: ignore[arg-type]
        plain = LayerwiseNetwork(network, layout, placed(images[:2]), **options)  # type: ignore[arg-type]
        for density in (1.0, 0.5):
            mask = magnitude_mask(network, layout, density)
            with torch.inference_mode():
                plain.prepare(torch.from_numpy(mask))
                expected = plain.answer(placed(images))
            found = logits_of(quick, mask, placed(images))
            # Both in float32, but in another order through up to fifty layers; repair normalises what is left of
            # images of 1x1 pixels by moments of 16 numbers.
            scale = float((expected - expected.mean(0)).square().mean().sqrt())
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * scale)
