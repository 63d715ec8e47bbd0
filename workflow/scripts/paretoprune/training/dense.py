"""The dense network: trained from scratch or taken from a checkpoint, and measured."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import SPLITS, LabelledImages, Splits, channel_statistics
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork, load_weights, read_state_dict
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
    """Train the dense network, or load it from a checkpoint.

    Args:
        images: File of the decoded images.
        splits: File of the splits.
        network: `architecture`, `arguments`, `checkpoint` (path or None), `normalisation` (with `mean` and `std`, or
            None for the training images' own) and `exclude`.
        training: Fields of `Recipe`, not used with a checkpoint.
        seed: Fixes the initial weights and the training.
        device: Where to train.
        log: Told of every epoch.
        resume: File that keeps the state of an interrupted training, see `train`.

    Returns:
        The network in evaluation mode on the CPU, with what is needed to build it again.

    Raises:
        FileNotFoundError: There is no checkpoint where one is named.
        ValueError: The network cannot be built, does not fit the images or the checkpoint, or has nothing to prune.
        TrainingDivergedError: The loss became NaN or infinite.
    """
    image_set, indices = ImageSet.load(images), Splits.load(splits)
    mean, std = _normalisation(network, image_set.images[torch.from_numpy(indices.train)], log)
    architecture = Architecture(
        network["architecture"], len(image_set.classes), image_set.images.shape[1], dict(network["arguments"])
    )
    module = architecture.build(seed).eval()
    units = WeightUnits.of(module, network["exclude"])
    log.info("%s: %d prunable weights in %d layers", architecture.name, units.n_weights, units.n_groups)
    data = LabelledImages.of(image_set, indices.train, mean, std)
    _check_outputs(module, architecture, data)
    if network["checkpoint"] is not None:
        load_weights(module, read_state_dict(network["checkpoint"]), f"checkpoint '{network['checkpoint']}'")
    else:
        recipe = Recipe(**training)

        def log_epoch(row: dict[str, Any]) -> None:
            if row["epoch"] % max(1, recipe.epochs // 10) == 0 or row["epoch"] == recipe.epochs:
                log.info(
                    "epoch %d of %d: loss %.4f, training error %.2f %%",
                    row["epoch"],
                    recipe.epochs,
                    row["loss"],
                    100 * row["train_error"],
                )

        module, _ = train(module, data.to(device), recipe, seed=seed, resume=Path(resume), progress=log_epoch)
    return DenseNetwork(module, architecture, mean, std, tuple(network["exclude"]))


def _normalisation(
    network: Mapping[str, Any], images: Tensor, log: logging.Logger
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: those of the configuration, or those of the training images."""
    normalisation = network["normalisation"]
    if normalisation is not None:
        return tuple(normalisation["mean"]), tuple(normalisation["std"])
    if network["checkpoint"] is not None:
        log.warning(
            "no `normalisation` is given for the checkpoint, so the training images' own is used; if it was "
            "trained with another, its accuracy below is lower than it should be"
        )
    return channel_statistics(images)


def _check_outputs(module: nn.Module, architecture: Architecture, data: LabelledImages) -> None:
    """Run the network on two images.

    Raises:
        ValueError: It cannot run on them, or does not return one logit for each class.
    """
    try:
        logits = predict(module, data.images[:2], 2)
    # Whatever a network of the user raises on images that it is not made for.
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        shape = tuple(data.images.shape[1:])
        raise ValueError(
            f"network '{architecture.name}' cannot run on images of shape {shape}: {str(error).splitlines()[0]}; give "
            "the dataset another `image_size` or `channels`, or choose another network"
        ) from error
    if logits.shape[1:] != (architecture.num_classes,):
        raise ValueError(
            f"network '{architecture.name}' gives answers of shape {tuple(logits.shape[1:])} for an image, expected "
            f"one for each of {architecture.num_classes} classes; correct its `arguments`"
        )


def measure_dense(dense: DenseNetwork, images: str, splits: str, device: torch.device) -> dict[str, Any]:
    """Measure the dense network on every split.

    Args:
        dense: The network.
        images: File of the decoded images.
        splits: File of the splits.
        device: Where to compute.

    Returns:
        `accuracy` (a share) and `n_images` per split, `n_prunable`, `n_parameters`, `n_classes`.
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
