"""The search as one function, for networks and images in memory: the workflow's stages, one after the other."""

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paretoprune.data.splits import LabelledImages, split_images
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.importance.allocation import STARTS
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.importance.scores import compute_importance, flat_scores
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.repairs import repair_named
from paretoprune.search.problem import Effort
from paretoprune.settings import LOSSES, REFIT_GUIDE, Anchors, Budget, Phase1, Phase2, Publishing, Searching
from paretoprune.stages.anchors import find_anchors
from paretoprune.stages.candidates import Setup
from paretoprune.stages.phase1 import find_thresholds
from paretoprune.stages.phase2 import refine_bits
from paretoprune.stages.publish import publish

START_DENSITIES = (0.8, 0.5, 0.3, 0.2, 0.1)
N_CALIBRATION = 512
N_GRADIENT_IMAGES = 256
PREFIX_CACHE_MB = 1000
BATCH_SIZE = 64
# Where candidates are re-fitted, the order of elimination leads; a ladder of densities lets them share re-fits.
REFITTED = (
    Phase1(
        rungs=24,
        level_switches=0.5,
        n_reselected=8,
        starts=("global_magnitude", "lamp", "erdos_renyi_kernel", "elimination"),
        start_densities=START_DENSITIES,
    ),
    Anchors(corridors=4),
    Phase2(guides=("elimination", REFIT_GUIDE)),
)
MASKED = (Phase1(start_densities=START_DENSITIES), Anchors(), Phase2(guides=("magnitude", "fisher")))


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
    objectives: Sequence[str] = ("error", "density"),
) -> Front:
    """Find the Pareto set of pruned versions of a trained network, error against density.

    Phase 1 (NSGA-II on per-layer thresholds) gets half of the evaluations, Phase 2 (NSGA-II on the bits of the corridor
    between the light and the heavy anchor) the other half. The network is left as it is.

    Args:
        network: A trained classifier: images (n, c, h, w) to logits (n, n_classes).
        images: float (n, c, h, w), normalised as the network expects them; best those it was trained on.
        labels: int (n,), class indices.
        search_images: Images to evaluate candidates on, which the network was not trained on; without them a fifth of
            `images` (at most 2,000) is held out.
        search_labels: Their labels; given exactly when `search_images` is.
        repair: What is put right in each candidate before it is evaluated: `batchnorm` corrects batch-norm statistics,
            `reconstruct` re-fits the kept weights in closed form first (and the finished networks once more, layer by
            layer), `none` nothing.
        evaluations: Candidates to evaluate.
        seed: Fixes every draw; equal calls on one machine give equal fronts.
        device: Where to compute; by default a GPU where there is one.
        workers: Processes to evaluate candidates with on a CPU; by default one for each core. The front does not
            depend on it.
        progress: Whether to show a progress bar.
        objectives: What is minimised: a loss (`error`, or `divergence` from the dense network's answers) and one or two
            costs (`density`, `parameters`, `macs`, `bytes`), each relative to the dense network.

    Returns:
        The front, at most 60 members: `sparsity`, `error` (the loss on the search images, after repair) and `costs` per
        member, `hypervolume()`, `closest(sparsity=0.8)`, and `network(i)`, a copy of the very network that was
        measured, on the CPU.

    Raises:
        ValueError: Images, labels, options or network cannot be used; the message says what was expected.
    """
    refits = repair_named(repair).refits
    phase1, anchors, phase2 = REFITTED if refits else MASKED
    budget, population = Budget(evaluations, phase1.share), int(np.clip(evaluations // 20, 8, 40))
    needed = 2 * phase1.least_evaluations(population)
    if evaluations < needed:
        raise ValueError(
            f"expected at least {needed} evaluations, half of them for Phase 1: the classical allocations, one "
            f"population{' and members chosen anew' if refits else ''}; found {evaluations}"
        )
    loss, *costs = objectives
    if loss not in LOSSES:
        raise ValueError(f"expected a loss among {', '.join(LOSSES)} as first objective, found '{loss}'")
    train, search = _divide(images, labels, search_images, search_labels, seed)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = copy.deepcopy(network).to("cpu").float().eval()
    units = WeightUnits.of(network)
    order = np.random.default_rng(seed).permutation(len(train))
    calibration = train.images[order[:N_CALIBRATION]]
    n_classes = _check_answers(network, train, search)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    statistics = collect_statistics(network, units, calibration, seed=seed, device=device) if refits else None
    task = Task(network, units, search.images, search.labels, calibration, statistics)
    searching = Searching(repair=repair, objective=loss, costs=tuple(costs))
    compute = searching.compute(str(device), workers, PREFIX_CACHE_MB)
    sample = train.images[order[:N_GRADIENT_IMAGES]], train.labels[order[:N_GRADIENT_IMAGES]]
    followed = [STARTS[name][1] for name in phase1.starts]
    names = dict.fromkeys(name for name in (phase2.guides[0], *followed, *phase2.guides) if name != REFIT_GUIDE)
    scores = {
        name: flat_scores(compute_importance(name, network, units, *sample, seed, statistics), units) for name in names
    }
    with tqdm(total=evaluations, desc="pareto_prune", unit="network", disable=not progress) as bar:

        def show(row: dict[str, object]) -> None:
            bar.set_postfix(stage=row["stage"], hypervolume=f"{row['hypervolume']:.4f}")
            bar.update(int(str(row["evaluations"])) - bar.n)

        setup = Setup(task, searching, compute, show)
        found = find_thresholds(setup, scores, phase1, Effort(budget.phase1, population, seed))
        dense_loss = top1_error(predict(network, search.images, BATCH_SIZE), search.labels) if loss == "error" else 0.0
        chosen = find_anchors(found.front, dense_loss, n_classes, anchors)
        effort = Effort(budget.phase2(found.history[-1]["evaluations"]), population, seed)
        guides = {name: scores[name] for name in phase2.scores}
        found = refine_bits(setup, guides, found.front.masks.select(chosen), found, phase2, effort)
    return publish(found.front, setup, Publishing())


def _divide(
    images: Tensor, labels: Tensor, search_images: Tensor | None, search_labels: Tensor | None, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Training and search images: those given, or a fifth of the images held out for the search."""
    images, labels = _checked(images, labels, "images")
    if (search_images is None) != (search_labels is None):
        raise ValueError("search_images and search_labels belong together; give both or neither")
    if search_images is None or search_labels is None:
        nothing = np.zeros(len(labels), dtype=bool)
        n_search = max(min(2000, len(labels) // 5), len(labels.unique()))
        splits = split_images(labels.numpy(), nothing, calibration=0, search=n_search, test=0, seed=seed)
        search = LabelledImages(images[splits.search], labels[splits.search])
        return LabelledImages(images[splits.train], labels[splits.train]), search
    search_images, search_labels = _checked(search_images, search_labels, "search_images")
    if len(search_labels.unique()) < 2:
        raise ValueError("expected search images of at least two classes, found one; give a mixed set")
    return LabelledImages(images, labels), LabelledImages(search_images, search_labels)


def _check_answers(network: nn.Module, train: LabelledImages, search: LabelledImages) -> int:
    """Number of classes that a network tells apart, or an error that says why it cannot, or not those of the labels."""
    try:
        answers = predict(network, train.images[:2], 2)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the network cannot run on images of shape {tuple(train.images.shape[1:])}: {reason}; give images as it "
            "expects them"
        ) from error
    if answers.ndim != 2:
        raise ValueError(f"expected logits (n, n_classes) from the network, found shape {tuple(answers.shape)}")
    n_answers = answers.shape[1]
    for name, given in (("labels", train.labels), ("search_labels", search.labels)):
        if not 0 <= int(given.min()) <= int(given.max()) < n_answers:
            raise ValueError(
                f"expected {name} from 0 to {n_answers - 1}, as the network has {n_answers} answers, found "
                f"{int(given.min())} to {int(given.max())}"
            )
    return n_answers


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
