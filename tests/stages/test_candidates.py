"""Candidates of a search are repaired and evaluated as the settings say."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import LabelledImages
from paretoprune.devices import default_batch_size
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.task import Task
from paretoprune.evaluation.workers import can_fork
from paretoprune.masks.packed import PackedMasks, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.settings import Compute, Evaluating, Searching
from paretoprune.stages.candidates import Setup, zero_weights

NETWORK = Architecture("resnet8", 3, 1, {"base_width": 2}).build(0).eval()
UNITS = WeightUnits.of(NETWORK, ["conv1.weight"])
SETTINGS: dict[str, Any] = {
    "repair": "none",
    "repair_images": 3,
    "damping": 0.02,
    "sequential_refit": False,
    "objective": "divergence",
    "precision": "float32",
    "batch_size": 4,
}


def images() -> ImageSet:
    pixels = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(30) % 3, torch.zeros(30, dtype=torch.bool), ("a", "b", "c"))


def evaluated(n: int = 20) -> LabelledImages:
    return LabelledImages.of(images(), np.arange(n), (0.5,), (0.25,))


def task(n_calibration: int = 20) -> Task:
    return Task(NETWORK, UNITS, evaluated().images, evaluated().labels, evaluated(n_calibration).images)


def make_evaluator(n_calibration: int = 20, workers: int = 1, **changed: Any) -> PopulationEvaluator:
    settings = SETTINGS | changed | {"workers": workers}
    return Setup(task(n_calibration), Searching.of(settings), Compute.of(settings)).evaluator()


def some_masks() -> PackedMasks:
    return PackedMasks.pack(np.random.default_rng(0).random((3, UNITS.n_units)) < 0.5)


def test_an_evaluator_follows_the_settings() -> None:
    evaluate = make_evaluator()
    assert evaluate.objective == "divergence"
    assert evaluate.layout == UNITS
    mask = PackedMasks.pack(np.zeros((1, UNITS.n_units), dtype=bool))
    assert evaluate(mask)[0] == evaluate.score(mask).divergence[0] > 0


def test_an_evaluator_repairs_by_the_settings() -> None:
    """Each repair gives other results, and those of an evaluator that is made by hand."""
    found = []
    for changed in ({}, {"repair_images": 20}, {"damping": 1.0}, {"sequential_refit": True}):
        chosen = SETTINGS | {"repair": "reconstruct"} | changed
        evaluate = make_evaluator(**chosen)
        settings = Evaluating.of(chosen), Compute.of(chosen)
        assert np.array_equal(evaluate(some_masks()), PopulationEvaluator(task(), *settings)(some_masks()))
        found.append(Finisher(task(), *settings).finish(some_masks())[2].divergence.tolist())
    assert len({tuple(row) for row in found}) == 4


def test_an_evaluator_computes_in_what_it_is_told() -> None:
    assert make_evaluator(precision="bfloat16").precision == "bfloat16"
    assert make_evaluator().precision == "float32"


def test_an_evaluator_chooses_the_size_of_batches_itself_if_it_may() -> None:
    automatic = make_evaluator(batch_size="auto")
    mask = PackedMasks.pack(np.ones((1, UNITS.n_units), dtype=bool))
    assert automatic.batch_size == default_batch_size(evaluated().images, torch.device("cpu"))
    assert make_evaluator().batch_size == 4
    assert automatic.score(mask).error[0] == automatic.dense.error[0]


def test_an_evaluator_evaluates_in_as_many_processes_as_it_is_given() -> None:
    if not can_fork():
        pytest.skip("worker processes are forked, which only Linux does well")
    with make_evaluator(workers=2) as evaluate:
        assert evaluate.n_workers == 2


def test_repair_is_done_on_the_calibration_images() -> None:
    with pytest.raises(ValueError, match="needs calibration images, found none"):
        make_evaluator(0, repair="batchnorm")
    assert make_evaluator(0).n_classes == 3


def test_a_problem_has_the_costs_of_the_settings() -> None:
    setup = Setup(task(), Searching.of(SETTINGS | {"costs": ["macs", "bytes"]}), Compute())
    problem = setup.problem(make_evaluator())
    assert problem.objectives == ("error", "macs", "bytes")
    costs = problem.costs_of(some_masks())
    assert costs.shape == (3, 2)
    assert np.all((costs > 0.1) & (costs < 0.95))
    plain = Setup(task(), Searching.of(SETTINGS), Compute())
    assert plain.problem(make_evaluator()).objectives == ("error", "density")


def test_weights_that_are_zero_already_are_absent() -> None:
    network, units = task().network, task().units
    assert zero_weights(network, units) is None
    network = copy.deepcopy(network)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        parameters[units.names[0]].view(-1)[::2] = 0.0
        parameters[units.names[-1]].view(-1)[-1] = -0.0
    expected = np.zeros(units.n_units, dtype=bool)
    expected[: units.sizes[0] : 2] = expected[-1] = True
    words = zero_weights(network, units)
    assert words is not None
    assert np.array_equal(unpack_row(words, units.n_units), expected)
