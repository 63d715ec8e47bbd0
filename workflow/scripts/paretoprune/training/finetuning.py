"""Fine-tuning: which members of a front are trained further, and how."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def choose_members(front: Front, sparsities: Sequence[float], with_knee: bool) -> dict[int, str]:
    """Pick the members to fine-tune.

    Args:
        front: A final front.
        sparsities: For each, the member of nearest sparsity is taken.
        with_knee: Whether the knee is taken too.

    Returns:
        Member to the target it was picked for; a member picked for several targets has them joined.
    """
    wanted = [(front.closest(sparsity=s), f"sparsity {s:g}") for s in sparsities]
    wanted += [(front.knee(), "knee")] if with_knee else []
    chosen: dict[int, str] = {}
    for member, target in wanted:
        chosen[member] = f"{chosen[member]}, {target}" if member in chosen else target
    return chosen


def finetune_members(
    front: Front,
    states: Sequence[Mapping[str, Tensor]],
    layout: WeightUnits,
    dense: nn.Module,
    train_on: LabelledImages,
    search: LabelledImages,
    test: LabelledImages,
    recipe: Recipe,
    *,
    sparsities: Sequence[float],
    with_knee: bool,
    seed: int,
    device: torch.device,
    folder: Path,
    log: logging.Logger,
) -> list[dict[str, Any]]:
    """Train the chosen members further, verify their masks, save and measure them.

    Args:
        front: A final front.
        states: Of its finished networks, from which training starts.
        layout: Where the prunable weights lie in a mask.
        dense: The teacher.
        train_on: Training images.
        search: Search images; only measured on.
        test: Test images; only measured on.
        recipe: How to train.
        sparsities: Targets, see `choose_members`.
        with_knee: Likewise.
        seed: Fixes the training.
        device: Where to compute.
        folder: Gets one `member<id>.safetensors` for each member.
        log: Told of every member.

    Returns:
        One row a member with the keys `FINETUNED_COLUMNS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    dense_test_error = _error(dense, test, device)
    for member, target in choose_members(front, sparsities, with_knee).items():
        mask = front.masks.unpack(member)
        masks = {name: torch.from_numpy(part.copy()) for name, part in layout.split(mask).items()}
        start = with_weights(dense, states[member])
        before = _error(start, test, device)
        trained, _ = train(start, train_on, recipe, seed=seed, device=device, masks=masks, teacher=dense)
        check_mask(trained, masks)
        save_tensors(folder / f"member{member}.safetensors", trained.state_dict())
        row: dict[str, Any] = {
            "id": member,
            "target": target,
            "density": float(front.density[member]),
            "sparsity": float(front.sparsity[member]),
            "search_top1_error": _error(trained, search, device),
            "test_error_pruned": before,
            "test_error": _error(trained, test, device),
            "dense_test_error": dense_test_error,
        }
        rows.append(row)
        log.info(
            "%s: sparsity %.1f %%, test error %.2f %% before, %.2f %% after, dense %.2f %%",
            target,
            *(100 * row[key] for key in ("sparsity", "test_error_pruned", "test_error", "dense_test_error")),
        )
    return rows


def _error(network: nn.Module, judged: LabelledImages, device: torch.device) -> float:
    """Top-1 error of a finished network."""
    error = top1_error(predict(network.to(device), judged.images.to(device), BATCH_SIZE), judged.labels.to(device))
    network.to("cpu")
    return error
