"""What steps that search share: their evaluator, scores from files, progress in ten lines, and what they publish."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import LabelledImages, Splits
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.finishing import Finisher
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.evaluation.task import Task
from paretoprune.fronts import Front, non_dominated
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics, save_statistics
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork, with_weights
from paretoprune.search.corridor import Corridor
from paretoprune.search.phase2 import search_corridor
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult, read_history
from paretoprune.search.sweep import sweep_allocation
from paretoprune.search.thresholds import search_thresholds
from paretoprune.settings import Compute, Evaluating, Phase1, Phase2, Publishing, Searching
from paretoprune.stages.candidates import Setup
from paretoprune.stages.publish import publish
from paretoprune.tensors import load_networks
from paretoprune.workflow.search_inputs import read_task, write_published
from small_networks import digits
from torch import Tensor

ARCHITECTURE = Architecture("resnet8", 10, 1, {"base_width": 2})
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "repair": "batchnorm",
    "search_repair": None,
    "candidate_images": None,
    "repair_images": 12,
    "damping": 0.02,
    "sequential_refit": True,
    "empty_layers": "allow",
    "objective": "divergence",
    "precision": "bfloat16",
    "batch_size": 16,
    "front_size": 3,
    "sparsities": [],
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


def make_setup(inputs: dict[str, str], **changed: Any) -> Setup:
    """As a search step makes it."""
    settings = SETTINGS | changed
    return Setup(read_task(inputs), Searching.of(settings), Compute.of(settings))


def make_search_evaluator(inputs: dict[str, str], **changed: Any) -> PopulationEvaluator:
    """As a search step makes it."""
    return make_setup(inputs, **changed).evaluator()


def by_hand(
    inputs: dict[str, str],
    precision: str,
    repair: str = "batchnorm",
    statistics: dict[str, LayerStatistics] | None = None,
    **changed: Any,
) -> tuple[PopulationEvaluator, Finisher]:
    """An evaluator and a finisher on the search split, with repairs on the calibration split."""
    images, splits, network = ImageSet.load(inputs["images"]), Splits.load(inputs["splits"]), dense().network
    search, calibration = (
        LabelledImages.of(images, indices, (0.5,), (0.25,)) for indices in (splits.search, splits.calibration)
    )
    units = WeightUnits.of(network, ["conv1.weight"])
    task = Task(network, units, search.images, search.labels, calibration.images, statistics)
    evaluating = Evaluating(repair=repair, repair_images=12, damping=0.02, objective="divergence", **changed)
    settings = evaluating, Compute(precision=precision, batch_size=16)
    return PopulationEvaluator(task, *settings), Finisher(task, *settings)


def some_masks(n: int = 6) -> PackedMasks:
    n_weights = WeightUnits.of(dense().network, ["conv1.weight"]).n_weights
    random = np.random.default_rng(0).random((n, n_weights))
    return PackedMasks.pack(random < np.linspace(0.1, 0.9, n)[:, None])


def test_a_search_is_evaluated_on_the_search_split_by_the_settings(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs)
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "bfloat16")[0](some_masks()))


def test_candidates_are_evaluated_on_the_first_search_images_and_finished_networks_on_all(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    few = {"candidate_images": 11}
    evaluate = make_search_evaluator(inputs, **few, precision="float32")
    whole = make_search_evaluator(inputs, precision="float32")
    assert len(evaluate.ordered.images) == 11
    assert np.array_equal(whole(some_masks()), by_hand(inputs, "float32")[0](some_masks()))
    assert not np.array_equal(evaluate(some_masks()), whole(some_masks()))
    front, _ = published(inputs, tmp_path, a_search(some_masks()), front_size=None, precision="float32", **few)
    _, finisher = by_hand(inputs, "float32")
    assert set(front.objectives[:, 0]) <= set(finisher.finish(some_masks())[2].divergence)


def test_a_setting_can_be_changed_for_one_evaluate(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs, precision="float32")
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "float32")[0](some_masks()))


def test_candidates_are_repaired_as_the_search_says_where_that_differs(inputs: dict[str, str]) -> None:
    expected = {repair: by_hand(inputs, "float32", repair)[0](some_masks()) for repair in ("none", "batchnorm")}
    assert not np.array_equal(expected["none"], expected["batchnorm"])
    for settings, repair in (
        ({"repair": "batchnorm", "search_repair": "none"}, "none"),
        ({"repair": "none", "search_repair": "batchnorm"}, "batchnorm"),
        ({"repair": "none", "search_repair": None}, "none"),
    ):
        evaluate = make_search_evaluator(inputs, **settings, precision="float32")
        assert np.array_equal(evaluate(some_masks()), expected[repair])


def with_statistics(inputs: dict[str, str], folder: Path) -> tuple[dict[str, str], dict[str, LayerStatistics]]:
    """A step's input with layer statistics that no evaluator would gather by itself, and these."""
    images = digits()[0][200:260]
    statistics = collect_statistics(dense().network, WeightUnits.of(dense().network, ["conv1.weight"]), images, seed=5)
    save_statistics(folder / "statistics.safetensors", statistics)
    return inputs | {"statistics": str(folder / "statistics.safetensors")}, statistics


