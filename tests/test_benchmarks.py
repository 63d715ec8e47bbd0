"""The benchmarks: the plain search is the same search, what they count is right, and the figures of the last run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import CifarResNet
from paretoprune.search.corridor import Corridor, choose_anchors
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort, Problem
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Compute, Evaluating, Phase1, Phase2
from small_networks import digits, magnitude_mask, trained
from torch import nn

from benchmarks import figure, plain
from benchmarks.__main__ import headline
from benchmarks.evaluator import EagerLoop, forward_flop
from benchmarks.inputs import data_directory, images_and_labels, resnet, side_by_side

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results.json"


class Importance:
    """An error that falls with the importance kept."""

    def __init__(self, layout: WeightUnits) -> None:
        self.scores = np.random.default_rng(2).exponential(size=layout.n_weights)

    def __call__(self, masks: PackedMasks) -> np.ndarray:
        kept = [self.scores[masks.unpack(i)].sum() for i in range(len(masks))]
        return 1 - (np.array(kept) / self.scores.sum()) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_plain_search_finds_the_same_front_draw_for_draw(layout: WeightUnits, seed: int) -> None:
    evaluate = Importance(layout)
    problem = Problem(layout, evaluate)
    counts = [np.ceil(share * layout.sizes).astype(int) for share in (0.8, 0.4, 0.1)]
    before = search_thresholds(problem, evaluate.scores, counts, Phase1(), Effort(80, 10, seed))
    light, heavy = choose_anchors(before.front, 0.0, 1.0, light_tolerance=0.05, heavy_tolerance=0.9)
    corridor = Corridor.between(before.front.masks.unpack(light), before.front.masks.unpack(heavy), layout)
    guides = [evaluate.scores, evaluate.scores[::-1].copy()]
    settings = Phase2(softness=0.05, first_rate=0.05, crossover_probability=0.4)
    ours, theirs = (
        search(problem, [corridor], guides, before, settings, Effort(150, 10, seed))
        for search in (search_corridor, plain.search_corridor)
    )
    assert np.array_equal(ours.front.masks.words, theirs.front.masks.words)
    assert np.array_equal(ours.front.objectives, theirs.front.objectives)
    assert [row["hypervolume"] for row in ours.history] == [row["hypervolume"] for row in theirs.history]
    assert ours.front.hypervolume() > before.front.hypervolume()


@pytest.mark.parametrize("objective", ["error", "divergence"])
@pytest.mark.parametrize("repair", ["none", "batchnorm"])
def test_the_plain_evaluator_and_ours_agree(repair: str, objective: str) -> None:
    network, (images, labels) = trained("residual"), digits()
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.array([magnitude_mask(network, layout, d) for d in (1.0, 0.5, 0.2)]))
    task = Task(network, layout, images[1000:1200], labels[1000:1200], images[:100])
    theirs = plain.PlainEvaluator(task, repair=repair, objective=objective)
    evaluating = Evaluating(repair=repair, repair_images=None, objective=objective)
    ours = PopulationEvaluator(task, evaluating, Compute(precision="float32"))
    # One image of 200 on the edge between two classes; the divergence is continuous.
    np.testing.assert_allclose(ours(masks), theirs(masks), rtol=0, atol=0.0051 if objective == "error" else 1e-3)


def test_operations_of_a_network_are_counted_two_to_a_product() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    assert forward_flop(network, torch.zeros(1, 3, 4, 4)) == 2 * (5 * 16 * 27 + 80 * 7)
    # The literature's 125.5 million products and sums of a ResNet-56.
    assert forward_flop(CifarResNet(56).eval(), torch.zeros(1, 3, 32, 32)) == pytest.approx(251e6, rel=0.01)


def test_both_eager_loops_give_the_masked_network_s_answers() -> None:
    network, (images, _) = trained("residual"), digits()
    layout = WeightUnits.of(network)
    mask = magnitude_mask(network, layout, 0.5)
    masked = trained("residual")
    with torch.no_grad():
        for name, part in layout.split(mask).items():
            masked.get_parameter(name).mul_(torch.from_numpy(part))
        expected = masked(images[:150])
    exact, rough = (EagerLoop(network, layout, images[:150], tuned=tuned)(mask).float() for tuned in (False, True))
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (rough.argmax(1) == expected.argmax(1)).double().mean() > 0.95  # eight bits of mantissa


def test_without_data_the_networks_are_untrained_and_the_images_noise(tmp_path: Path) -> None:
    assert data_directory(tmp_path) is None
    images, labels = images_and_labels(12, None)
    assert images.shape == (12, 3, 32, 32)
    assert labels.shape == (12,)
    assert resnet(20, None)(images[:2]).shape == (2, 10)


def test_what_runs_side_by_side_is_called_in_turn() -> None:
    calls: list[str] = []
    found = side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}


def test_the_last_run_has_every_headline_figure_and_the_table_shows_them(tmp_path: Path) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["headline"] == headline(results)
    assert set(results["headline"]) == {
        "engine_speed_ratio",
        "engine_memory_ratio",
        "evaluator_ratio_usual",
        "evaluator_ratio_tuned",
        "evaluator_share_of_floor",
        "worker_scaling",
        "search_speed_ratio",
        "search_hypervolume_difference",
    }
    table = figure.table(results)
    assert (RESULTS.parent / "results.md").read_text(encoding="utf-8") == table
    assert table in (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    figure.draw(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 20_000
