"""What steps that search share: their judge, scores from files, progress in about ten lines, and what they publish."""

import logging
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
from paretoprune.masks.units import MaskLayout
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork, load_networks, with_weights
from paretoprune.search.corridor import Corridor
from paretoprune.search.search import (
    SearchResult,
    read_history,
    search_corridor,
    search_thresholds,
    sweep_allocation,
)
from paretoprune.settings import Compute, Judging
from paretoprune.tensors import save_tensors
from paretoprune.workflow.search_steps import (
    allowed_masks,
    log_progress,
    make_evaluator,
    make_finisher,
    make_search_evaluator,
    phase2_budget,
    publish,
    read_scores,
    read_task,
)
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
    "refine": True,
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


def by_hand(
    inputs: dict[str, str],
    precision: str,
    repair: str = "batchnorm",
    statistics: dict[str, LayerStatistics] | None = None,
    refine: bool = True,
) -> tuple[PopulationEvaluator, Finisher]:
    """An evaluator and a finisher on the search split, repaired on the calibration split."""
    images, splits, network = ImageSet.load(inputs["images"]), Splits.load(inputs["splits"]), dense().network
    search, calibration = (
        LabelledImages.of(images, indices, (0.5,), (0.25,)) for indices in (splits.search, splits.calibration)
    )
    layout = MaskLayout.of(network, ["conv1.weight"])
    task = Task(network, layout, search.images, search.labels, calibration.images, statistics)
    settings = Judging(repair, 12, 0.02, refine, "divergence"), Compute(precision, 16)
    return PopulationEvaluator(task, *settings), Finisher(task, *settings)


def some_masks(n: int = 6) -> PackedMasks:
    n_weights = MaskLayout.of(dense().network, ["conv1.weight"]).n_weights
    random = np.random.default_rng(0).random((n, n_weights))
    return PackedMasks.pack(random < np.linspace(0.1, 0.9, n)[:, None])


def test_a_search_is_judged_on_the_search_split_by_the_settings(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU)
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "bfloat16")[0](some_masks()))


def test_candidates_are_judged_on_the_first_search_images_and_finished_networks_on_all(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    few = {"candidate_images": 11}
    evaluate = make_search_evaluator(inputs, SETTINGS | few, CPU, precision="float32")
    whole = make_evaluator(read_task(inputs), SETTINGS, CPU, precision="float32")
    assert len(evaluate.judged.images) == 11
    assert np.array_equal(whole(some_masks()), by_hand(inputs, "float32")[0](some_masks()))
    assert not np.array_equal(evaluate(some_masks()), whole(some_masks()))
    front, _ = published(inputs, tmp_path, a_search(some_masks()), front_size=None, precision="float32", **few)
    assert set(front.objectives[:, 0]) <= set(
        make_finisher(read_task(inputs), SETTINGS, CPU).finish(some_masks())[2].divergence
    )


def test_a_setting_can_be_changed_for_one_judge(inputs: dict[str, str]) -> None:
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU, precision="float32")
    assert np.array_equal(evaluate(some_masks()), by_hand(inputs, "float32")[0](some_masks()))


def test_candidates_are_repaired_as_the_search_says_where_that_differs(inputs: dict[str, str]) -> None:
    expected = {repair: by_hand(inputs, "float32", repair)[0](some_masks()) for repair in ("none", "batchnorm")}
    assert not np.array_equal(expected["none"], expected["batchnorm"])
    for settings, repair in (
        ({"repair": "batchnorm", "search_repair": "none"}, "none"),
        ({"repair": "none", "search_repair": "batchnorm"}, "batchnorm"),
        ({"repair": "none", "search_repair": None}, "none"),
    ):
        evaluate = make_search_evaluator(inputs, SETTINGS | settings, CPU, precision="float32")
        assert np.array_equal(evaluate(some_masks()), expected[repair])


def with_statistics(inputs: dict[str, str], folder: Path) -> tuple[dict[str, str], dict[str, LayerStatistics]]:
    """A step's input with layer statistics that no evaluator would gather by itself, and these."""
    images = digits()[0][200:260]
    statistics = collect_statistics(dense().network, MaskLayout.of(dense().network, ["conv1.weight"]), images, seed=5)
    save_statistics(folder / "statistics.safetensors", statistics)
    return inputs | {"statistics": str(folder / "statistics.safetensors")}, statistics


