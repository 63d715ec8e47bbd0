"""Inputs of the benchmarks: trained ResNets and real images if they are there, otherwise untrained ones and noise."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from paretoprune.data.reading import read_images
from paretoprune.data.splits import normalise
from paretoprune.networks.architectures import CifarResNet
from paretoprune.networks.pretrained import load_checkpoint
from torch import Tensor, nn

# Published networks, and the normalisation that they were trained with; see the experiment cifar10-sample-resnet20.
CHECKPOINTS = {20: "checkpoints/resnet20-12fca82f.th", 56: "checkpoints/resnet56-4bfd9763.th"}
IMAGES = "cifar10-sample.tar"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0


def resnet(depth: int, data: Path | None) -> nn.Module:
    """A ResNet for 32 x 32 images: trained where `data` holds a checkpoint of this depth, otherwise untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = CifarResNet(depth).eval()
    if data is not None and depth in CHECKPOINTS and (data / CHECKPOINTS[depth]).is_file():
        load_checkpoint(network, data / CHECKPOINTS[depth])
    return network


def images_and_labels(n: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """`n` images (n, 3, 32, 32), normalised, and labels: real training images from `data`, or noise without it."""
    rng = np.random.default_rng(SEED)
    if data is not None and (data / IMAGES).is_file():
        found = read_images("imagefolder", data, path=IMAGES)
        chosen = torch.from_numpy(rng.permutation(np.flatnonzero(~found.is_test.numpy()))[:n])
        return normalise(found.images[chosen], MEAN, STD), found.labels[chosen]
    noise = rng.standard_normal((n, 3, 32, 32), dtype=np.float32)
    return torch.from_numpy(noise), torch.from_numpy(rng.integers(0, 10, n))


def data_directory(path: Path) -> Path | None:
    """The folder if it has both images and checkpoints, otherwise None."""
    complete = (path / IMAGES).is_file() and all((path / file).is_file() for file in CHECKPOINTS.values())
    return path if complete else None


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def side_by_side(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds."""
    # A first call warms up. Then the functions take turns, so that a noisy machine slows all of them alike.
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name].append(seconds(function))
    return {name: median(times) for name, times in found.items()}