def test_weights_are_re_fitted_by_the_statistics_among_the_inputs(inputs: dict[str, str], tmp_path: Path) -> None:
    given, statistics = with_statistics(inputs, tmp_path)
    found = make_search_evaluator(given, repair="reconstruct", precision="float32")(some_masks())
    assert np.array_equal(found, by_hand(inputs, "float32", "reconstruct", statistics)[0](some_masks()))
    assert not np.array_equal(found, by_hand(inputs, "float32", "reconstruct")[0](some_masks()))


HISTORY = [{"generation": 1, "evaluations": 6, "seconds": 0.5, "hypervolume": 0.25, "stage": "phase1"}]


def published(
    inputs: dict[str, str], folder: Path, found: SearchResult, **changed: Any
) -> tuple[Front, list[dict[str, Tensor]]]:
    """The front and the networks that a step publishes."""
    outputs = {"masks": "masks.npz", "networks": "networks.safetensors", "history": "history.csv"}
    outputs = {key: str(folder / "out" / name) for key, name in outputs.items()}
    front = publish(found.front, make_setup(inputs, **changed), Publishing.of(SETTINGS | changed))
    write_published(front, found.history, outputs)
    assert read_history(outputs["history"]) == found.history
    return Front.load(outputs["masks"]), load_networks(outputs["networks"])


def a_search(masks: PackedMasks) -> SearchResult:
    """A search result with made-up objectives, so that each mask is on its front."""
    wrong = np.column_stack([np.linspace(0.9, 0.1, len(masks)), masks.density])
    return SearchResult(Front(masks, wrong, [f"stage{i}" for i in range(len(masks))]), HISTORY)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"repair": "none"},
        {"repair": "batchnorm", "search_repair": "none"},
        {"repair": "reconstruct"},
        {"repair": "reconstruct", "sequential_refit": False, "search_repair": "batchnorm"},
    ],
)
def test_a_front_is_thinned_and_then_its_networks_are_finished_and_measured(
    inputs: dict[str, str], tmp_path: Path, precision: str, changed: dict[str, Any]
) -> None:
    masks = some_masks(9)
    found = a_search(masks)
    front, states = published(inputs, tmp_path, found, precision=precision, front_size=5, **changed)
    # By hand: first five members are chosen by the objectives of the search, then their networks are built.
    thinned = found.front.thinned(5)
    made: dict[str, Any] = {"repair": "batchnorm", "sequential_refit": True} | {
        k: v for k, v in changed.items() if k != "search_repair"
    }
    _, finisher = by_hand(inputs, "float32", **made)
    tried = [(mask, finisher.build(mask)) for mask in map(thinned.masks.unpack, range(5))]
    refits = made["repair"] == "reconstruct" and made["sequential_refit"]
    anew = finisher.reselect(thinned.masks) if refits else thinned.masks
    tried = [
        min(pair, (mask, finisher.build(mask)), key=lambda p: finisher.measure(p[1])[1])
        for pair, mask in zip(tried, map(anew.unpack, range(5)), strict=True)
    ]
    masks, built = PackedMasks.pack(np.array([mask for mask, _ in tried])), [network for _, network in tried]
    objectives = np.column_stack([[finisher.measure(network)[1] for network in built], thinned.density])
    kept = non_dominated(objectives)
    assert np.array_equal(front.objectives, objectives[kept])
    assert front.masks.fingerprints() == masks.select(kept).fingerprints()
    same = np.all(masks.words == thinned.masks.words, axis=1)
    assert front.stages == [thinned.stages[i] if same[i] else "reselected" for i in kept]
    assert same.all() == (anew is thinned.masks)
    assert len(states) == len(kept) >= 1
    for state, i in zip(states, kept, strict=True):
        expected = built[i].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_members_that_others_dominate_once_they_are_measured_are_dropped(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    masks = some_masks(9)
    front, states = published(inputs, tmp_path, a_search(masks), front_size=None)
    _, finisher = by_hand(inputs, "float32")
    objectives = np.array([finisher.measure(finisher.build(masks.unpack(i)))[1] for i in range(9)])
    best = [i for i in range(9) if not np.any(objectives[:i] <= objectives[i])]  # sparsest first
    assert 1 <= len(best) < 9
    assert front.stages == [f"stage{i}" for i in best]
    assert len(states) == len(best)


def test_published_networks_keep_to_their_masks_and_have_the_published_error(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    front, states = published(inputs, tmp_path, a_search(some_masks()), repair="reconstruct", objective="error")
    evaluate, _ = by_hand(inputs, "float32")
    splits = Splits.load(inputs["splits"])
    search = LabelledImages.of(ImageSet.load(inputs["images"]), splits.search, (0.5,), (0.25,))
    for i, state in enumerate(states):
        network, trained = with_weights(dense().network, state), dense().network
        for name, part in evaluate.layout.split(front.masks.unpack(i)).items():
            kept = torch.from_numpy(part)
            weights, before = network.get_parameter(name), trained.get_parameter(name)
            assert not bool(weights[~kept].any())
            assert not torch.equal(weights[kept], before[kept])  # re-fitted
        assert torch.equal(network.get_parameter("conv1.weight"), trained.get_parameter("conv1.weight"))
        assert front.error[i] == top1_error(predict(network, search.images, 64), search.labels)


def test_a_search_that_found_nothing_to_publish_says_why(inputs: dict[str, str], tmp_path: Path) -> None:
    nothing = SearchResult(Front.empty(some_masks().n_units), HISTORY)
    with pytest.raises(ValueError, match=r"found none: each .* keeps nothing; set `empty_layers: allow`"):
        published(inputs, tmp_path, nothing, empty_layers="forbid")
    assert not (tmp_path / "out").exists()


def test_publishing_does_not_depend_on_the_number_of_processes(inputs: dict[str, str], tmp_path: Path) -> None:
    found = a_search(some_masks())
    fronts, networks = zip(
        *(published(inputs, tmp_path / str(n), found, repair="reconstruct", workers=n) for n in (1, 2)), strict=True
    )
    assert np.array_equal(fronts[0].objectives, fronts[1].objectives)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*networks, strict=True) for key in a)
    assert multiprocessing.active_children() == []


