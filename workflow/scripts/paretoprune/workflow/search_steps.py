"""What every workflow step that searches does the same way: make an evaluator, read scores, show progress, publish."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.task import Task
from paretoprune.files import write_csv
from paretoprune.fronts import Front, non_dominated
from paretoprune.importance.layer_statistics import read_statistics
from paretoprune.importance.scores import flat_scores
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import MaskLayout
from paretoprune.networks.checkpoints import DenseNetwork, save_networks
from paretoprune.repair.refit import Refit
from paretoprune.search.search import HISTORY_COLUMNS, SearchResult
from paretoprune.settings import Compute, Judging
from paretoprune.tensors import load_tensors
from paretoprune.workflow.inputs import read_splits


def read_task(inputs: Mapping[str, Any], n_images: int | None = None) -> Task:
    """What is pruned, from a step's files `network`, `images`, `splits` and, where a repair asks, `statistics`.

    It is judged on the first `n_images` of the search split, or on all of them.
    """
    dense = DenseNetwork.load(inputs["network"])
    search, calibration = read_splits(inputs["images"], inputs["splits"], dense, "search", "calibration")
    judged = search.first(n_images)
    layout = MaskLayout.of(dense.network, dense.exclude)
    return Task(dense.network, layout, judged.images, judged.labels, calibration.images, read_statistics(inputs))


def make_evaluator(
    task: Task, settings: Mapping[str, Any], device: torch.device, **changed: Any
) -> PopulationEvaluator:
    """An evaluator by the settings of `workflow.configuration.judging_settings`; `changed` ones go first."""
    chosen = {**settings, "device": str(device), **changed}
    return PopulationEvaluator(task, Judging.of(chosen), Compute.of(chosen))


def make_search_evaluator(
    inputs: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device, **changed: Any
) -> PopulationEvaluator:
    """An evaluator of candidates, on `candidate_images` of the search split, from a step's input files.

    Settings are those of `workflow.configuration.searching_settings`; `changed` ones go first.
    """
    task = read_task(inputs, settings["candidate_images"])
    return make_evaluator(task, settings, device, **{**searching_repair(settings), **changed})


def searching_repair(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is put right in candidates, where it may differ from what is put right in finished networks."""
    return {"repair": settings["search_repair"] or settings["repair"]}


def make_finisher(
    task: Task, settings: Mapping[str, Any], device: torch.device, refit: Refit | None = None, **changed: Any
) -> Finisher:
    """What finishes networks, by the settings of an evaluator; `refit` of one may be given to share its solutions."""
    chosen = {**settings, "device": str(device), **changed}
    return Finisher(task, Judging.of(chosen), Compute.of(chosen), refit)


def allowed_masks(settings: Mapping[str, Any], layout: MaskLayout) -> Callable[[PackedMasks], np.ndarray] | None:
    """Which masks may be published by the setting `empty_layers`; None for all."""
    if settings["empty_layers"] == "allow":
        return None

    def no_layer_is_empty(masks: PackedMasks) -> np.ndarray:
        return np.asarray((layout.n_kept(masks) > 0).all(axis=1))

    return no_layer_is_empty


def read_scores(files: Sequence[str], layout: MaskLayout) -> dict[str, np.ndarray]:
    """Importance scores by the names of their files, each float32 (n_weights,) in mask order."""
    return {Path(file).stem: flat_scores(load_tensors(file), layout) for file in files}


def phase2_budget(settings: Mapping[str, Any], before: SearchResult) -> int:
    """Candidates that Phase 2 may judge: its own, and those that Phase 1 left, as a small front fills no reselection.

    Args:
        settings: Those of `workflow.configuration.phase2_settings`.
        before: Phase 1.
    """
    own: int = settings["algorithm"]["evaluations"]
    left: int = settings["phase1_evaluations"] - before.history[-1]["evaluations"]
    return own + left if own else 0


def log_progress(logger: logging.Logger, budget: int) -> Callable[[dict[str, Any]], None]:
    """A progress callback for searches that writes about ten lines until `budget` evaluations are done."""
    next_at = 0

    def show(row: dict[str, Any]) -> None:
        nonlocal next_at
        if row["evaluations"] >= min(next_at, budget):
            next_at = row["evaluations"] + max(1, budget // 10)
            logger.info(
                "%s: %d of %d evaluations, hypervolume %.4f, %.0f s",
                row["stage"],
                row["evaluations"],
                budget,
                row["hypervolume"],
                row["seconds"],
            )

    return show


def publish(
    found: SearchResult,
    evaluate: PopulationEvaluator,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Thin a front, finish its networks, and write the output files `masks`, `networks` and `history`.

    `front_size` members stay, among them the best ones beyond each of `sparsities`.

    What is published is judged once more, on all search images, in float32 and in as many processes, as it is finished:
    with the repair of the method, and re-fitted layer by layer where that is `reconstruct`, once with the weights that
    were found and once with each layer's chosen anew, of which the better stays. A search has seen so many candidates
    on its images that the best of them are partly luck; weights chosen anew have not seen them. Members that others
    then dominate are dropped.

    Raises:
        ValueError: The front is empty: every network that was tried has an empty layer, which is forbidden.
    """
    evaluate.close()
    if not len(found.front):
        raise ValueError(
            "expected at least one network to publish, found none: each that was tried has a layer that keeps nothing; "
            "set `empty_layers: allow`, or raise `evaluations` or, for an allocation, `ladder.highest`"
        )
    front = found.front.thinned(settings["front_size"], settings["sparsities"])
    finisher = make_finisher(read_task(inputs), settings, device, workers=evaluate.n_workers)
    masks, states, scores = finisher.finish(front.masks, reselect=True)
    objectives = np.column_stack([scores.objective(settings["objective"]), front.density])
    same = np.all(masks.words == front.masks.words, axis=1)
    stages = [stage if kept else "reselected" for stage, kept in zip(front.stages, same, strict=True)]
    judged = Front(masks, objectives, stages)
    kept = non_dominated(judged.objectives)
    judged.select(kept).save(outputs["masks"])
    save_networks(outputs["networks"], [states[i] for i in kept])
    write_csv(outputs["history"], found.history, HISTORY_COLUMNS)
