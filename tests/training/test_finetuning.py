"""Fine-tuning: which members are chosen, that their masks hold, and what is written about them."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.settings import Compute, Evaluating
from paretoprune.training.finetuning import FINETUNED_COLUMNS, FinetuneData, choose_members, finetune_members
from paretoprune.training.loop import Recipe
from safetensors.torch import load_file
from small_networks import digits, magnitude_mask, states_equal, trained
from torch import nn

LOG = logging.getLogger("tests.finetuning")
DENSITIES = (0.08, 0.2, 0.45, 0.9)


def part(start: int, stop: int) -> LabelledImages:
    images, labels = digits()
    return LabelledImages(images[start:stop], labels[start:stop])


def task_of(network: nn.Module, data: LabelledImages) -> Task:
    return Task(network, WeightUnits.of(network), data.images, data.labels, part(0, 200).images)


def evaluator_of(network: nn.Module, data: LabelledImages) -> PopulationEvaluator:
    return PopulationEvaluator(task_of(network, data), Evaluating(), Compute(precision="float32"))


def front_of(evaluate: PopulationEvaluator, network: nn.Module) -> Front:
    masks = PackedMasks.pack(np.array([magnitude_mask(network, evaluate.layout, d) for d in DENSITIES]))
    return Front(masks, np.column_stack([evaluate(masks), masks.density]), ["phase1"] * len(DENSITIES))


def front_with(errors: list[float], densities: list[float]) -> Front:
    rng = np.random.default_rng(0)
    masks = PackedMasks.pack(rng.random((len(errors), 50)) < 0.5)
    return Front(masks, np.column_stack([errors, densities]), ["x"] * len(errors))


def test_the_member_of_nearest_sparsity_is_chosen() -> None:
    front = front_with([0.8, 0.5, 0.2, 0.1], [0.05, 0.12, 0.3, 0.9])
    assert choose_members(front, [0.9, 0.6], with_knee=False) == {1: "sparsity 0.9", 2: "sparsity 0.6"}


def test_a_member_chosen_for_several_targets_is_trained_once_and_tells_all_of_them() -> None:
    # By hand the knee is member 2: it has the smallest sum of the two scaled objectives.
    front = front_with([0.8, 0.5, 0.2, 0.1], [0.05, 0.12, 0.3, 0.9])
    chosen = choose_members(front, [0.7, 0.65, 0.1], with_knee=True)
    assert chosen == {2: "sparsity 0.7, sparsity 0.65, knee", 3: "sparsity 0.1"}


def test_the_knee_alone_can_be_chosen() -> None:
    assert choose_members(front_with([0.8, 0.2, 0.1], [0.05, 0.2, 0.9]), [], with_knee=True) == {1: "knee"}


def test_no_targets_choose_no_members() -> None:
    assert choose_members(front_with([0.8, 0.2], [0.05, 0.2]), [], with_knee=False) == {}


def test_a_sparsity_in_percent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a sparsity between 0 and 1, found 80; 80 % is 0\.8"):
        choose_members(front_with([0.8, 0.2], [0.05, 0.2]), [80], with_knee=False)


def finetune(folder: Path, network: nn.Module, **changed: Any) -> tuple[Front, list[dict[str, Any]]]:
    evaluated = evaluator_of(network, part(1000, 1300))
    front = front_of(evaluated, network)
    options: dict[str, Any] = {"sparsities": [0.9, 0.8], "with_knee": True, "seed": 0} | changed
    states = Finisher(task_of(network, part(1000, 1300)), Evaluating(), Compute()).finish(front.masks)[1]
    rows = finetune_members(
        replace(front, dense=network, states=states),
        evaluated.layout,
        FinetuneData(part(0, 1000), part(1000, 1300), part(1300, 1797)),
        Recipe(epochs=2, batch_size=50, learning_rate=0.02, distillation=0.7),
        choose_members(front, options["sparsities"], options["with_knee"]),
        seed=options["seed"],
        folder=folder,
        log=LOG,
    )
    return front, rows


@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_chosen_members_are_trained_with_their_masks_and_measured(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG.name)
    network = trained(kind)
    before = trained(kind)
    front, rows = finetune(tmp_path / "new" / "folder", network)
    assert states_equal(network, before)
    chosen = choose_members(front, [0.9, 0.8], with_knee=True)
    assert {row["id"]: row["target"] for row in rows} == chosen
    files = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert files == sorted(f"member{i}.safetensors" for i in chosen)
    test, search, layout = part(1300, 1797), part(1000, 1300), WeightUnits.of(network)
    evaluate = evaluator_of(network, test)
    for row in rows:
        i = row["id"]
        assert tuple(row) == FINETUNED_COLUMNS
        assert row["density"] == front.density[i]
        assert row["sparsity"] == 1 - front.density[i]
        # What lies in the file is what was measured, and its zeros are the mask's.
        finished = trained(kind)
        finished.load_state_dict(load_file(tmp_path / "new" / "folder" / f"member{i}.safetensors"))
        parameters = dict(finished.named_parameters())
        for name, kept in layout.split(front.masks.unpack(i)).items():
            assert torch.count_nonzero(parameters[name][torch.from_numpy(~kept)]) == 0, name
        n_alive = sum(int(torch.count_nonzero(parameters[name])) for name in layout.names)
        assert n_alive == front.masks.n_kept[i]
        # Batches of another size: at most one image on the edge.
        for key, data in (("test_error", test), ("search_top1_error", search)):
            found = top1_error(predict(finished, data.images, 64), data.labels)
            assert row[key] == pytest.approx(found, abs=1.01 / len(data)), key
        pruned = evaluate.score(front.masks.select([i])).error[0]
        assert row["test_error_pruned"] == pytest.approx(pruned, abs=1.01 / len(test))
        assert row["dense_test_error"] == evaluate.dense.error[0]
    # Training helps the sparsest member, which is far from the dense network.
    assert rows[0]["test_error"] < rows[0]["test_error_pruned"]
    assert len([line for line in caplog.messages if "% before" in line]) == len(rows)


def test_fine_tuning_is_fixed_by_its_seed(tmp_path: Path) -> None:
    network = trained("residual")
    runs = [
        finetune(tmp_path / str(i), network, sparsities=[0.9], with_knee=False, seed=seed)[1]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1]
    states = [load_file(tmp_path / str(i) / f"member{runs[i][0]['id']}.safetensors") for i in range(3)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_without_targets_there_are_no_rows_and_an_empty_folder(tmp_path: Path) -> None:
    _, rows = finetune(tmp_path / "folder", trained("residual"), sparsities=[], with_knee=False)
    assert rows == []
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_front_without_networks_is_refused(tmp_path: Path) -> None:
    front = front_with([0.8, 0.2], [0.05, 0.2])
    network, data = trained("residual"), FinetuneData(part(0, 100), part(100, 200), part(200, 300))
    with pytest.raises(ValueError, match="expected a front with its networks, found masks alone"):
        finetune_members(
            front, WeightUnits.of(network), data, Recipe(epochs=1), {0: "knee"}, seed=0, folder=tmp_path, log=LOG
        )
