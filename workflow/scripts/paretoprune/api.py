"""The search as one function, for networks and images in memory."""

import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paretoprune.data.splits import split_images
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.metrics import predict
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.importance.allocation import STARTS, starting_allocations
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.importance.scores import compute_importance, flat_scores
from paretoprune.masks.units import MaskLayout
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.search.corridor import anchors_between, choose_anchors, corridors_of
from paretoprune.search.guidance import CandidateGuide
from paretoprune.search.search import search_corridor, search_thresholds
from paretoprune.settings import Compute, Judging

START_DENSITIES = (0.8, 0.5, 0.3, 0.2, 0.1)
N_CALIBRATION = 512
N_GRADIENT_IMAGES = 256
# Of the calibration images, those that a candidate's batch-norm statistics are corrected on.
N_REPAIR = 256
# Classical allocations at each of these densities: four, with or without the order of elimination.
N_STARTS = 4
PREFIX_CACHE_MB = 1000
# What differs where candidates are re-fitted.
REFITTED_PHASE1: dict[str, Any] = {"rungs": 24, "level_switches": 0.5, "n_reselected": 8}
NO_LADDER: dict[str, Any] = {"rungs": None, "level_switches": 0.0, "n_reselected": 0}
N_CORRIDORS = 4


def pareto_prune(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    search_images: Tensor | None = None,
    search_labels: Tensor | None = None,
    repair: str = "batchnorm",
    evaluations: int = 2000,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Front:
    """Find the Pareto set of pruned versions of a trained network, error against density.

    Phase 1 (NSGA-II on per-layer thresholds) gets half of the evaluations, Phase 2 (NSGA-II on the bits of the corridor
    between the light and the heavy anchor) the other half. The network is left as it is.

    Args:
        network: A trained classifier: images (n, c, h, w) to logits (n, n_classes).
        images: float (n, c, h, w), normalised as the network expects them; best those it was trained on.
        labels: int (n,), class indices.
        search_images: Images to judge candidates on, which the network was not trained on; without them a fifth of
            `images` (at most 2,000) is held out.
        search_labels: Their labels; given exactly when `search_images` is.
        repair: What is put right in each candidate before it is judged: `batchnorm` corrects batch-norm statistics,
            `reconstruct` re-fits the kept weights in closed form first (and the finished networks once more, layer by
            layer), `none` nothing.
        evaluations: Candidates to judge.
        seed: Fixes every draw; equal calls on one machine give equal fronts.
        device: Where to compute; by default a GPU where there is one.
        workers: Processes to judge candidates with on a CPU; by default one for each core. The front does not depend on
            it.
        progress: Whether to show a progress bar.

    Returns:
        The front: `sparsity` and `error` (top-1 on the search images, after repair) per member, `hypervolume()`,
        `closest(sparsity=0.8)`, and `network(i)`, a pruned and repaired copy on the CPU.

    Raises:
        ValueError: Images, labels, options or network cannot be used; the message says what was expected.
    """
    population = int(np.clip(evaluations // 20, 8, 40))
    refits = REPAIR_REFITS.get(repair, False)
    phase1 = REFITTED_PHASE1 if refits else NO_LADDER
    needed = 2 * (N_STARTS * len(START_DENSITIES) + population + phase1["n_reselected"])
    if evaluations < needed:
        raise ValueError(
            f"expected at least {needed} evaluations, half of them for Phase 1: the classical allocations, one "
            f"population{' and members chosen anew' if refits else ''}; found {evaluations}"
        )
    images, labels = _checked(images, labels, "images")
    if (search_images is None) != (search_labels is None):
        raise ValueError("search_images and search_labels belong together; give both or neither")
    if search_images is None or search_labels is None:
        nothing = np.zeros(len(labels), dtype=bool)
        n_search = max(min(2000, len(labels) // 5), len(labels.unique()))
        splits = split_images(labels.numpy(), nothing, calibration=0, search=n_search, test=0, seed=seed)
        search_images, search_labels = images[splits.search], labels[splits.search]
        images, labels = images[splits.train], labels[splits.train]
    else:
        search_images, search_labels = _checked(search_images, search_labels, "search_images")
        if len(search_labels.unique()) < 2:
            raise ValueError("expected search images of at least two classes, found one; give a mixed set")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = copy.deepcopy(network).to("cpu").float().eval()
    layout = MaskLayout.of(network)
    order = np.random.default_rng(seed).permutation(len(images))
    calibration = images[order[:N_CALIBRATION]]

    n_answers = _check_answers(network, images)
    for name, given in (("labels", labels), ("search_labels", search_labels)):
        if not 0 <= int(given.min()) <= int(given.max()) < n_answers:
            raise ValueError(
                f"expected {name} from 0 to {n_answers - 1}, as the network has {n_answers} answers, found "
                f"{int(given.min())} to {int(given.max())}"
            )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    statistics = collect_statistics(network, layout, calibration, seed=seed, device=device) if refits else None
    task = Task(network, layout, search_images, search_labels, calibration, statistics)
    judging = Judging(repair=repair, repair_images=N_REPAIR)
    compute = Compute(device=str(device), workers=workers, prefix_cache_mb=PREFIX_CACHE_MB)
    evaluate = PopulationEvaluator(task, judging, compute)
    finisher = Finisher(task, judging, compute, evaluate.refit)
    sample = order[:N_GRADIENT_IMAGES]
    scores = {
        score: flat_scores(
            compute_importance(score, network, layout, images[sample], labels[sample], seed, statistics), layout
        )
        for score in ("magnitude", "lamp", "elimination" if refits else "fisher")
    }
    chosen = [name for name, (_, score) in STARTS.items() if score in scores][-N_STARTS:]
    starts = starting_allocations(chosen, START_DENSITIES, scores, layout)
    guides = [scores["elimination"]] if refits else [scores["magnitude"], scores["fisher"]]
    with tqdm(total=evaluations, desc="pareto_prune", unit="network", disable=not progress) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.set_postfix(stage=row["stage"], hypervolume=f"{row['hypervolume']:.4f}")
            bar.update(row["evaluations"] - bar.n)

        found = search_thresholds(
            evaluate,
            layout,
            guides[0],
            starts,
            evaluations=evaluations // 2,
            population=population,
            seed=seed,
            **phase1,
            reselect=finisher.reselect,
            precompute=evaluate.precompute,
            progress=show,
        )
        chance = 1 - 1 / evaluate.n_classes
        light, heavy = choose_anchors(
            found.front, float(evaluate.dense.error[0]), chance, light_tolerance=0.01, heavy_tolerance=0.8
        )
        anchors = anchors_between(found.front, light, heavy, N_CORRIDORS if refits else 1)
        costs = evaluate.refit_costs() if refits else None
        found = search_corridor(
            evaluate,
            corridors_of(found.front.masks.select(anchors), len(anchors) - 1, layout),
            guides,
            found,
            algorithm="nsga2",
            # Fewer members than were to be chosen anew leave some of the first half over.
            evaluations=evaluations - found.history[-1]["evaluations"],
            population=population,
            softness=0.05,
            first_rate=0.02,
            crossover_probability=0.3,
            seed=seed,
            moving_guide=None if costs is None else lambda corridor: CandidateGuide(costs, layout, corridor.layers),
            progress=show,
        )
    front = found.front
    evaluate.close()
    if refits or evaluate.precision != "float32":
        if refits:
            front = front.thinned(population)
        masks, _, measured = finisher.finish(front.masks, reselect=True)
        front = Front(masks, np.column_stack([measured.error, front.density]), front.stages)
        front = Front.empty(layout.n_weights).merge(front)
    front.builder = finisher.build
    return front


def _check_answers(network: nn.Module, images: Tensor) -> int:
    """Number of classes that a network tells apart on such images, or an error that says why it cannot."""
    try:
        answers = predict(network, images[:2], 2)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the network cannot run on images of shape {tuple(images.shape[1:])}: {reason}; give images as it "
            "expects them"
        ) from error
    if answers.ndim != 2:
        raise ValueError(f"expected logits (n, n_classes) from the network, found shape {tuple(answers.shape)}")
    return answers.shape[1]


def _checked(images: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Images as float32 and labels as int64 on the CPU, or an error that says what is wrong with them."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"expected {name} as normalised floats (n, c, h, w), found {images.dtype} of shape {tuple(images.shape)}; "
            "convert and normalise them as for the network"
        )
    if not len(images):
        raise ValueError(f"expected at least one image in {name}, found none")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"expected one label for each of {len(images)} {name}, found shape {tuple(labels.shape)}")
    if labels.is_floating_point() or not bool(torch.isfinite(images).all()):
        raise ValueError(f"expected whole-number labels and finite {name}; clean the data")
    return images.detach().cpu().float(), labels.detach().cpu().long()
