"""The comparison of smaller networks: other tools' choices become the same networks of ours, at the level asked for."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import Splits, split_images
from paretoprune.files import read_json, write_npz
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import keep_top, ranks_within_groups
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.structured.judging import Judging, SlimJudge
from sklearn.datasets import load_digits
from small_networks import residual, states_equal

from benchmarks.channels import choices, measuring, report
from benchmarks.channels.fastnas import mask_of_network
from benchmarks.channels.ours import Published
from benchmarks.channels.peers import (
    IMPORTANCES,
    check_same_answers,
    failure_without_ignoring,
    layers_that_stay,
    mask_of,
    nearest_ratio,
)
from benchmarks.channels.results import Results
from benchmarks.channels.subject import Subject, of_results

RESULTS = Path(__file__).parents[1] / "benchmarks" / "channels.json"


@lru_cache
def given_files() -> tuple[DenseNetwork, ImageSet, Splits]:
    found = load_digits()
    images = torch.from_numpy(np.round(found.images * 15.9375).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    image_set = ImageSet(images, labels, torch.zeros(len(labels), dtype=torch.bool), tuple("0123456789"))
    splits = split_images(labels.numpy(), image_set.is_test.numpy(), calibration=64, search=100, test=200, seed=0)
    dense = DenseNetwork(residual(), Architecture("resnet8", 10, 1, {"base_width": 8}), (0.3,), (0.37,))
    return dense, image_set, splits


@lru_cache
def subject() -> Subject:
    return Subject.of(*given_files())


def test_results_of_the_workflow_give_the_same_subject(tmp_path: Path) -> None:
    dense, image_set, splits = given_files()
    front = tmp_path / "digits" / "resnet8" / "seed3" / "channels"
    assert of_results(front) is None
    dense.save(front.parent / "dense" / "model.safetensors")
    image_set.save(tmp_path / "digits" / "data" / "images.safetensors")
    splits.save(tmp_path / "digits" / "data" / "splits-seed3.npz")
    found = of_results(front)
    assert found is not None
    assert found.fingerprint == subject().fingerprint
    assert found.units.names == subject().units.names


# What torch-pruning chooses


@pytest.mark.parametrize("globally", [False, True])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_choice_of_torch_pruning_gives_the_same_network_by_our_units(importance: str, globally: bool) -> None:
    given = subject()
    pruned = choices.pruner(given, importance, globally=globally)(0.4)
    bits = mask_of(given.units, pruned.cuts)
    small = given.units.slim(given.network, bits)
    assert 0 < bits.sum() < len(bits)
    assert states_equal(small, pruned.network)
    check_same_answers(pruned.network, small, given.search.images)


def test_what_is_no_unit_of_ours_is_refused() -> None:
    given = subject()
    cuts = choices.pruner(given, "group norm", globally=False)(0.4).cuts
    with pytest.raises(ValueError, match=r"through axis 0 of 'conv1\.weight'"):
        mask_of(given.units, cuts | {("conv1.weight", 0): np.array([0])})
    (name, axis), entries = next(iter(cuts.items()))
    with pytest.raises(ValueError, match="parts of some"):
        mask_of(given.units, {key: value for key, value in cuts.items() if key != (name, axis)})
    with pytest.raises(ValueError, match="parts of some"):
        mask_of(given.units, cuts | {(name, axis): entries[1:]})
    with pytest.raises(ValueError, match="apart"):
        check_same_answers(
            given.network, given.units.slim(given.network, mask_of(given.units, cuts)), given.test.images
        )


def test_without_the_stream_ignored_the_tool_fails_on_shortcuts_without_parameters() -> None:
    given = subject()
    assert failure_without_ignoring(given.network, given.search.images[:1], "linear") is not None
    assert set(layers_that_stay(given.network, given.units)) == {
        "conv1",
        "linear",
        *(f"layer{i}.0.conv2" for i in (1, 2, 3)),
    }


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_of_units_rank_them_as_the_tool_does(importance: str) -> None:
    given = subject()
    prune = choices.pruner(given, importance, globally=False)
    bits = mask_of(given.units, prune(0.5).cuts)
    ranks = ranks_within_groups(prune.scores(given.units), given.units)
    counts = given.units.n_kept(PackedMasks.pack_each([bits], given.units.n_units))[0]
    assert np.array_equal(keep_top(ranks, counts, given.units), bits)


# As much as is asked for


@pytest.mark.parametrize("level", [0.1, 0.3, 0.5, 0.75])
def test_the_ratio_is_on_the_nearer_side_of_the_step_at_the_level(level: float) -> None:
    def removed(ratio: float) -> float:
        return float(np.floor(ratio * 16 + 0.2)) / 16  # layers lose whole channels

    ratio = nearest_ratio(removed, level)
    assert abs(removed(ratio) - level) == min(abs(n / 16 - level) for n in range(17))
    assert abs(nearest_ratio(lambda ratio: ratio, level) - level) < 1e-3


def test_a_ratio_is_found_where_larger_ones_remove_less_again() -> None:
    assert nearest_ratio(lambda ratio: ratio if ratio < 0.6 else 0.0, 0.5) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="removes 70%"):
        nearest_ratio(lambda ratio: ratio if ratio < 0.6 else 0.0, 0.7)


def test_every_choice_removes_the_level_and_the_best_of_several_is_judged_no_worse() -> None:
    given, level = subject(), 0.4
    order = choices.our_order(given)
    own = (choices.uniform, choices.least_loss, choices.least_measured_loss)
    found = [*choices.peers(given, [level]), *(choice for way in own for choice in way(given, order, [level]))]
    assert len(found) == 2 * len(IMPORTANCES) + 4
    for choice in found:
        assert abs(given.removed(choice.bits) - level) < 0.12
        assert choice.tool == choices.TORCH_PRUNING or given.removed(choice.bits) >= level
    ranks = ranks_within_groups(np.arange(given.units.n_units, dtype=np.float32), given.units)
    for seed in range(5):
        counts = choices.random_counts(given, ranks, level, np.random.default_rng(seed))
        assert level <= given.removed(keep_top(ranks, counts, given.units)) < level + 0.12
        assert (counts >= 1).all()
    judging = Judging("batchnorm", n_repair_images=64, n_images=100)
    best = list(choices.searched(given, found, 5, judging))
    assert [choice.tried for choice in best] == [5] * len(IMPORTANCES)
    judge = SlimJudge(given.task, judging)
    for choice in best:
        alike = [one.bits for one in found if (one.tool, one.importance) == (choice.tool, choice.importance)]
        losses = judge(PackedMasks.pack_each([choice.bits, *alike], given.units.n_units))
        assert losses[0] == losses.min()


# What other tools and a search give


def test_channels_that_another_tool_has_sorted_are_found_by_their_norms() -> None:
    given, rng = subject(), np.random.default_rng(1)
    bits = rng.random(given.units.n_units) < 0.6
    small = given.units.slim(given.network, bits)
    state = dict(small.state_dict())
    for coupling in given.units.couplings:
        order = None
        for part in coupling.parts:
            order = torch.from_numpy(rng.permutation(state[part.tensor].shape[part.axis])) if order is None else order
            state[part.tensor] = state[part.tensor].index_select(part.axis, order)
    small.load_state_dict(state)
    assert np.array_equal(mask_of_network(given.units, given.network, small), bits)
    with torch.no_grad():
        small.get_parameter("linear.bias").add_(1)
    with pytest.raises(ValueError, match=r"linear\.bias"):
        mask_of_network(given.units, given.network, small)


def test_the_member_of_a_front_removes_at_least_the_level(tmp_path: Path) -> None:
    given = subject()
    rows = [np.arange(given.units.n_units) % n != 0 for n in (2, 3, 5)]
    masks = PackedMasks.pack_each(rows, given.units.n_units)
    objectives = np.column_stack([[0.3, 0.2, 0.1], given.macs.of(masks)])
    front = Front(masks, objectives, ["phase2"] * 3, ("divergence", "macs"), units="channels")
    write_npz(tmp_path / "masks.npz", front.arrays())
    history = "generation,evaluations,seconds,hypervolume,stage\n1,60,1.5,0.2,phase1\n2,160,3,0.3,phase2\n"
    (tmp_path / "history.csv").write_text(history)
    published = Published.read(tmp_path, given)
    assert published.n_evaluations == 160
    found = list(published.choices([given.removed(rows[1]), given.removed(rows[1]) + 0.01, 0.99]))
    assert [choice.bits.tolist() for choice in found] == [rows[1].tolist(), rows[0].tolist()]
    assert {choice.tried for choice in found} == {160}
    front.names = ("divergence", "density")
    write_npz(tmp_path / "masks.npz", front.arrays())
    with pytest.raises(ValueError, match="objective macs"):
        Published.read(tmp_path, given)


# Rows and what is made of them


def row(tool: str, repair: str, wrong: list[int], **others: Any) -> measuring.Row:
    is_wrong = np.isin(np.arange(20), wrong)
    share = 1 - len(wrong) / 20
    return {
        "tool": tool,
        "importance": "elimination",
        "allocation": "searched",
        "tried": 1,
        "repair": repair,
        "level": 0.5,
        "removed": 0.52,
        "ratio": None,
        "accuracy": share,
        "standard_error": 0.1,
        "wrong": np.packbits(is_wrong).tobytes().hex(),
        **others,
    }


def test_differences_are_paired() -> None:
    ours, other = row("a", "none", [3]), row("b", "none", [3, 5, 7])
    mean, error = measuring.difference(ours, other, 20)
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(np.std([1, 1] + [0] * 18, ddof=1) / np.sqrt(20))


def test_a_measured_network_says_which_images_are_wrong() -> None:
    found = measuring.accuracy(subject().network, subject().test)
    wrong = np.unpackbits(np.frombuffer(bytes.fromhex(found["wrong"]), dtype=np.uint8))[:200]
    assert found["accuracy"] == pytest.approx(1 - wrong.mean())


def test_parts_replace_their_own_rows_only_and_other_subjects_all(tmp_path: Path) -> None:
    results = Results(tmp_path, "resnet8", {"fingerprint": "a", "kept": 1})
    results.replace("x", [row("a", "none", [1])])
    Results(tmp_path, "resnet20", {"fingerprint": "b"}).replace("x", [row("a", "none", [1])])
    results = Results(tmp_path, "resnet8", {"fingerprint": "a"})
    results.replace("y", [row("b", "none", [2])])
    results.replace("y", [row("c", "none", [2])])
    found = read_json(results.path)["networks"]
    assert [one["tool"] for one in found["resnet8"]["rows"]] == ["a", "c"]
    assert found["resnet8"]["kept"] == 1
    assert len(found["resnet20"]["rows"]) == 1
    Results(tmp_path, "resnet8", {"fingerprint": "other"}).replace("y", [])
    assert read_json(results.path)["networks"]["resnet8"]["rows"] == []


def test_a_level_that_is_measured_again_replaces_its_own_rows_only(tmp_path: Path) -> None:
    results = Results(tmp_path, "resnet8", {"fingerprint": "a"})
    results.replace("x", [row("a", "none", [1]), row("b", "none", [1], level=0.6)])
    results.replace("x", [row("c", "none", [1])], levels=[0.5])
    assert [one["tool"] for one in results.rows] == ["b", "c"]


def test_tables_say_what_is_best_and_how_far_ours_is_above(tmp_path: Path) -> None:
    rows = [
        row("paretoprune", "reconstruct", [3], tried=160),
        row("torch-pruning", "none", list(range(10)), importance="Taylor", allocation="local"),
        row("torch-pruning", "reconstruct", [3, 4], importance="Taylor", allocation="local", removed=0.501),
    ]
    found = {"dense": rows[0], "n_test": 20, "rows": rows}
    lines = list(report.lines({"resnet8": found}))
    assert "| paretoprune, searched (160 tried) | **95.0 ± 10.0** (−52.0 %) |" in lines
    assert "| torch-pruning, Taylor, local | 90.0 ± 10.0 |" in lines
    assert "| torch-pruning, Taylor, local, with our repair | +5.0 ± 5.0 |" in lines
    assert any(line.startswith("| torch-pruning, Taylor, local, as it comes | +45.0") for line in lines)
    # What a tool repairs by itself is how it comes, and stands beside what we do to the same channels.
    nas = [
        row("ModelOpt FastNAS", repair, list(range(n)))
        for repair, n in (("its own", 4), ("none", 19), ("batchnorm", 2))
    ]
    lines = list(report.lines({"resnet8": {**found, "rows": rows + nas}}))
    assert any(line.startswith("| ModelOpt FastNAS, its own | 80.0") for line in lines)
    assert any(line.startswith("| ModelOpt FastNAS | 5.0") for line in lines)
    assert [line.split("|")[2].split()[0] for line in lines if line.startswith("| ModelOpt FastNAS, as it")] == [
        "+15.0"
    ]
    results = Results(tmp_path, "resnet8", {"fingerprint": "", **found})
    results.replace("x", rows)
    report.write(results.path)
    assert (tmp_path / "channels.png").stat().st_size > 20_000


def test_the_tables_are_those_of_the_last_run() -> None:
    networks = read_json(RESULTS)["networks"]
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == "\n".join(report.lines(networks)) + "\n"
