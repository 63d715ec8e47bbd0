"""The plain path: a pruned network layer by layer, and nothing left of it for the next one."""

import copy

import numpy as np
import pytest
import torch
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.metrics import predict
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import channels_last, to_channels_last
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import make_repair
from small_networks import calibration, digits, naive_network, some_masks, states_equal, trained
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

REPAIRS = ("none", "batchnorm")
KINDS = ("residual", "foreign")


def search_images() -> Tensor:
    return digits()[0][1000:1100]


def layerwise(network: nn.Module, repair: str, dtype: torch.dtype = torch.float32) -> LayerwiseNetwork:
    calibrating = calibration().to(dtype)
    return LayerwiseNetwork(
        network, WeightUnits.of(network), calibrating[:2], repair=repair, calibration_images=calibrating
    )


def logits_of(network: LayerwiseNetwork, mask: np.ndarray, images: Tensor) -> Tensor:
    with torch.inference_mode():
        network.prepare(torch.from_numpy(mask))
        return network.answer(images)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_naive_pruned_network(kind: str, repair: str) -> None:
    network = trained(kind)
    masks, plain = some_masks(network), layerwise(network, repair)
    for i in range(len(masks)):
        expected = predict(naive_network(network, masks.unpack(i), repair), search_images(), 100)
        found = logits_of(plain, masks.unpack(i), search_images())
        # float32 logits of size ten; repair divides by the deviation of channels that hardly vary.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 if repair == "none" else 5e-3)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_one_mask_is_left_for_the_next(kind: str, repair: str) -> None:
    network = trained(kind)
    masks, plain = some_masks(network), layerwise(network, repair)
    once = [logits_of(plain, masks.unpack(i), search_images()) for i in range(len(masks))]
    for i in reversed(range(len(masks))):
        assert torch.equal(logits_of(plain, masks.unpack(i), search_images()), once[i])


def test_the_given_network_is_left_as_it_is() -> None:
    network = trained("residual").train()
    before = copy.deepcopy(network)
    plain = layerwise(network, "batchnorm")
    logits_of(plain, some_masks(network).unpack(5), search_images())
    assert states_equal(network, before)
    assert network.training


def test_in_bfloat16_statistics_are_those_of_training_and_weights_are_rounded_once() -> None:
    network = trained("residual")
    plain = layerwise(network, "none", torch.bfloat16)
    for module, original in zip(plain.network.modules(), network.modules(), strict=True):
        if isinstance(module, _BatchNorm):
            assert isinstance(original, _BatchNorm)
            assert module.running_mean is not None
            assert original.running_mean is not None
            assert torch.equal(module.running_mean, original.running_mean)
    mask = np.ones(plain.layout.n_weights, dtype=bool)
    assert logits_of(plain, mask, search_images().to(torch.bfloat16)).dtype == torch.float32
    weight = plain.network.get_parameter("conv1.weight")
    assert torch.equal(weight, network.get_parameter("conv1.weight").to(torch.bfloat16))


def test_an_infinite_weight_can_be_pruned_away() -> None:
    network = trained("foreign")
    network.get_parameter("stem.weight").data[0, 0, 0, 0] = torch.inf
    mask = np.ones(WeightUnits.of(network).n_weights, dtype=bool)
    mask[0] = False
    assert bool(logits_of(layerwise(network, "none"), mask, search_images()).isfinite().all())


def test_there_is_no_place_to_begin_later() -> None:
    assert len(layerwise(trained("residual"), "none").cuts) == 0


def re_fitting(network: nn.Module, cache_mb: int = 64) -> tuple[LayerwiseNetwork, Refit]:
    layout = WeightUnits.of(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    reconstruction = Refit(network, layout, statistics, cache_mb=cache_mb)
    plain = LayerwiseNetwork(
        network,
        layout,
        calibration()[:2],
        repair="reconstruct",
        calibration_images=calibration(),
        refit=reconstruction,
    )
    return plain, reconstruction


@pytest.mark.parametrize("kind", KINDS)
def test_re_fitted_weights_and_biases_take_the_place_of_masked_ones(kind: str) -> None:
    network = trained(kind)
    plain, reconstruction = re_fitting(network)
    for i in (5, 0, 1, 3, 7):
        mask = some_masks(network).unpack(i)
        found = logits_of(plain, mask, search_images())
        # By hand: the weights and biases in place, nothing pruned any more, then the norms one after the other.
        expected_network = copy.deepcopy(network)
        weights = reconstruction(torch.from_numpy(mask))
        state = {f"{module}.bias": bias for module, bias in reconstruction.bias(weights).items()} | weights
        expected_network.load_state_dict(state, strict=False)
        for name, weight in weights.items():
            assert torch.equal(plain.network.get_parameter(name), weight)
        for module, bias in reconstruction.bias(weights).items():
            assert torch.equal(plain.network.get_submodule(module).get_parameter("bias"), bias)
        # Laid out alike, or kernels add up in another order, which small variances magnify.
        to_channels_last(expected_network)
        make_repair("batchnorm", network, channels_last(calibration()))(expected_network)
        torch.testing.assert_close(
            found, predict(expected_network, channels_last(search_images()), 100), rtol=1e-4, atol=1e-3
        )
        if i == 0:
            torch.testing.assert_close(found, predict(network, search_images(), 100), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_one_re_fitted_mask_is_left_for_the_next(kind: str, cache_mb: int) -> None:
    network = trained(kind)
    masks, (plain, _) = some_masks(network), re_fitting(network, cache_mb)
    once = [logits_of(plain, masks.unpack(i), search_images()) for i in range(len(masks))]
    for i in reversed(range(len(masks))):
        assert torch.equal(logits_of(plain, masks.unpack(i), search_images()), once[i])
