"""Networks by name: the CIFAR residual networks, torchvision's classifiers, and factories of the user's own."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.copies import unwrapped
from paretoprune.networks.names import CIFAR_RESNETS, FROM_IMAGES


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride = stride
        self.n_new = n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, n_in, h, w) to (n, n_out, ceil(h / stride), ceil(w / stride))."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.n_new:
            # Option A: subsample, and fill the new channels with zeros, half of them before, half after.
            before = self.n_new // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.n_new - before))
        return functional.relu(x + y)


class CifarResNet(nn.Module):
    """Residual network for small images.

    Args:
        depth: 6n + 2; 20, 56 and 110 are the usual ones.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        base_width: Channels of the first stage; the next two have twice and four times as many.

    Raises:
        ValueError: The depth is not 6n + 2.

    Source:
        He et al., "Deep residual learning for image recognition", 2016, section 4.2, shortcut option A.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, base_width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"expected a depth of 6n + 2 with n >= 1, found {depth}; 20 and 56 are such depths")
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, base_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1 = self._stage(base_width, base_width, 1, n_blocks)
        self.layer2 = self._stage(base_width, 2 * base_width, 2, n_blocks)
        self.layer3 = self._stage(2 * base_width, 4 * base_width, 2, n_blocks)
        self.linear = nn.Linear(4 * base_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(n_in: int, n_out: int, stride: int, n_blocks: int) -> nn.Sequential:
        blocks = [BasicBlock(n_in if i == 0 else n_out, n_out, stride if i == 0 else 1) for i in range(n_blocks)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that normalises by running statistics in evaluation mode."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def channels_last(x: Tensor) -> Tensor:
    """Lay a batch of images or activations (n, c, h, w) out channels last, copying only where it is needed.

    Where one channel or one pixel makes both layouts the same memory, its strides say channels last too: kernels choose
    by them. Tables (n, features) and signals (n, c, t) have one layout.
    """
    if x.ndim != 4:
        return x.contiguous()
    _, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, (h * w * c, 1, w * c, c))


def to_channels_last(network: nn.Module) -> nn.Module:
    """Lay the four-dimensional weights out channels last, in place: the layout that convolutions are fastest in.

    torch's own conversion refuses networks with three-dimensional convolutions.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a network again, on another machine and without its weights.

    Attributes:
        name: `resnet8` … `resnet110` (CIFAR), a torchvision classifier such as `torchvision:mobilenet_v3_small`
            (the prefix may be left out unless the name is also a CIFAR ResNet's), or the import path of a factory,
            `package.module:function`.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        arguments: Further keyword arguments of the constructor.
    """

    name: str
    num_classes: int
    in_channels: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """Build the network with freshly drawn weights; the global random state stays as it was.

        Args:
            seed: Seed of the initial weights.

        Raises:
            ValueError: No such network, or its constructor refuses the arguments.
        """
        factory, known = _factory(self.name)
        arguments = {**{k: getattr(self, k) for k in known}, **self.arguments}
        with torch.random.fork_rng(devices=[]):
            # Weights are drawn on the CPU; torch.manual_seed would reseed GPUs too and not put them back.
            torch.default_generator.manual_seed(seed)
            try:
                network = factory(**arguments)
            except TypeError as error:
                raise ValueError(
                    f"network '{self.name}' cannot be built with {arguments}: {error}; correct its `arguments`"
                ) from error
        if not isinstance(network, nn.Module):
            raise ValueError(f"'{self.name}' returned {type(network).__name__}, expected a torch.nn.Module")
        return unwrapped(network)


def _factory(name: str) -> tuple[Any, tuple[str, ...]]:
    """The constructor behind a name, and which of num_classes and in_channels it takes."""
    if name in CIFAR_RESNETS:
        depth = int(name.removeprefix("resnet"))
        return lambda **arguments: CifarResNet(depth, **arguments), FROM_IMAGES
    if ":" in name and not name.startswith("torchvision:"):
        return _user_factory(name)
    return _torchvision_factory(name.removeprefix("torchvision:"))


def _user_factory(path: str) -> tuple[Any, tuple[str, ...]]:
    module_name, _, function_name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected a factory at '{path}' (package.module:function), but: {error}; the module must be importable "
            "from the folder where snakemake is started, or be installed"
        ) from error
    parameters = inspect.signature(factory).parameters
    return factory, tuple(k for k in FROM_IMAGES if k in parameters)


def _torchvision_factory(name: str) -> tuple[Any, tuple[str, ...]]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"expected the name of a network, found '{name}'; give one of "
            f"{', '.join(CIFAR_RESNETS)}, a torchvision classifier "
            f"({', '.join(known[:3])}, …), or a factory as package.module:function"
        )
    return models.get_model_builder(name), ("num_classes",)