def test_masks_with_an_empty_layer_may_be_published_unless_they_are_forbidden(inputs: dict[str, str]) -> None:
    task, evaluate = read_task(inputs), make_search_evaluator(inputs)
    units = task.units
    allowing, forbidding = (Setup(task, Searching(empty_layers=choice), Compute()) for choice in ("allow", "forbid"))
    rows = np.ones((4, units.n_units), dtype=bool)
    rows[1, units.offsets[2] : units.offsets[3]] = False
    rows[2, units.offsets[2] : units.offsets[3] - 1] = False  # one weight is left
    rows[3] = False
    masks = PackedMasks.pack(rows)
    assert allowing.problem(evaluate).is_feasible is None
    is_feasible = forbidding.problem(evaluate).is_feasible
    assert is_feasible is not None
    assert is_feasible(masks).tolist() == [True, False, True, False]
    assert is_feasible(masks.select(np.array([], dtype=np.int64))).shape == (0,)


@pytest.mark.parametrize("search", ["thresholds", "corridor", "sweep"])
def test_no_published_mask_has_an_empty_layer_where_that_is_forbidden(
    search: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    """The sparsest masks that are tried keep nothing of the smallest layers."""

    def found(empty_layers: str) -> Front:
        settings = {"empty_layers": empty_layers, "repair": "none"}
        setup = make_setup(inputs, **settings)
        units = setup.task.units
        random, effort = np.random.default_rng(0).random(units.n_units), Effort(40, 10, 0)
        problem = setup.problem(setup.evaluator())
        counts = [np.floor(density * units.sizes).astype(int) for density in (0.001, 0.01, 0.1, 0.5)]
        if search == "sweep":
            evaluated = sweep_allocation(problem, random, counts)
        else:
            evaluated = search_thresholds(problem, random, counts, Phase1(), effort)
            if search == "corridor":
                moves = Phase2(softness=0.5, first_rate=0.3, crossover_probability=0.5)
                evaluated = search_corridor(problem, [Corridor.everything(units)], [random], evaluated, moves, effort)
        front, states = published(inputs, tmp_path / empty_layers, evaluated, **settings, front_size=None)
        assert len(states) == len(front) >= 1
        return front

    layout = WeightUnits.of(dense().network, ["conv1.weight"])
    forbidden, allowed = (layout.n_kept(found(choice).masks) for choice in ("forbid", "allow"))
    assert (forbidden > 0).all()
    assert (allowed == 0).any()