def test_weights_are_re_fitted_by_the_statistics_among_the_inputs(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = SETTINGS | {"repair": "reconstruct", "precision": "float32"}
    given, statistics = with_statistics(inputs, tmp_path)
    found = make_search_evaluator(given, settings, CPU)(some_masks())
    assert np.array_equal(found, by_hand(inputs, "float32", "reconstruct", statistics)[0](some_masks()))
    assert not np.array_equal(found, by_hand(inputs, "float32", "reconstruct")[0](some_masks()))


HISTORY = [{"generation": 1, "evaluations": 6, "seconds": 0.5, "hypervolume": 0.25, "stage": "phase1"}]


def published(
    inputs: dict[str, str], folder: Path, found: SearchResult, **changed: Any
) -> tuple[Front, list[dict[str, Tensor]]]:
    """The front and the networks that a step publishes."""
    settings = SETTINGS | changed
    outputs = {"masks": "masks.npz", "networks": "networks.safetensors", "history": "history.csv"}
    outputs = {key: str(folder / "out" / name) for key, name in outputs.items()}
    publish(found, make_search_evaluator(inputs, settings, CPU), inputs, outputs, settings, CPU)
    assert read_history(outputs["history"]) == found.history
    return Front.load(outputs["masks"]), load_networks(outputs["networks"])


def a_search(masks: PackedMasks) -> SearchResult:
    """One that has judged its masks wrongly, so that each is on its front."""
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
        {"repair": "reconstruct", "refine": False, "search_repair": "batchnorm"},
    ],
)
def test_a_front_is_thinned_and_then_its_networks_are_finished_and_measured(
    inputs: dict[str, str], tmp_path: Path, precision: str, changed: dict[str, Any]
) -> None:
    masks = some_masks(9)
    found = a_search(masks)
    front, states = published(inputs, tmp_path, found, precision=precision, front_size=5, **changed)
    # By hand: five members are chosen by what the search says of them, and only then is anything built.
    thinned = found.front.thinned(5)
    made: dict[str, Any] = {"repair": "batchnorm", "refine": True} | {
        k: v for k, v in changed.items() if k != "search_repair"
    }
    _, exact = by_hand(inputs, "float32", **made)
    tried = [(mask, exact.build(mask)) for mask in map(thinned.masks.unpack, range(5))]
    anew = exact.reselect(thinned.masks) if made["repair"] == "reconstruct" and made["refine"] else thinned.masks
    tried = [
        min(pair, (mask, exact.build(mask)), key=lambda p: exact.measure(p[1])[1])
        for pair, mask in zip(tried, map(anew.unpack, range(5)), strict=True)
    ]
    masks, built = PackedMasks.pack(np.array([mask for mask, _ in tried])), [network for _, network in tried]
    objectives = np.column_stack([[exact.measure(network)[1] for network in built], thinned.density])
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
    _, exact = by_hand(inputs, "float32")
    objectives = np.array([exact.measure(exact.build(masks.unpack(i)))[1] for i in range(9)])
    best = [i for i in range(9) if not np.any(objectives[:i] <= objectives[i])]  # sparsest first
    assert 1 <= len(best) < 9
    assert front.stages == [f"stage{i}" for i in best]
    assert len(states) == len(best)


def test_published_networks_keep_to_their_masks_and_have_the_published_error(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    front, states = published(inputs, tmp_path, a_search(some_masks()), repair="reconstruct", objective="error")
    judge, _ = by_hand(inputs, "float32")
    splits = Splits.load(inputs["splits"])
    search = LabelledImages.of(ImageSet.load(inputs["images"]), splits.search, (0.5,), (0.25,))
    for i, state in enumerate(states):
        network, trained = with_weights(dense().network, state), dense().network
        for name, part in judge.layout.split(front.masks.unpack(i)).items():
            kept = torch.from_numpy(part)
            weights, before = network.get_parameter(name), trained.get_parameter(name)
            assert not bool(weights[~kept].any())
            assert not torch.equal(weights[kept], before[kept])  # re-fitted
        assert torch.equal(network.get_parameter("conv1.weight"), trained.get_parameter("conv1.weight"))
        assert front.error[i] == top1_error(predict(network, search.images, 64), search.labels)


def test_a_search_that_found_nothing_to_publish_says_why(inputs: dict[str, str], tmp_path: Path) -> None:
    nothing = SearchResult(Front.empty(some_masks().n_weights), HISTORY)
    with pytest.raises(ValueError, match=r"found none: each .* keeps nothing; set `empty_layers: allow`"):
        published(inputs, tmp_path, nothing, empty_layers="forbid")
    assert not (tmp_path / "out").exists()


def test_publishing_does_not_depend_on_the_number_of_processes(inputs: dict[str, str], tmp_path: Path) -> None:
    found, settings = a_search(some_masks()), SETTINGS | {"repair": "reconstruct"}
    fronts, networks = [], []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        outputs = {key: str(folder / key) for key in ("masks", "networks", "history")}
        evaluate = make_search_evaluator(inputs, settings, CPU, workers=workers)
        publish(found, evaluate, inputs, outputs, settings, CPU)
        fronts.append(Front.load(outputs["masks"]))
        networks.append(load_networks(outputs["networks"]))
    assert np.array_equal(fronts[0].objectives, fronts[1].objectives)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*networks, strict=True) for key in a)
    assert multiprocessing.active_children() == []


