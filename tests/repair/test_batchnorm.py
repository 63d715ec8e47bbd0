"""Batch-norm repair: its formula by hand, what it must leave alone, and channels without variance."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paretoprune.evaluation.metrics import divergence, predict
from paretoprune.masks.units import MaskLayout
from paretoprune.repair.batchnorm import Recalibration
from paretoprune.repair.repairs import make_repair
from small_networks import digits, magnitude_mask, n_hooks, states_equal, trained
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def calibration() -> Tensor:
    return digits()[0][:200]


def one_layer(weights: list[float], means: list[float], variances: list[float]) -> nn.Sequential:
    """A 1x1 convolution of a grey image, one channel a weight, and its batch norm."""
    conv, norm = nn.Conv2d(1, len(weights), 1, bias=False), nn.BatchNorm2d(len(weights))
    conv.weight.data = torch.tensor(weights).view(-1, 1, 1, 1)
    norm.running_mean, norm.running_var = torch.tensor(means), torch.tensor(variances)
    return nn.Sequential(conv, norm).eval()


def norm_of(network: nn.Module, name: str = "1") -> tuple[list[float], list[float]]:
    layer = network.get_submodule(name)
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.tolist(), layer.running_var.tolist()


def test_statistics_follow_the_formula_by_hand() -> None:
    # Pixels 1 and 3 have mean 2 and variance 1, so a weight w gives mean 2w and variance w².
    images = torch.tensor([1.0, 3.0, 3.0, 1.0]).view(2, 1, 1, 2)
    network = one_layer([2.0, -1.0], [5.0, 0.5], [9.0, 4.0])
    repair = Recalibration(network, images)
    network.get_parameter("0.weight").data = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)
    repair(network)
    means, variances = norm_of(network)
    # m' = m_p + (m - m_d) sqrt(v_p/v_d): 2 + (5 - 4)/2, and -6 + (0.5 - (-2)) * 3.
    assert means == pytest.approx([2.5, 1.5], rel=1e-6)
    # v' = v v_p/v_d: 9/4, and 4 * 9.
    assert variances == pytest.approx([2.25, 36.0], rel=1e-6)


def test_statistics_after_a_linear_layer_follow_the_formula_too() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).eval()
    network.get_parameter("0.weight").data.fill_(2.0)
    repair = Recalibration(network, torch.tensor([[1.0], [3.0]]))
    network.get_parameter("0.weight").data.fill_(1.0)
    repair(network)
    # Trained 0 and 1, dense 4 and 4, pruned 2 and 1: 2 + (0 - 4)/2 = 0 and 1 * 1/4.
    assert norm_of(network)[0] == pytest.approx([0.0], abs=1e-6)
    assert norm_of(network)[1] == pytest.approx([0.25], rel=1e-6)


def test_scaling_all_weights_of_a_layer_changes_nothing_after_its_repaired_norm() -> None:
    network = trained("residual")
    expected = predict(network, calibration(), 64)
    repair = Recalibration(network, calibration())
    network.get_parameter("layer1.0.conv1.weight").data *= 0.5
    assert not torch.allclose(predict(network, calibration(), 64), expected, atol=0.05)
    repair(network)
    # Up to batch norm's epsilon of 1e-5, which is not scaled with the variance.
    torch.testing.assert_close(predict(network, calibration(), 64), expected, rtol=1e-3, atol=5e-3)


def test_layers_are_corrected_on_inputs_from_corrected_layers() -> None:
    norms = [nn.BatchNorm2d(1, affine=False, eps=1e-12) for _ in range(2)]
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), norms[0], nn.Conv2d(1, 1, 1, bias=False), norms[1]).eval()
    for i in (0, 2):
        network.get_parameter(f"{i}.weight").data.fill_(1.0)
    repair = Recalibration(network, calibration())
    network.get_parameter("0.weight").data.fill_(0.25)
    repair(network)
    # The first norm undoes the scaling, so the second sees what it always saw.
    assert norm_of(network, "1")[1] == pytest.approx([0.0625], rel=1e-5)
    assert norm_of(network, "3")[1] == pytest.approx([1.0], rel=1e-5)


@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_the_dense_network_keeps_its_outputs(kind: str) -> None:
    network, images = trained(kind), digits()[0][1000:1200]
    expected = predict(network, images, 64)
    make_repair("batchnorm", network, calibration())(network)
    # Only (m - m_d) + m_d is rounded, a few 1e-7 of activations of size one, through a few layers.
    torch.testing.assert_close(predict(network, images, 64), expected, rtol=1e-5, atol=1e-4)


def test_repair_brings_a_very_sparse_network_closer_to_the_dense_one() -> None:
    dense, images = trained("residual"), digits()[0][1000:]
    layout = MaskLayout.of(dense)
    answers = predict(dense, images, 64).double().log_softmax(1)
    repair = Recalibration(dense, calibration())
    for density in (0.5, 0.3, 0.2):
        pruned = copy.deepcopy(dense)
        parameters = dict(pruned.named_parameters())
        for name, kept in layout.split(magnitude_mask(dense, layout, density)).items():
            parameters[name].data *= torch.from_numpy(kept)
        bare = divergence(predict(pruned, images, 64), answers)
        repair(pruned)
        # A tenth less is far more than the noise of 797 images; typical is a half.
        assert divergence(predict(pruned, images, 64), answers) < 0.9 * bare, density


def test_a_channel_that_is_constant_in_the_pruned_network_gives_its_bias() -> None:
    network = one_layer([1.0, 1.0], [0.3, 0.3], [1.0, 2.0])
    network[1].bias.data = torch.tensor([0.7, 0.0])
    repair = Recalibration(network, calibration())
    network.get_parameter("0.weight").data[0] = 0.0
    repair(network)
    output = predict(network, calibration(), 64)
    assert bool(output.isfinite().all())
    # A channel that says nothing sits at the mean: normalised 0, then the bias.
    torch.testing.assert_close(output[:, 0], torch.full_like(output[:, 0], 0.7))


def test_a_channel_that_is_constant_in_the_dense_network_keeps_its_trained_variance() -> None:
    network = one_layer([0.0, 1.0], [0.3, 0.3], [1.0, 2.0])
    before = predict(network, calibration(), 64)
    repair = Recalibration(network, calibration())
    repair(network)
    torch.testing.assert_close(predict(network, calibration(), 64), before, rtol=0, atol=1e-6)
    network.get_parameter("0.weight").data[0] = 5.0
    repair(network)
    assert norm_of(network)[1][0] == 1.0
    assert bool(predict(network, calibration(), 64).isfinite().all())


@pytest.mark.parametrize("value", [0.1, -3.7, 1e-12, 1e6])
def test_channels_that_are_constant_but_not_zero_stay_finite(value: float) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
            self.conv.weight.data.zero_()
            self.conv.bias.data.fill_(value)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    network = Biased().eval()
    repair = Recalibration(network, calibration())
    for weight in (0.0, 1e-20, 1.0):
        network.conv.weight.data.fill_(weight)
        repair(network)
        assert bool(predict(network, calibration(), 64).isfinite().all()), weight
        assert all(math.isfinite(number) for part in norm_of(network, "norm") for number in part)


def test_networks_without_batch_norm_are_untouched() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    before = copy.deepcopy(network)
    repair = Recalibration(network, calibration())
    assert repair.n_layers == 0
    repair(network)
    assert states_equal(network, before)


def test_batch_norm_without_running_statistics_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    before = copy.deepcopy(network)
    repair = Recalibration(network, calibration())
    assert repair.n_layers == 0
    repair(network)
    assert states_equal(network, before)


def test_a_batch_norm_that_the_network_never_runs_is_left_alone() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    network = Idle().eval()
    repair = Recalibration(network, calibration())
    assert repair.n_layers == 1
    repair(network)
    assert norm_of(network, "unused") == ([0.0], [1.0])


def test_a_batch_norm_that_runs_twice_is_corrected_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)
            self.conv.weight.data.fill_(2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(self.conv(x))))

    network = Twice().eval()
    images = torch.tensor([1.0, 3.0, 3.0, 1.0]).view(2, 1, 1, 2)
    expected = predict(network, images, 2)
    repair = Recalibration(network, images)
    repair(network)
    torch.testing.assert_close(predict(network, images, 2), expected, rtol=1e-5, atol=1e-5)
    network.conv.weight.data.fill_(1.0)
    repair(network)
    # By its first run: mean 4 -> 2 and variance 4 -> 1, trained 0 and 1: 2 + (0 - 4)/2 and 1/4.
    assert norm_of(network, "norm")[0] == pytest.approx([0.0], abs=1e-6)
    assert norm_of(network, "norm")[1] == pytest.approx([0.25], rel=1e-6)


def test_repair_none_changes_nothing() -> None:
    network = trained("residual")
    before = copy.deepcopy(network)
    repair = make_repair("none", network, calibration()[:0])
    network.get_parameter("conv1.weight").data.zero_()
    before.get_parameter("conv1.weight").data.zero_()
    repair(network)
    assert states_equal(network, before)


def test_repairing_twice_equals_repairing_once() -> None:
    network = trained("foreign")
    repair = Recalibration(network, calibration())
    network.get_parameter("grouped.weight").data[:, 0] = 0.0
    repair(network)
    once = copy.deepcopy(network)
    repair(network)
    assert states_equal(network, once)


def test_statistics_of_bfloat16_activations_are_kept_in_float32() -> None:
    network = one_layer([0.0], [0.0], [1.0]).to(torch.bfloat16)
    network[1].float()
    # Pixels that bfloat16 holds exactly, with a mean that it does not.
    images = (torch.arange(256).float() / 256 + 1).to(torch.bfloat16).view(4, 1, 8, 8)
    repair = Recalibration(network, images)
    network.get_parameter("0.weight").data.fill_(1.0)
    repair(network)
    # The channel is constant in the dense network, so m' = m_p + (0 - 0). bfloat16 would be good to 0.4 % only.
    assert norm_of(network)[0] == pytest.approx([images.double().mean().item()], rel=1e-5)


def fails_when(network: nn.Module, failing: Callable[[], bool]) -> nn.Module:
    """The network with a last layer that breaks on demand."""

    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if failing():
                raise RuntimeError("broken on purpose")
            return x

    return nn.Sequential(network, Breaking()).eval()


def test_no_hook_is_left_after_an_error() -> None:
    broken = False
    network = fails_when(trained("residual"), lambda: broken)
    repair = Recalibration(network, calibration())
    assert n_hooks(network) == 0
    broken = True
    with pytest.raises(RuntimeError, match="broken on purpose"):
        repair(network)
    assert n_hooks(network) == 0
    with pytest.raises(RuntimeError, match="broken on purpose"):
        Recalibration(network, calibration())
    assert n_hooks(network) == 0


def test_no_hook_is_left_after_success() -> None:
    network = trained("foreign")
    Recalibration(network, calibration())(network)
    assert n_hooks(network) == 0


def test_repair_without_calibration_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs calibration images, found none; use repair 'none'"):
        make_repair("batchnorm", trained("residual"), calibration()[:0])


def test_an_unknown_repair_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a repair mode among none, batchnorm, reconstruct, found 'magic'"):
        make_repair("magic", trained("residual"), calibration())


def test_activations_that_are_not_finite_name_the_layer() -> None:
    network = trained("residual")
    network.get_parameter("layer2.0.conv1.weight").data[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"activations before 'layer2\.0\.bn1' are not finite"):
        make_repair("batchnorm", network, calibration())
