"""Networks by name: keys and sizes of the CIFAR ones, the shortcut by hand, user factories and torchvision."""

import random
from pathlib import Path

import pytest
import torch
from paretoprune.networks.architectures import Architecture, BasicBlock, CifarResNet
from paretoprune.networks.names import CIFAR_RESNETS
from small_networks import numpy_state, states_equal
from torch import nn

FACTORIES = """
import torch
from torch import nn

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

def full(num_classes, in_channels, width=2):
    return nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.Flatten(), nn.Linear(4 * width, num_classes))

def no_network():
    return "a network"

THING = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path of a module with factories, under a name of its own."""
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(("depth", "n_parameters"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_the_usual_depths_have_the_published_numbers_of_parameters(depth: int, n_parameters: int) -> None:
    network = Architecture(f"resnet{depth}", 10, 3).build()
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == n_parameters


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_keys_are_those_of_the_published_checkpoints(depth: int) -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{key}" for key in norm)}
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            for i in (1, 2):
                expected.add(f"layer{stage}.{block}.conv{i}.weight")
                expected.update(f"layer{stage}.{block}.bn{i}.{key}" for key in norm)
    assert set(CifarResNet(depth).state_dict()) == expected


def test_the_shortcut_subsamples_and_pads_channels_with_zeros() -> None:
    block = BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.conv1.weight)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = block(x)
    # With silent convolutions only the shortcut speaks: channels 2 and 3 of six, every other pixel, after the ReLU.
    assert y.shape == (3, 6, 3, 3)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2].relu())
    assert y[:, [0, 1, 4, 5]].abs().sum() == 0


def test_a_shortcut_between_equal_shapes_is_the_identity() -> None:
    block = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(block(x), x.relu())


def test_an_odd_number_of_new_channels_is_padded_completely() -> None:
    assert BasicBlock(2, 5, stride=2)(torch.zeros(2, 2, 5, 5)).shape == (2, 5, 3, 3)


@pytest.mark.parametrize("depth", [0, 2, 7, 9, 18, 21, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a depth of 6n \+ 2 with n >= 1, found {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 7, 8), (3, 100, 32), (4, 2, 17)])
def test_channels_and_classes_are_those_asked_for(channels: int, classes: int, size: int) -> None:
    network = Architecture("resnet8", classes, channels, {"base_width": 4}).build().eval()
    with torch.no_grad():
        assert network(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_every_listed_depth_can_be_built_by_name() -> None:
    for name in CIFAR_RESNETS:
        network = Architecture(name, 2, 1, {"base_width": 1}).build()
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(convolutions) == int(name.removeprefix("resnet"))


def test_a_seed_fixes_the_weights() -> None:
    architecture = Architecture("resnet8", 10, 1)
    assert states_equal(architecture.build(3), architecture.build(3))
    assert not states_equal(architecture.build(3), architecture.build(4))


def test_building_leaves_global_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy_state()
    Architecture("resnet8", 10, 1).build(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]


def test_building_leaves_global_random_state_as_it_was_after_an_error_too() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="cannot be built"):
        Architecture("resnet8", 10, 1, {"depht": 3}).build(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_user_s_factory_is_given_what_it_takes(factories: str) -> None:
    network = Architecture(f"{factories}:full", 5, 2, {"width": 3}).build()
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 2, 1, 1), (3,), (5, 12), (5,)]


def test_a_user_s_factory_without_num_classes_is_left_alone(factories: str) -> None:
    network = Architecture(f"{factories}:bare", 5, 2).build()
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 4), (3,)]


def test_arguments_have_the_last_word(factories: str) -> None:
    network = Architecture(f"{factories}:full", 5, 2, {"num_classes": 9}).build()
    assert network(torch.zeros(1, 2, 2, 2)).shape == (1, 9)


def test_a_factory_that_is_no_network_is_refused(factories: str) -> None:
    with pytest.raises(ValueError, match=r"no_network' returned str, expected a torch\.nn\.Module"):
        Architecture(f"{factories}:no_network", 5, 2).build()


def test_a_user_s_factory_with_other_arguments_is_refused(factories: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be built with .*'depth': 3.*unexpected keyword .*correct its `argum"):
        Architecture(f"{factories}:full", 5, 2, {"depth": 3}).build()


@pytest.mark.parametrize("path", ["no_such_module_here:build", "{}:no_such_function"])
def test_a_factory_that_is_not_there_is_named(factories: str, path: str) -> None:
    path = path.format(factories)
    with pytest.raises(ValueError, match=rf"expected a factory at '{path}' .*, but: .*must be importable"):
        Architecture(path, 5, 2).build()


@pytest.mark.parametrize("prefix", ["", "torchvision:"])
def test_torchvision_classifiers_are_built_by_name(prefix: str) -> None:
    network = Architecture(f"{prefix}squeezenet1_1", 7, 3).build().eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_name_that_nobody_knows_is_refused_with_some_that_are_known() -> None:
    for name in ("resnet21", "torchvision:resnet20", "nonsense", ""):
        with pytest.raises(
            ValueError, match=rf"found '{name.removeprefix('torchvision:')}'; give one of resnet8, .*fact"
        ):
            Architecture(name, 10, 3).build()


def test_names_that_both_know_mean_the_cifar_network_unless_prefixed() -> None:
    assert isinstance(Architecture("resnet110", 10, 3).build(), CifarResNet)
    assert not isinstance(Architecture("resnet18", 10, 3).build(), CifarResNet)


def test_arguments_that_a_cifar_network_does_not_take_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"network 'resnet20' cannot be built with .*'width': 3.*correct its `arguments`"
    ):
        Architecture("resnet20", 10, 3, {"width": 3}).build()