def test_publishing_ends_the_worker_processes_of_the_search(inputs: dict[str, str], tmp_path: Path) -> None:
    masks = some_masks()
    found = SearchResult(Front(masks, np.column_stack([masks.density[::-1], masks.density]), ["x"] * 6), [])
    outputs = {key: str(tmp_path / key) for key in ("masks", "networks", "history")}
    evaluate = make_search_evaluator(inputs, SETTINGS, CPU, workers=2)
    evaluate(masks)
    assert multiprocessing.active_children() != []
    publish(found, evaluate, inputs, outputs, SETTINGS, CPU)
    assert multiprocessing.active_children() == []


def test_masks_with_an_empty_layer_may_be_published_unless_they_are_forbidden() -> None:
    layout = MaskLayout.of(dense().network)
    rows = np.ones((4, layout.n_weights), dtype=bool)
    rows[1, layout.offsets[2] : layout.offsets[3]] = False
    rows[2, layout.offsets[2] : layout.offsets[3] - 1] = False  # one weight is left
    rows[3] = False
    masks = PackedMasks.pack(rows)
    assert allowed_masks({"empty_layers": "allow"}, layout) is None
    allowed = allowed_masks({"empty_layers": "forbid"}, layout)
    assert allowed is not None
    assert allowed(masks).tolist() == [True, False, True, False]
    assert allowed(masks.select(np.array([], dtype=np.int64))).shape == (0,)


@pytest.mark.parametrize("search", ["thresholds", "corridor", "sweep"])
def test_no_published_mask_has_an_empty_layer_where_that_is_forbidden(
    search: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    """The sparsest masks that are tried keep nothing of the smallest layers."""

    def found(empty_layers: str) -> Front:
        settings = SETTINGS | {"empty_layers": empty_layers, "repair": "none"}
        evaluate = make_search_evaluator(inputs, settings, CPU)
        layout, allowed = evaluate.layout, allowed_masks(settings, evaluate.layout)
        random = np.random.default_rng(0).random(layout.n_weights)
        budget: dict[str, Any] = {"evaluations": 40, "population": 10, "seed": 0, "allowed": allowed}
        counts = [np.floor(density * layout.sizes).astype(int) for density in (0.001, 0.01, 0.1, 0.5)]
        if search == "sweep":
            judged = sweep_allocation(evaluate, layout, random, counts, allowed=allowed)
        else:
            judged = search_thresholds(evaluate, layout, random, counts, **budget)
            if search == "corridor":
                moves: dict[str, Any] = {"softness": 0.5, "first_rate": 0.3, "crossover_probability": 0.5}
                everything = Corridor.everything(layout)
                judged = search_corridor(evaluate, everything, [random], judged, algorithm="nsga2", **moves, **budget)
        front, states = published(inputs, tmp_path / empty_layers, judged, **settings | {"front_size": None})
        assert len(states) == len(front) >= 1
        return front

    layout = MaskLayout.of(dense().network, ["conv1.weight"])
    forbidden, allowed = (layout.n_kept(found(choice).masks) for choice in ("forbid", "allow"))
    assert (forbidden > 0).all()
    assert (allowed == 0).any()


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


@pytest.mark.parametrize(("own", "planned", "spent", "expected"), [(24, 24, 24, 24), (24, 24, 21, 27), (0, 48, 45, 0)])
def test_what_phase_1_leaves_goes_to_phase_2_if_there_is_one(own: int, planned: int, spent: int, expected: int) -> None:
    history = [{"generation": 1, "evaluations": spent, "seconds": 1.0, "hypervolume": 0.5, "stage": "phase1"}]
    settings = {"algorithm": {"evaluations": own}, "phase1_evaluations": planned}
    assert phase2_budget(settings, SearchResult(Front.empty(3), history)) == expected
