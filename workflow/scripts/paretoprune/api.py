"""The search as one function, for networks and images in memory: the workflow's stages, one after the other.

And the distillation of what it found as another.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from paretoprune.data.gathering import N_HELD_OUT, gather_images, gather_splits
from paretoprune.data.splits import LabelledImages
from paretoprune.deployment.latency import LatencyTable
from paretoprune.deployment.runtimes import Runtime
from paretoprune.devices import one_at_a_time, plain_modes
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.importance.allocation import STARTS
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.importance.scores import compute_importance, flat_scores
from paretoprune.networks.guessing import compare_with_guessing, images_to_compare
from paretoprune.networks.inspection import Inspection, inspect_network
from paretoprune.networks.wrapping import adapt, without_adaptation
from paretoprune.options import (
    LARGEST_SEED,
    LatencySource,
    defaults_of,
    latency_source,
    objective_names,
    patterns,
    repair_name,
    truth,
    usable_device,
    whole_number,
)
from paretoprune.repair.repairs import repair_named
from paretoprune.search.problem import Effort, Progress
from paretoprune.settings import (
    N_CHANNEL_STARTS,
    REFIT_GUIDE,
    Anchors,
    Budget,
    Phase1,
    Phase2,
    Publishing,
    Searching,
)
from paretoprune.stages.anchors import find_anchors
from paretoprune.stages.candidates import Setup
from paretoprune.stages.phase1 import find_thresholds
from paretoprune.stages.phase2 import refine_bits
from paretoprune.stages.publish import publish
from paretoprune.stages.slim import SlimSearch, find_slim_networks
from paretoprune.structured.judging import SlimTask
from paretoprune.structured.latency import LatencyCost
from paretoprune.structured.timing import measured_table, time_members
from paretoprune.structured.units import ChannelUnits, slim_costs
from paretoprune.training import distilling

START_DENSITIES = (0.8, 0.5, 0.3, 0.2, 0.1)
N_CALIBRATION = 512
N_SLIM_CALIBRATION = 1024
N_GRADIENT_IMAGES = 256
PREFIX_CACHE_MB = 1000
BATCH_SIZE = 64
MAX_IMAGES = 10_000
# More processes than this only take memory.
WORKERS_PER_CORE = 4
DISTILLING_SECONDS = 180.0
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
_LOGGER = logging.getLogger("paretoprune")


@one_at_a_time()
@plain_modes()
def pareto_prune(
    network: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    search_images: Any = None,
    search_labels: Any = None,
    units: str = "weights",
    repair: str | None = None,
    evaluations: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: bool = True,
    objectives: Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    max_images: int = MAX_IMAGES,
    runtime: Runtime | None = None,
    latency_table: LatencyTable | str | os.PathLike[str] | None = None,
) -> Front:
    """Find the Pareto set of pruned versions of a trained network, error against density.

    Phase 1 (NSGA-II on per-layer thresholds) gets half of the evaluations, Phase 2 (NSGA-II on the bits of the corridor
    between the light and the heavy anchor) the other half. The network is left as it is. So are the modes that torch is
    in (gradients, inference mode, autocast, default type and device), and the global random states. Calls from several
    threads take turns.

    Args:
        network: A trained classifier: images (n, ...) to logits (n, n_classes).
        images: float images (n, c, h, w), signals (n, c, t) or tables (n, features), normalised as the network expects
            them; best those it was trained on. A tensor, an array or a list of them; or a DataLoader or Dataset that
            yields images and labels, as a pair (further parts are ignored) or under their usual names.
        labels: int (n,) or (n, 1), class indices, or one-hot (n, n_classes); none where `images` yields them.
        search_images: Images to evaluate candidates on, which the network was not trained on, in any of these forms;
            without them a fifth of `images` (at most 2,000) is held out.
        search_labels: Their labels; given exactly when `search_images` is, and yields none.
        units: What is removed in one piece: `weights` leaves networks of the same shape with zeros in them; `channels`
            (with attention heads, and branches beside shortcuts) physically smaller and faster ones.
        repair: What is put right in each candidate before it is evaluated: `batchnorm` corrects batch-norm statistics,
            `reconstruct` re-fits the kept weights in closed form first (and the finished networks once more, layer by
            layer), `none` nothing. By default `batchnorm` for weights, and `reconstruct` for channels.
        evaluations: Candidates to evaluate, a whole number; by default 2,000 for weights, and 300 for channels.
        seed: Fixes every draw; equal calls on one machine give equal fronts.
        device: Where to compute; by default a GPU where there is one.
        workers: Processes to evaluate candidates with on a CPU; by default one for each core. The front does not
            depend on it.
        progress: Whether to show a progress bar.
        objectives: What is minimised: a loss (`error`, or `divergence` from the dense network's answers) and one or two
            costs (`density`, `parameters`, `macs`, `bytes`; for channels also `memory`, the largest activations, and
            `latency`, as predicted), each relative to the dense network. By default error and density for weights,
            divergence and macs for channels.
        exclude: Shell patterns of weights that stay dense, such as `head.*`; for channels, of layers that stay whole.
        max_images: Taken from a DataLoader or Dataset, at most; what is left out is said.
        runtime: What networks are run by where latency is an objective; by default `latency_table`'s, or onnxruntime
            with one image at a time and one thread.
        latency_table: Times of the network's layers on this machine, from `structured.timing.measured_table`, or the
            path of its file. Without it they are measured, and written to the path if there is no such file.

    Returns:
        The front, at most 60 members: `sparsity`, `error` (the loss on the search images, after repair) and `costs` per
        member, `hypervolume()`, `closest(sparsity=0.8)`, and `network(i)`, a copy of the very network that was
        measured, on the CPU. `save(path)` and `Front.load(path, network)` keep it with its networks. With latency as
        an objective, `measured_latency` says how long each member really takes, relative to the dense network.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: Images, labels, options or network cannot be used; the message says what was expected.
    """
    defaults = defaults_of(units)
    objectives = defaults.objectives if objectives is None else objectives
    (loss, costs), exclude = objective_names(objectives, defaults.costs), patterns("exclude", exclude)
    evaluations = whole_number("evaluations", defaults.evaluations if evaluations is None else evaluations)
    seed, repair = whole_number("seed", seed, 0, LARGEST_SEED), repair_name(repair or defaults.repair)
    max_images, workers = whole_number("max_images", max_images, 1), _processes(workers)
    progress, device = truth("progress", progress), usable_device(device)
    source = latency_source(objectives, runtime, latency_table)
    refits = repair_named(repair).refits
    phase1, anchors, phase2 = REFITTED if refits else MASKED
    budget, population = Budget(evaluations, phase1.share), int(np.clip(evaluations // 20, 8, 40))
    needed = 2 * (N_CHANNEL_STARTS + population if units == "channels" else phase1.least_evaluations(population))
    if evaluations < needed:
        raise ValueError(
            f"expected at least {needed} evaluations, half of them for Phase 1: the classical allocations, one "
            f"population{' and members chosen anew' if refits else ''}; found {evaluations}"
        )
    train, search = gather_splits(images, labels, search_images, search_labels, max_images=max_images, seed=seed)
    inspected = _look_at(network, train, search, () if units == "channels" else exclude)
    if units == "channels":
        effort = Effort(evaluations, population, seed)
        settings = SlimSearch(repair, loss, n_processes=1 if device.type == "cuda" else workers)
        return _slim(inspected, train, search, costs, exclude, settings, effort, device, progress, source)
    network, layout, n_classes = inspected.network, inspected.units, inspected.n_classes
    order = np.random.default_rng(seed).permutation(len(train))
    calibration = train.images[order[:N_CALIBRATION]]
    statistics = collect_statistics(network, layout, calibration, seed=seed, device=device) if refits else None
    task = Task(network, layout, search.images, search.labels, calibration, statistics)
    searching = Searching(repair=repair, objective=loss, costs=tuple(costs))
    compute = searching.compute(str(device), workers, PREFIX_CACHE_MB)
    sample = train.images[order[:N_GRADIENT_IMAGES]], train.labels[order[:N_GRADIENT_IMAGES]]
    followed = [STARTS[name][1] for name in phase1.starts]
    names = dict.fromkeys(name for name in (phase2.guides[0], *followed, *phase2.guides) if name != REFIT_GUIDE)
    scores = {
        name: flat_scores(compute_importance(name, network, layout, *sample, seed, statistics), layout)
        for name in names
    }
    with _shown(evaluations, progress) as show:
        setup = Setup(task, searching, compute, show)
        found = find_thresholds(setup, scores, phase1, Effort(budget.phase1, population, seed))
        dense_loss = top1_error(predict(network, search.images, BATCH_SIZE), search.labels) if loss == "error" else 0.0
        chosen = find_anchors(found.front, dense_loss, n_classes, anchors)
        effort = Effort(budget.phase2(found.history[-1]["evaluations"]), population, seed)
        guides = {name: scores[name] for name in phase2.scores}
        found = refine_bits(setup, guides, found.front.masks.select(chosen), found, phase2, effort)
    front = publish(found.front, setup, Publishing())
    return replace(front, dense=inspected.bare())


@plain_modes()
def distil(
    front: Front,
    index: int,
    images: Any,
    *,
    search_images: Any = None,
    budget_seconds: float | None = None,
    n_steps: int | None = None,
    rates: Sequence[float] = distilling.RATES,
    crop: int = 0,
    flip: bool = False,
    mix: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    max_images: int = MAX_IMAGES,
) -> nn.Module:
    """Train a member of a front further, to answer as the dense network does, without labels.

    What is measured on `search_images` chooses the learning rate by short trials, and decides between the network as it
    was and as it was trained. A network pruned by a mask keeps its zeros. Front, networks, torch's modes and the global
    random states are left as they are.

    Args:
        front: What `pareto_prune` returned, or a front that was loaded with its networks.
        index: Member of the front.
        images: Images to train on, in any form that `pareto_prune` takes; labels are neither needed nor looked at.
        search_images: Images to measure on, such as those of the search, but no test images; without them a fifth of
            `images` (at most 2,000) is held out.
        budget_seconds: How long everything may take, about; by default three minutes.
        n_steps: Instead of it, steps in all: equal calls on one machine then give equal networks. A budget is turned
            into steps, and how many is said in the log.
        rates: Learning rates to try.
        crop: Pixels that images are shifted by at random, at most; 0 for none.
        flip: Whether images are mirrored left to right half of the time.
        mix: Whether images are mixed in pairs, to train and to measure on: on mixtures of images that it was trained
            on, the dense network answers less surely, and says more.
        seed: Fixes every draw.
        device: Where to compute; by default a GPU where there is one.
        progress: Whether to show a progress bar.
        max_images: Taken from a DataLoader or Dataset, at most.

    Returns:
        The better of before and after by the divergence on the search images, on the CPU and in evaluation mode: a
        plain network of the shapes of `front.network(index)`, and this network bit for bit where training did not help.

    Raises:
        RuntimeError: The front has no networks.
        ValueError: Images or options cannot be used; the message says what was expected.
    """
    seed, max_images = whole_number("seed", seed, 0, LARGEST_SEED), whole_number("max_images", max_images, 1)
    index, crop = whole_number("index", index, -len(front), len(front) - 1), whole_number("crop", crop, 0)
    flip, mix, progress = truth("flip", flip), truth("mix", mix), truth("progress", progress)
    device = usable_device(device)
    n_steps = None if n_steps is None else whole_number("n_steps", n_steps, 1)
    if n_steps is None and budget_seconds is None:
        budget_seconds = DISTILLING_SECONDS
    member = front.network(index)
    train = gather_images(images, "images", max_images=max_images, seed=seed)
    if search_images is None:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train)))
        n_search = min(N_HELD_OUT, len(train) // 5)
        train, search = train[order[n_search:]], train[order[:n_search]]
    else:
        search = gather_images(search_images, "search_images", max_images=max_images, seed=seed)
    assert front.dense is not None  # by Front.network
    inspected = inspect_network(front.dense, train)
    with tqdm(desc="distil", unit="step", disable=not progress) as bar:

        def show(done: int, n_steps: int) -> None:
            bar.total = n_steps
            bar.update(done - bar.n)

        found = distilling.distil(
            adapt(member, inspected.adaptation),
            inspected.network,
            train,
            search_images=search,
            seed=seed,
            n_steps=n_steps,
            budget_seconds=budget_seconds,
            rates=rates,
            crop=crop,
            flip=flip,
            mix=mix,
            device=device,
            progress=show,
        )
        kept = "trained" if found.is_trained else "unchanged"
        bar.set_postfix_str(f"divergence {found.before:.4f} before, {found.after:.4f} after, kept {kept}")
    return without_adaptation(found.network)


@contextmanager
def _shown(evaluations: int, progress: bool) -> Iterator[Progress]:
    """A bar that follows the rows of a search's history."""
    hidden = not progress or sys.stderr is None  # as in a service
    with tqdm(total=evaluations, desc="pareto_prune", unit="network", disable=hidden) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.set_postfix(stage=row["stage"], hypervolume=f"{row['hypervolume']:.4f}")
            bar.update(int(row["evaluations"]) - bar.n)

        yield show


def _slim(
    inspected: Inspection,
    train: LabelledImages,
    search: LabelledImages,
    cost_names: Sequence[str],
    exclude: Sequence[str],
    settings: SlimSearch,
    effort: Effort,
    device: torch.device,
    progress: bool,
    source: LatencySource | None,
) -> Front:
    """The front of smaller networks."""
    network, image = inspected.network, train.images[:1]
    units = ChannelUnits.of(network, image, exclude)
    units.report(_LOGGER)
    order = np.random.default_rng(effort.seed).permutation(len(train))
    calibration = train.images[order[:N_SLIM_CALIBRATION]]
    measured = []
    if source is not None:
        table = source.table
        if table is None:
            table = measured_table(inspected.bare(), units, image, source.runtime, seed=effort.seed)
            if source.path is not None:
                table.save(source.path)
        measured.append(LatencyCost.of_network(inspected.bare(), units, image, table))
    costs = slim_costs(cost_names, units, network, image, measured)
    task = SlimTask(network, units, search.images, search.labels, calibration)
    with _shown(effort.evaluations, progress) as show:
        front = find_slim_networks(task.to(device), costs, settings, effort, progress=show).front
    front = replace(front, dense=inspected.bare())
    return front if source is None else time_members(front, image, source.runtime)


def _relabelling(labels: torch.Tensor, n_classes: int) -> str:
    """What to do about labels that are no indices of a network's answers."""
    low, high = int(labels.min()), int(labels.max())
    if low == 1 and high == n_classes:
        return "they start at 1: subtract 1"
    if low < 0:
        return "leave out the images without a label, which negative ones often stand for"
    return "give the index of each image's class among the network's answers"


def _processes(workers: Any) -> int:
    """Processes to evaluate candidates with: those asked for, or one for each core; one where none can be started."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    n_workers = n_cores if workers is None else whole_number("workers", workers, 1)
    if n_workers > WORKERS_PER_CORE * n_cores:
        n_most = WORKERS_PER_CORE * n_cores
        _LOGGER.warning("of %d workers %d are started: there are %d cores", n_workers, n_most, n_cores)
        n_workers = n_most
    if n_workers > 1 and multiprocessing.current_process().daemon:
        _LOGGER.warning("this is a daemon process, which may start no others: candidates are evaluated in it alone")
        return 1
    return n_workers


def _look_at(network: nn.Module, train: LabelledImages, search: LabelledImages, exclude: Sequence[str]) -> Inspection:
    """The network as it stands, or an error that says why it cannot be pruned or does not fit the labels."""
    found = inspect_network(network, train.images, exclude)
    for name, given in (("labels", train.labels), ("search_labels", search.labels)):
        if not 0 <= int(given.min()) <= int(given.max()) < found.n_classes:
            raise ValueError(
                f"expected {name} from 0 to {found.n_classes - 1}, as the network has {found.n_classes} answers, found "
                f"{int(given.min())} to {int(given.max())}; {_relabelling(given, found.n_classes)}"
            )
    known = images_to_compare(search, train)
    compared = compare_with_guessing(predict(found.network, known.images, BATCH_SIZE), known.labels)
    compared.check()
    found.report(_LOGGER, "pareto_prune")
    compared.report(_LOGGER, "pareto_prune")
    return found
