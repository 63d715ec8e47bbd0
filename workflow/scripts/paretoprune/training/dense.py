"""The dense network: trained from scratch or taken from a checkpoint, and measured."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretoprune.data.datasets import ImageSet
from paretoprune.data.normalisations import normalisation_of
from paretoprune.data.splits import SPLITS, LabelledImages, Splits, channel_statistics
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.guessing import compare_with_guessing, images_to_compare
from paretoprune.networks.inspection import check_answers, inspect_network
from paretoprune.networks.pretrained import load_checkpoint
from paretoprune.training.loop import Recipe, train

BATCH_SIZE = 256


def prepare_dense(
    images: str,
    splits: str,
    network: Mapping[str, Any],
    training: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    log: logging.Logger,
    resume: str,
) -> DenseNetwork:
    """Train a network, or load one.

    Args:
        images: File of the decoded images.
        splits: File of the splits.
        network: `architecture`, `arguments`, `checkpoint` (path or None), perhaps
            `checkpoint_key` (dotted path to the weights in it), `normalisation` (a name, `mean` and
            `std`, or None for the training images' own) and `exclude`.
        training: Fields of `Recipe`; not used with a checkpoint.
        seed: Fixes the initial weights and the training.
        device: Where to train.
        log: Told of every epoch.
        resume: File that an interrupted training continues from.

    Raises:
        ValueError: The network cannot be built, does not fit the images or the checkpoint, has nothing to prune, or is
            no better than guessing.
        TrainingDivergedError: The loss became NaN or infinite.
    """
    image_set, indices = ImageSet.load(images), Splits.load(splits)
    normalisation = network["normalisation"]
    if normalisation is None:
        if network["checkpoint"] is not None:
            log.warning(
                "no `normalisation` is given for the checkpoint, so the training images' own is used; if it was "
                "trained with another, its accuracy below is lower than it should be"
            )
        mean, std = channel_statistics(image_set.images[torch.from_numpy(indices.train)])
    else:
        mean, std = normalisation_of(normalisation)
        _check_range(image_set.images, normalisation)
    architecture = Architecture(
        network["architecture"], len(image_set.classes), image_set.images.shape[1], dict(network["arguments"])
    )
    data = LabelledImages.of(image_set, indices.train, mean, std)
    # Before it is trained, which may take hours.
    name = f"network '{architecture.name}'"
    remedy = (
        "give the dataset another `image_size` or `channels`, or choose another network"
        if data.images.ndim == 4
        else "choose a network for such inputs, a factory of your own as package.module:function"
    )
    found = inspect_network(
        architecture.build(seed), data.images, network["exclude"], name=name, remedy=remedy, trained=False
    )
    module = found.network
    found.report(log, architecture.name)
    if found.n_classes != len(image_set.classes):
        raise ValueError(
            f"{name} gives answers of shape ({found.n_classes},) for an image, expected one for each of "
            f"{len(image_set.classes)} classes; correct its `arguments`"
        )
    if network["checkpoint"] is not None:
        log.info("%s", load_checkpoint(module, network["checkpoint"], network.get("checkpoint_key")))
    else:
        recipe = Recipe(**training)

        def show(row: dict[str, Any]) -> None:
            if row["epoch"] % max(1, recipe.epochs // 10) == 0 or row["epoch"] == recipe.epochs:
                log.info(
                    "epoch %d of %d: loss %.4f, training error %.2f %%",
                    row["epoch"],
                    recipe.epochs,
                    row["loss"],
                    100 * row["train_error"],
                )

        module, _ = train(module, data.to(device), recipe, seed=seed, resume=Path(resume), progress=show)
    check_answers(module, data.images, name=name)
    known = images_to_compare(LabelledImages.of(image_set, indices.search, mean, std), data)
    compared = compare_with_guessing(predict(module, known.images, BATCH_SIZE), known.labels)
    compared.check()
    compared.report(log, architecture.name)
    return DenseNetwork(module, architecture, mean, std, found.exclude, found.adaptation)


def _check_range(images: Tensor, normalisation: object) -> None:
    """Refuse a normalisation by name, which is for images in [0, 1], for values beyond."""
    if not isinstance(normalisation, str) or images.dtype == torch.uint8:
        return
    low, high = float(images.min()), float(images.max())
    if images.ndim != 4 or low < 0 or high > 1:
        raise ValueError(
            f"normalisation '{normalisation}' is for images in [0, 1], found values from {low:g} to {high:g} of shape "
            f"{tuple(images.shape[1:])}; give the dataset a `value_range`, or the network the `mean` and `std` that it "
            "was trained with, or null for the training images' own"
        )


def measure_dense(dense: DenseNetwork, images: str, splits: str, device: torch.device) -> dict[str, Any]:
    """Accuracy on every split, and sizes.

    Returns:
        `accuracy` and `n_images` per split, `n_prunable`, `n_parameters`, `n_classes`.
    """
    image_set, indices = ImageSet.load(images), Splits.load(splits)
    network = dense.network.to(device)
    accuracy, n_images = {}, {}
    for name in SPLITS:
        part = LabelledImages.of(image_set, getattr(indices, name), dense.mean, dense.std)
        logits = predict(network, part.images.to(device), BATCH_SIZE)
        accuracy[name], n_images[name] = 1.0 - top1_error(logits, part.labels.to(device)), len(part)
    network.to("cpu")
    return {
        "accuracy": accuracy,
        "n_images": n_images,
        "n_prunable": WeightUnits.of(network, dense.exclude).n_weights,
        "n_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "n_classes": len(image_set.classes),
    }
