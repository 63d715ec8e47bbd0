"""What is compared: a trained network, the images of the experiment `faster-resnet56`, and what can be cut."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from paretoprune.copies import copied
from paretoprune.data.datasets import ImageSet
from paretoprune.data.reading import read_images
from paretoprune.data.splits import LabelledImages, Splits, split_images
from paretoprune.masks.packed import PackedMasks
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.pretrained import load_checkpoint
from paretoprune.objectives import Cost
from paretoprune.structured.judging import SlimTask
from paretoprune.structured.units import ChannelUnits, slim_costs
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.inputs import CHECKPOINTS

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "faster-resnet56.yaml"
SEED = 0
BATCH_SIZE = 64


@dataclass(frozen=True)
class Subject:
    """A dense network and its images, divided as for a search.

    Attributes:
        dense: The trained network.
        calibration: For repairs, and for gradients where a tool wants some; only such a tool looks at labels.
        search: For choosing among candidates.
        test: For measuring.
        units: What can be cut.
        macs: Multiply-adds of masks, relative to the whole network.
    """

    dense: DenseNetwork
    calibration: LabelledImages
    search: LabelledImages
    test: LabelledImages
    units: ChannelUnits
    macs: Cost

    @classmethod
    def of(cls, dense: DenseNetwork, image_set: ImageSet, splits: Splits) -> "Subject":
        """A subject of a dense network and of images that are divided."""
        calibration, search, test = (
            LabelledImages.of(image_set, indices, dense.mean, dense.std)
            for indices in (splits.calibration, splits.search, splits.test)
        )
        image = search.images[:1]
        units = ChannelUnits.of(dense.network, image, dense.exclude, strict=False)
        (macs,) = slim_costs(["macs"], units, dense.network, image)
        return cls(dense, calibration, search, test, units, macs)

    @property
    def network(self) -> nn.Module:
        """The dense network, in evaluation mode."""
        return self.dense.network

    @property
    def task(self) -> SlimTask:
        """The same as a search takes it."""
        return SlimTask(self.network, self.units, self.search.images, self.search.labels, self.calibration.images)

    @cached_property
    def fingerprint(self) -> str:
        """Tells results of one network and one division of images from those of another."""
        digest = hashlib.sha256()
        tensors = [tensor for tensor in self.network.state_dict().values() if tensor.is_floating_point()]
        for images in (self.calibration, self.search, self.test):
            tensors += [images.images, images.labels]
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the mean cross-entropy on the calibration images, by the names of the parameters."""
        network = copied(self.network)
        network.requires_grad_(True)
        given, n = self.calibration, len(self.calibration)
        with torch.enable_grad():
            for images, labels in zip(given.images.split(BATCH_SIZE), given.labels.split(BATCH_SIZE), strict=True):
                (functional.cross_entropy(network(images), labels, reduction="sum") / n).backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    def removed(self, bits: Any) -> float:
        """Share of the multiply-adds that a mask, bool (n_units,), removes."""
        return 1.0 - float(self.macs.of(PackedMasks.pack_each([bits], self.units.n_units))[0])


def experiment() -> dict[str, Any]:
    """The settings of the experiment that others are compared with."""
    settings: dict[str, Any] = yaml.safe_load(EXPERIMENT.read_text(encoding="utf-8"))
    return settings


def prepared(depth: int, data: Path) -> Subject:
    """The subject that the experiment's first steps make, in memory.

    Args:
        depth: Of the ResNet, 20 or 56.
        data: Folder with the images and the checkpoints.
    """
    settings = experiment()
    (dataset,) = settings["datasets"].values()
    (network,) = settings["networks"].values()
    mean, std = (tuple(network["normalisation"][key]) for key in ("mean", "std"))
    image_set = read_images(dataset["source"], data, path=dataset["path"])
    sizes = {name: dataset[name] for name in ("calibration", "search", "test")}
    splits = split_images(image_set.labels.numpy(), image_set.is_test.numpy(), **sizes, seed=SEED)
    architecture = Architecture(f"resnet{depth}", len(image_set.classes), image_set.images.shape[1])
    module = architecture.build(SEED).eval()
    with torch.no_grad():
        load_checkpoint(module, data / CHECKPOINTS[depth])
    return Subject.of(DenseNetwork(module, architecture, mean, std), image_set, splits)


def of_results(front: Path) -> Subject | None:
    """The subject of a method's results, `results/<dataset>/<network>/seed<seed>/<method>`; None without its inputs."""
    seed, dataset = front.parent, front.parents[2]
    dense, images = seed / "dense" / "model.safetensors", dataset / "data" / "images.safetensors"
    splits = dataset / "data" / f"splits-{seed.name}.npz"
    if not all(path.is_file() for path in (dense, images, splits)):
        return None
    return Subject.of(DenseNetwork.load(dense), ImageSet.load(images), Splits.load(splits))
