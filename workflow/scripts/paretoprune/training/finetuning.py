"""Fine-tuning: which members of a front are trained further, and how."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import with_weights
from paretoprune.tensors import save_tensors
from paretoprune.training.loop import Recipe, check_mask, train

FINETUNED_COLUMNS = (
    "id",
    "target",
    "density",
    "sparsity",
    "search_top1_error",
    "test_error_pruned",
    "test_error",
    "dense_test_error",
)
BATCH_SIZE = 256


@dataclass(frozen=True)
class FinetuneData:
    """Images for fine-tuning, all on one device.

    Attributes:
        train: Trained on.
        search: Only measured on.
        test: Only measured on.
    """

    train: LabelledImages
    search: LabelledImages
    test: LabelledImages


def choose_members(front: Front, sparsities: Sequence[float], with_knee: bool) -> dict[int, str]:
    """Pick the members to fine-tune.

    Args:
        front: A final front.
        sparsities: Shares of weights removed, 0 to 1. For each, the member of nearest sparsity is taken.
        with_knee: Whether the knee is taken, too.

    Returns:
        Index of each picked member to its target. Several targets of one member are joined by commas.

    Raises:
        ValueError: A sparsity lies outside 0 to 1, or the front has no members.
    """
    wanted = [(front.closest(sparsity=s), f"sparsity {s:g}") for s in sparsities]
    wanted += [(front.knee(), "knee")] if with_knee else []
    chosen: dict[int, str] = {}
    for member, target in wanted:
        chosen[member] = f"{chosen[member]}, {target}" if member in chosen else target
    return chosen


def finetune_members(
    front: Front,
    units: WeightUnits,
    data: FinetuneData,
    recipe: Recipe,
    chosen: Mapping[int, str],
    *,
    seed: int,
    folder: Path,
    log: logging.Logger,
) -> list[dict[str, Any]]:
    """Train the chosen members further, verify their masks, save and measure them.

    Args:
        front: A final front with its dense network, the teacher, and the states of its finished networks, from which
            training starts.
        units: Its prunable weights, which the masks of a front of weights are about.
        data: Images. Networks are trained and measured on their device.
        recipe: How to train.
        chosen: Members and their targets, from `choose_members`.
        seed: Fixes the training.
        folder: Gets one `member<id>.safetensors` for each member.
        log: Told of every member.

    Returns:
        One row a member with the keys `FINETUNED_COLUMNS`.

    Raises:
        ValueError: The front has no networks.
        RuntimeError: A weight outside a mask is not 0 after training.
        TrainingDivergedError: The loss became NaN or infinite.
    """
    if front.dense is None or front.states is None:
        raise ValueError("expected a front with its networks, found masks alone; give it `dense` and `states`")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    dense_test_error = _error(front.dense, data.test)
    for member, target in chosen.items():
        masks = {}
        if front.units == "weights":
            mask = front.masks.unpack(member)
            masks = {name: torch.from_numpy(part.copy()) for name, part in units.split(mask).items()}
        start = with_weights(front.dense, front.states[member])
        error_before = _error(start, data.test)
        trained, _ = train(start, data.train, recipe, seed=seed, masks=masks, teacher=front.dense)
        check_mask(trained, masks)
        save_tensors(folder / f"member{member}.safetensors", trained.state_dict())
        row: dict[str, Any] = {
            "id": member,
            "target": target,
            "density": float(front.density[member]),
            "sparsity": float(front.sparsity[member]),
            "search_top1_error": _error(trained, data.search),
            "test_error_pruned": error_before,
            "test_error": _error(trained, data.test),
            "dense_test_error": dense_test_error,
        }
        rows.append(row)
        log.info(
            "%s: sparsity %.1f %%, test error %.2f %% before, %.2f %% after, dense %.2f %%",
            target,
            *(100 * row[key] for key in ("sparsity", "test_error_pruned", "test_error", "dense_test_error")),
        )
    return rows


def _error(network: nn.Module, data: LabelledImages) -> float:
    """Top-1 error of a network, 0 to 1."""
    logits = predict(network.to(data.images.device), data.images, BATCH_SIZE)
    error = top1_error(logits, data.labels)
    network.to("cpu")
    return error
