"""The search as one function, for networks and images in memory."""

import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paretoprune.allocation import STARTS, starting_allocations
from paretoprune.corridor import Corridor, choose_anchors
from paretoprune.evaluation import PopulationEvaluator, predict
from paretoprune.fronts import Front
from paretoprune.importance import compute_importance, flat_scores
from paretoprune.masks import MaskLayout
from paretoprune.search import judge_again, search_corridor, search_thresholds
from paretoprune.splits import split_images

START_DENSITIES = (0.8, 0.5, 0.3, 0.2, 0.1)
N_CALIBRATION = 512
N_GRADIENT_IMAGES = 256
PREFIX_CACHE_MB = 1000


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
        repair: `batchnorm` corrects batch-norm statistics of each candidate before it is judged, `none` does not.
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
    needed = 2 * (len(STARTS) * len(START_DENSITIES) + population)
    if evaluations < needed:
        raise ValueError(
            f"expected at least {needed} evaluations, half of them for the classical allocations and one population of "
            f"Phase 1, found {evaluations}"
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
    judging: dict[str, Any] = {
        "repair": repair,
        "calibration_images": calibration,
        "device": device,
        "workers": workers,
    }
    evaluate = PopulationEvaluator(
        network, layout, search_images, search_labels, **judging, prefix_cache_mb=PREFIX_CACHE_MB
    )
    sample = order[:N_GRADIENT_IMAGES]
    scores = {
        score: flat_scores(compute_importance(score, network, layout, images[sample], labels[sample], seed), layout)
        for score in ("magnitude", "lamp", "fisher")
    }
    starts = starting_allocations(list(STARTS), START_DENSITIES, scores, layout)
    first_half = evaluations // 2
    with tqdm(total=evaluations, desc="pareto_prune", unit="network", disable=not progress) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.set_postfix(stage=row["stage"], hypervolume=f"{row['hypervolume']:.4f}")
            bar.update(row["evaluations"] - bar.n)

        found = search_thresholds(
            evaluate,
            layout,
            scores["magnitude"],
            starts,
            evaluations=first_half,
            population=population,
            seed=seed,
            progress=show,
        )
        chance = 1 - 1 / evaluate.n_classes
        light, heavy = choose_anchors(
            found.front, float(evaluate.dense.error[0]), chance, light_tolerance=0.01, heavy_tolerance=0.8
        )
        corridor = Corridor.between(found.front.masks.unpack(light), found.front.masks.unpack(heavy), layout)
        found = search_corridor(
            evaluate,
            corridor,
            [scores["magnitude"], scores["fisher"]],
            found,
            algorithm="nsga2",
            evaluations=evaluations - first_half,
            population=population,
            softness=0.05,
            first_rate=0.02,
            crossover_probability=0.3,
            seed=seed,
            progress=show,
        )
    front = found.front
    evaluate.close()
    if evaluate.precision != "float32":
        evaluate = PopulationEvaluator(network, layout, search_images, search_labels, **judging, precision="float32")
        front = judge_again(front, evaluate)
        evaluate.close()
    front.builder = evaluate.build
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
