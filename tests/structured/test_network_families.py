"""A small network of each family of torchvision, and some of timm: how much can be cut, and what is left then."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_networks import awake, difference, shares_in_groups, silenced, some_bits, without_norms_of_all
from paretoprune.copies import copied
from paretoprune.deployment.export import export_onnx
from paretoprune.structured.refit import SlimRefit
from paretoprune.structured.units import ChannelUnits
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.inception import InceptionA
from torchvision.models.maxvit import MaxVit
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vgg import make_layers


def shallow(block: Any, **options: Any) -> nn.Module:
    return models.ResNet(block, [1, 2, 1, 1], num_classes=10, **options)


def with_small_head(make: Callable[[], nn.Module], n_inputs: int) -> nn.Module:
    """A network whose first linear layers would be most of its weights."""
    with torch.device("meta"):
        network: Any = make()
        network.classifier = nn.Sequential(nn.Linear(n_inputs, 24), nn.ReLU(), nn.Linear(24, 10))
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        width = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, std=2**0.5 * width, generator=generator)
    return network


def mobile_v3() -> nn.Module:
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [block(8, 3, 16, 8, True, "RE", 2), block(8, 3, 24, 8, False, "HS", 1), block(8, 5, 24, 12, True, "HS", 1)]
    return models.MobileNetV3(blocks, 32, num_classes=10)


def efficient(*, fused: bool) -> nn.Module:
    first: Any = FusedMBConvConfig if fused else partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    second: Any = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [first(1, 3, 1, 8, 8, 1), first(4, 3, 2, 8, 16, 2), second(4, 3, 2, 16, 24, 2)]
    return models.EfficientNet(blocks, 0.0, num_classes=10, last_channel=32)


def regular(squeeze: float | None) -> nn.Module:
    params = BlockParams([1, 2], [8, 16], [4, 8], [1.0, 1.0], [2, 2], squeeze)
    return models.RegNet(params, num_classes=10, stem_width=8)


def windows(version: int) -> nn.Module:
    options: dict[str, Any] = {}
    if version == 2:
        options = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], 12, [2, 2], [3, 6], [4, 4], num_classes=10, **options)


def maxvit() -> nn.Module:
    return MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=10)


def of_timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    network: nn.Module = timm.create_model(name, num_classes=10, **options)
    return network


def convnext() -> nn.Module:
    return models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=10)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=10)


def googlenet() -> nn.Module:
    network = models.GoogLeNet(num_classes=10, aux_logits=False, init_weights=False)
    return without(network, "inception4b", "inception4c", "inception5a")


def inception() -> nn.Module:
    network: Any = models.Inception3(num_classes=10, init_weights=False, aux_logits=False)
    network.Mixed_5b = InceptionA(192, 64)
    return without(network, "Mixed_5c", "Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")


def without(network: nn.Module, *names: str) -> nn.Module:
    """A network without blocks of which others are there."""
    for name in names:
        network.set_submodule(name, nn.Identity())
    return network


def mixer(*, gated: bool) -> nn.Module:
    """MLP-Mixer, or gMLP with its spatial gates."""
    mixers = pytest.importorskip("timm.models.mlp_mixer")
    options: dict[str, Any] = {}
    if gated:
        options = {"block_layer": mixers.SpatialGatingBlock, "mlp_layer": mixers.GatedMlp, "mlp_ratio": 4}
    network: nn.Module = mixers.MlpMixer(10, img_size=32, patch_size=8, num_blocks=2, embed_dim=16, **options)
    return network


@dataclass(frozen=True)
class Family:
    """A network, and what is expected of it.

    Attributes:
        make: Builds it, untrained.
        size: Pixels along a side of its images.
        macs: Share of the multiply-adds in groups that can be cut, at least.
        branches: Groups that may vanish, at least.
        does: `onnx` where it is exported, `refit` where it is re-fitted.
    """

    make: Callable[[], nn.Module]
    size: int
    macs: float
    branches: int = 0
    does: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "alexnet": Family(lambda: with_small_head(models.AlexNet, 256 * 36), 64, 1.0),
    "vgg": Family(
        lambda: with_small_head(lambda: models.VGG(make_layers([8, "M", 12, "M", 16], batch_norm=True)), 784), 32, 1.0
    ),
    "resnet of basic blocks": Family(lambda: shallow(BasicBlock), 32, 1.0, 5),
    "resnet of bottlenecks": Family(lambda: shallow(Bottleneck), 32, 1.0, 10),
    "resnext": Family(lambda: shallow(Bottleneck, groups=8, width_per_group=4), 32, 1.0, 10),
    "wide_resnet": Family(lambda: shallow(Bottleneck, width_per_group=96), 32, 1.0, 10),
    "densenet": Family(lambda: models.DenseNet(8, (2, 3), 16, num_classes=10), 32, 1.0, 0, ("refit",)),
    "googlenet": Family(googlenet, 32, 1.0),
    "inception_v3": Family(inception, 80, 1.0),
    "squeezenet": Family(lambda: models.squeezenet1_1(num_classes=10), 32, 1.0),
    "shufflenet": Family(lambda: models.shufflenet_v2_x0_5(num_classes=10), 32, 0.7, 10, ("onnx", "refit")),
    "mobilenet_v2": Family(lambda: models.MobileNetV2(10, 0.25), 32, 1.0, 10),
    "mobilenet_v3": Family(mobile_v3, 32, 1.0, 2, ("refit",)),
    "mnasnet": Family(lambda: models.MNASNet(0.25, 10), 32, 1.0, 10),
    "efficientnet": Family(lambda: efficient(fused=False), 32, 1.0, 3),
    "efficientnet_v2": Family(lambda: efficient(fused=True), 32, 1.0, 3),
    "regnet_x": Family(lambda: regular(None), 32, 1.0, 3),
    "regnet_y": Family(lambda: regular(0.25), 32, 1.0, 3),
    "convnext": Family(convnext, 32, 1.0, 3, ("refit",)),
    "vit": Family(vit, 32, 0.8, 5, ("onnx", "refit")),
    "swin": Family(lambda: windows(1), 32, 0.8, 8, ("onnx", "refit")),
    "swin_v2": Family(lambda: windows(2), 32, 0.75, 4, ("refit",)),
    "maxvit": Family(maxvit, 32, 1.0, 10, ("refit",)),
}  # fmt: skip
TIMM: dict[str, Family] = {
    "resnet10t": Family(lambda: of_timm("resnet10t"), 32, 1.0),
    "convnext": Family(lambda: of_timm("convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)), 32, 1.0),
    "vit": Family(
        lambda: of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2),
        32, 1.0, 3, ("refit",),
    ),
    "swin": Family(
        lambda: of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2)),
        32, 0.8, 4,
    ),
    "mixer": Family(lambda: mixer(gated=False), 32, 0.5),
    "gmlp": Family(lambda: mixer(gated=True), 32, 0.3),
    "eva": Family(
        lambda: of_timm("eva02_tiny_patch14_224", img_size=28, embed_dim=24, depth=2, num_heads=3), 28, 0.35
    ),
    "mobilenetv3": Family(lambda: of_timm("mobilenetv3_small_050"), 32, 1.0),
    "regnet": Family(lambda: of_timm("regnetx_002"), 32, 1.0),
}  # fmt: skip
ALL = FAMILIES | {f"timm's {name}": family for name, family in TIMM.items()}


def images_of(family: Family, n: int) -> Tensor:
    return torch.randn(n, 3, family.size, family.size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_most_of_a_family_can_be_cut_and_the_rest_answers_as_before(name: str, tmp_path: Path) -> None:
    family = ALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = awake(family.make())
    images = images_of(family, 3)
    units = ChannelUnits.of(network, images[:1])
    macs, parameters = shares_in_groups(network, units, images[:1])
    assert macs >= family.macs - 1e-9, units.refused
    assert parameters >= 0.9 * family.macs, units.refused
    assert sum(one.may_vanish for one in units.couplings) >= family.branches
    bits = some_bits(units)
    alone = without_norms_of_all(units, bits)
    with torch.no_grad():
        whole = copied(network).double()
        expected = silenced(copied(whole), units.couplings, units.split(alone))(images.double())
        assert difference(units.slim(whole, alone)(images.double()), expected) < 1e-5
        # Where there is something to be silenced, it was heard.
        assert alone.all() or difference(whole(images.double()), expected) > 1e-4
        small = units.slim(network, bits)
        assert small(images).shape == (3, 10)
    n_parameters, n_left = (sum(one.numel() for one in each.parameters()) for each in (network, small))
    assert n_left < (1 - 0.25 * family.macs) * n_parameters
    if "refit" in family.does:
        calibration = images_of(family, 24)
        fitted = SlimRefit(network, units, calibration)(bits)
        with torch.no_grad():
            assert difference(fitted(calibration), network(calibration)) < difference(
                small(calibration), network(calibration)
            )
    if "onnx" in family.does:
        export_onnx(small, images, tmp_path / "small.onnx")


def test_all_of_torchvision_is_here() -> None:
    known = "resnet", *FAMILIES
    assert [name for name in models.list_models(module=models) if not name.startswith(known)] == []
