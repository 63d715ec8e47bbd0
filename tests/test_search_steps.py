"""What steps that search share: their judge, scores from files, progress in about ten lines, and what they publish."""

import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from paretoprune.checkpoints import DenseNetwork, save_tensors
from paretoprune.datasets import ImageSet
from paretoprune.evaluation import PopulationEvaluator
from paretoprune.fronts import Front
from paretoprune.masks import MaskLayout, PackedMasks
from paretoprune.networks import Architecture
from paretoprune.search import SearchResult, read_history
from paretoprune.search_steps import log_progress, make_search_evaluator, publish, read_scores
from paretoprune.splits import LabelledImages, Splits
from small_networks import digits

ARCHITECTURE = Architecture("resnet8", 10, 1, {"base_width": 2})
CPU = torch.device("cpu")
SETTINGS = {
    "repair": "batchnorm",
    "objective": "divergence",
    "precision": "bfloat16",
    "batch_size": 16,
    "front_size": 3,
}


def dense() -> DenseNetwork:
    return DenseNetwork(ARCHITECTURE.build(0).eval(), ARCHITECTURE, (0.5,), (0.25,), ("conv1.weight",))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """The files of a step's input."""
    images, labels = digits()
    pixels = ((images[:100] * 0.37 + 0.3) * 255).round().to(torch.uint8)
    found = ImageSet(pixels, labels[:100], torch.zeros(100, dtype=torch.bool), tuple("0123456789"))
    found.save(tmp_path / "images")
    order = np.arange(100)
    Splits(order[:30], order[30:50], order[50:80], order[80:]).save(tmp_path / "splits.npz")
    dense().save(tmp_path / "network")
    names = {"images": "images", "splits": "splits.npz", "network": "network"}
    return {key: str(tmp_path / name) for key, name in names.items()}


def by_hand(inputs: dict[str, str], precision: str) -> PopulationEvaluator:
    """A judge on the search split, repaired on the calibration split."""
    images, splits, network = ImageSet.load(inputs["images"]), Splits.load(inputs["splits"]), dense().network
    search, calibration = (
        LabelledImages.of(images, indices, (0.5,), (0.25,)) for indices in (splits.search, splits.calibration)
    )
    return PopulationEvaluator(
        network,
        MaskLayout.of(network, ["conv1.weight"]),
        search.images,
        search.labels,
        repair="batchnorm",
        calibration_images=calibration.images,
        objective="divergence",
        precision=precision,
        batch_size=16,
    )


def some_masks(n: int = 6) -> PackedMasks:
    n_weights = MaskLayout.of(dense().network, ["conv1.weight"]).n_weights
    random = np.random.default_rng(0).random((n, n_weights))
    return PackedMasks.pack(random < np.linspace(0.1, 0.9, n)[:, None])


def test_a_search_is_judged_on_the_search_split_by_the_settings(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU)
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "bfloat16")(some_masks()))


def test_a_setting_can_be_changed_for_one_judge(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU, precision="float32")
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "float32")(some_masks()))


def test_what_is_published_was_judged_in_float32_and_thinned(inputs: dict[str, str], tmp_path: Path) -> None:
    masks = some_masks()
    wrong = np.column_stack([np.linspace(0.9, 0.1, 6), masks.density])
    history = [{"generation": 1, "evaluations": 6, "seconds": 0.5, "hypervolume": 0.25, "stage": "phase1"}]
    found = SearchResult(Front(masks, wrong, [f"stage{i}" for i in range(6)]), history)
    outputs = {"masks": str(tmp_path / "out" / "masks.npz"), "history": str(tmp_path / "out" / "history.csv")}
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU)
    assert evaluate.precision == "bfloat16"
    publish(found, evaluate, inputs, outputs, SETTINGS, CPU)
    front, exact = Front.load(outputs["masks"]), by_hand(inputs, "float32")(masks)
    assert 1 <= len(front) <= 3
    for i in range(len(front)):
        source = masks.fingerprints().index(front.masks.fingerprints()[i])
        assert np.array_equal(front.objectives[i], exact[source])
        assert front.stages[i] == f"stage{source}"
        assert not np.any(np.all(exact < front.objectives[i], axis=1))
    assert read_history(outputs["history"]) == history


def test_what_was_searched_in_float32_is_published_as_it_was_judged(inputs: dict[str, str], tmp_path: Path) -> None:
    masks = some_masks()
    given = np.column_stack([np.linspace(0.9, 0.1, 6), masks.density])
    outputs = {"masks": str(tmp_path / "masks.npz"), "history": str(tmp_path / "history.csv")}
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU, precision="float32")
    settings = SETTINGS | {"front_size": None}
    publish(SearchResult(Front(masks, given, ["x"] * 6), []), evaluate, inputs, outputs, settings, CPU)
    assert np.array_equal(Front.load(outputs["masks"]).objectives, given)


def test_publishing_ends_the_worker_processes_of_the_search(inputs: dict[str, str], tmp_path: Path) -> None:
    masks = some_masks()
    found = SearchResult(Front(masks, np.column_stack([masks.density[::-1], masks.density]), ["x"] * 6), [])
    outputs = {"masks": str(tmp_path / "masks.npz"), "history": str(tmp_path / "history.csv")}
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU, workers=2)
    evaluate(masks)
    publish(found, evaluate, inputs, outputs, SETTINGS, CPU)
    assert multiprocessing.active_children() == []


def test_scores_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    network = dense().network
    layout = MaskLayout.of(network)
    tensors = {name: network.get_parameter(name).detach().abs() for name in layout.names}
    files = [str(tmp_path / f"{name}.safetensors") for name in ("magnitude", "twice")]
    save_tensors(files[0], tensors)
    save_tensors(files[1], {name: 2 * tensor for name, tensor in tensors.items()})
    scores = read_scores(files, layout)
    assert list(scores) == ["magnitude", "twice"]
    assert np.array_equal(scores["magnitude"], torch.cat([tensors[name].flatten() for name in layout.names]).numpy())
    assert np.array_equal(scores["twice"], 2 * scores["magnitude"])


def test_scores_of_another_network_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "magnitude.safetensors", {"conv1.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"expected 'conv1\.weight' of shape .*was it made for another network"):
        read_scores([str(tmp_path / "magnitude.safetensors")], MaskLayout.of(dense().network))


@pytest.mark.parametrize("step_size", [1, 7, 40])
def test_progress_is_about_ten_lines_and_tells_the_end(step_size: int, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests.search_steps")
    caplog.set_level(logging.INFO, log.name)
    show = log_progress(log, 400)
    for evaluations in [*range(step_size, 400, step_size), 400]:
        show({"stage": "phase1", "evaluations": evaluations, "hypervolume": 0.5, "seconds": 1.0})
    assert 8 <= len(caplog.messages) <= 12
    assert caplog.messages[-1] == "phase1: 400 of 400 evaluations, hypervolume 0.5000, 1 s"
