"""The workflow as a user runs it: snakemake in a copy of the repository."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
import yaml
from paretoprune.deployment.latency import LatencyTable
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.tensors import load_networks
from paretoprune.workflow.configuration import merge
from paretoprune.workflow.inputs import read_splits

pytestmark = pytest.mark.workflow

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SEED = Path("results/digits/resnet8/seed3")
TINY = "tests/tiny.yaml"
METHODS = ("two_phase_nsga2", "two_phase_moead", "channels", "flat_nsga2", "global_magnitude", "refitted")


def copy_repository(target: Path) -> Path:
    """The files that git knows or would add, as a clone would have them."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file)
    return target


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    """Let Snakemake and the steps that it starts find their libraries imported."""
    with warm_python.started() as python:
        PYTHON["warm"] = python
        yield


# What runs Snakemake and the steps, and `cold` where a test wants both to start as a user's do.
PYTHON = {"cold": sys.executable}


def snakemake(
    folder: Path, *arguments: str, config: str | None = TINY, python: str = "warm"
) -> subprocess.CompletedProcess[str]:
    command = [PYTHON[python], "-m", "snakemake", "--cores", "2", *arguments]
    command += ["--configfile", config] if config else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def planned(folder: Path, config: str = TINY) -> dict[str, int]:
    """Rules that would run, with their numbers of jobs."""
    run = snakemake(folder, "--dry-run", config=config)
    assert run.returncode == 0, run.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout + run.stderr, re.MULTILINE))
    assert jobs or "Nothing to be done" in run.stdout + run.stderr
    return {rule: int(n) for rule, n in jobs.items() if rule not in ("all", "total")}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_repository(tmp_path_factory.mktemp("clone"))
    run = snakemake(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture
def copy_of_finished(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "clone"))


def test_every_promised_file_is_there_with_its_columns(finished: Path) -> None:
    seed = finished / SEED
    assert (seed / "dense/model.safetensors").stat().st_size > 1000
    metrics = json.loads((seed / "dense/metrics.json").read_text())
    assert set(metrics["accuracy"]) == {"train", "calibration", "search", "test"}
    assert {path.stem for path in (seed / "importance").iterdir()} == {"magnitude", "lamp", "fisher", "elimination"}
    assert (seed / "statistics.safetensors").stat().st_size > 1000
    for method in METHODS:
        front = rows(seed / method / "front.csv")
        assert {"id", "stage", "density", "sparsity", "search_error", "test_error"} <= set(front[0])
        assert 1 <= len(front) <= 8
        published = Front.load(seed / method / "masks.npz")
        assert len(load_networks(seed / method / "networks.safetensors")) == len(published) == len(front)
        assert [float(row["search_error"]) for row in front] == published.error.tolist()
        history = rows(seed / method / "history.csv")
        assert {"generation", "evaluations", "seconds", "hypervolume"} <= set(history[0])
        # Also of `refitted`, whose Phase 1 may have fewer than four members to choose anew.
        assert int(history[-1]["evaluations"]) == {"global_magnitude": 6, "channels": 64}.get(method, 48)
    finetuned = rows(seed / "two_phase_moead/finetuned.csv")
    assert "sparsity 0.5" in finetuned[0]["target"]
    members = {f"member{row['id']}.safetensors" for row in finetuned}
    assert {path.name for path in (seed / "two_phase_moead/finetuned").glob("*.safetensors")} == members
    summary = rows(finished / "results/report/summary.csv")
    assert [row["method"] for row in summary] == list(METHODS)
    assert {"hypervolume_search", "hypervolume_test", "sparsity_within_1pt", "evaluations", "seconds"} <= set(
        summary[0]
    )
    assert "two_phase_moead" in (finished / "results/report/index.html").read_text()


def test_members_that_are_smaller_are_timed(finished: Path) -> None:
    times, front = rows(finished / SEED / "channels/latency.csv"), rows(finished / SEED / "channels/front.csv")
    dense, *members = times
    assert dense["id"] == "dense"
    assert float(dense["measured"]) == 1
    assert [row["id"] for row in members] == [row["id"] for row in front]
    assert all(float(row["measured"]) > 0 and float(row["milliseconds"]) > 0 for row in members)
    # Cheap in density first, so that multiply-adds grow from the first member to the last.
    assert float(members[0]["macs"]) < float(members[-1]["macs"]) <= 1
    # Nobody predicted them, and torch reads no file.
    assert {row["predicted"] for row in times} == {row["bytes"] for row in times} == {""}
    page = (finished / "results/report/index.html").read_text()
    assert "run on torch, 1 image at a time, 1 thread" in page
    assert (finished / "results/report/figures/digits-resnet8-latency.svg").is_file()
    assert not (finished / "results/report/figures/digits-resnet8-prediction.svg").exists()
    assert not (finished / "results/digits/resnet8/latency.json").exists()


def test_each_front_is_at_least_as_good_as_its_starting_allocations(finished: Path) -> None:
    for method in ("two_phase_nsga2", "two_phase_moead"):
        history = rows(finished / SEED / method / "history.csv")
        volumes = [float(row["hypervolume"]) for row in history]
        assert volumes == sorted(volumes)
        assert history[0]["stage"] == "start"
        assert {row["stage"] for row in history} == {"start", "phase1", "phase2"}


def test_networks_of_a_method_that_re_fits_are_those_that_were_measured(finished: Path) -> None:
    seed = finished / SEED
    front, states = Front.load(seed / "refitted/masks.npz"), load_networks(seed / "refitted/networks.safetensors")
    dense = DenseNetwork.load(seed / "dense/model.safetensors")
    layout = WeightUnits.of(dense.network, dense.exclude)
    data = finished / "results/digits/data"
    files = str(data / "images.safetensors"), str(data / "splits-seed3.npz")
    search, test = read_splits(*files, dense, "search", "test")
    for i, (state, row) in enumerate(zip(states, rows(seed / "refitted/front.csv"), strict=True)):
        dense.network.load_state_dict(state)
        for part, column in ((search, "search_error"), (test, "test_error")):
            found = top1_error(predict(dense.network, part.images, 64), part.labels)
            # The evaluator runs in another memory layout: one image of 400 on the edge may turn.
            assert found == pytest.approx(float(row[column]), abs=1.01 / 400)
        for name, kept in layout.split(front.masks.unpack(i)).items():
            assert not state[name].numpy()[~kept].any()


def test_several_corridors_are_drawn_between_neighbouring_anchors(finished: Path) -> None:
    method = finished / SEED / "refitted"
    anchors = Front.load(method / "anchors.npz")
    assert 2 <= len(anchors) <= 4
    assert np.all(np.diff(anchors.density) < 0)
    corridor = json.loads((method / "anchors.json").read_text())
    assert corridor["n_corridors"] == 3
    ends = anchors.masks.words
    searched = np.bitwise_or.reduce(ends) & ~np.bitwise_and.reduce(ends)
    assert corridor["n_corridor"] == int(np.bitwise_count(searched).sum()) < corridor["n_weights"]


# Methods with a part removed, computed beside what is there.
VARIANTS = {
    "no_phase2": {"kind": "two_phase", "phase1": {"share": 1}},
    "no_corridor": {"kind": "two_phase", "phase1_from": "two_phase_nsga2", "anchors": {"corridors": 0}},
    "no_repair": {"kind": "flat", "search_repair": "none", "empty_layers": "forbid"},
}


@pytest.fixture(scope="module")
def varied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("varied") / "clone"))
    config = yaml.safe_load((folder / TINY).read_text())
    config["methods"] = list(VARIANTS)
    config["finetune"]["methods"] = []
    config["method_settings"] |= VARIANTS
    (folder / "varied.yaml").write_text(yaml.safe_dump(config))
    expected = {
        "search_thresholds": 1,
        "choose_anchors": 2,
        "search_corridor": 2,
        "search_flat": 1,
        "evaluate_front": 3,
        "write_report": 1,
    }
    assert planned(folder, "varied.yaml") == expected
    run = snakemake(folder, config="varied.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_phase_1_alone_publishes_its_front(varied: Path) -> None:
    method = varied / SEED / "no_phase2"
    history = rows(method / "history.csv")
    assert history == rows(method / "phase1_history.csv")
    assert {row["stage"] for row in history} == {"start", "phase1"}
    assert int(history[-1]["evaluations"]) == 48
    found, published = Front.load(method / "phase1.npz"), Front.load(method / "masks.npz")
    assert 1 <= len(published) <= 8
    default = yaml.safe_load((ROOT / "config.yaml").read_text())["search"]["sparsities"]
    thinned = found.thinned(8, default)
    # A member is as it was found, or has as many weights of each layer, chosen anew.
    layout = WeightUnits.of(DenseNetwork.load(varied / SEED / "dense/model.safetensors").network, ())
    counts = {tuple(row) for row in layout.n_kept(thinned.masks).tolist()}
    assert {tuple(row) for row in layout.n_kept(published.masks).tolist()} <= counts
    as_found = [member for member, stage in enumerate(published.stages) if stage != "reselected"]
    assert set(published.masks.select(as_found).fingerprints()) <= set(thinned.masks.fingerprints())


def test_without_a_corridor_all_masks_are_searched(varied: Path) -> None:
    method = varied / SEED / "no_corridor"
    corridor = json.loads((method / "anchors.json").read_text())
    assert corridor["n_corridors"] == 0
    assert corridor["n_corridor"] == corridor["n_weights"]
    assert all(layer["n_corridor"] == layer["n_weights"] for layer in corridor["layers"])
    history = rows(method / "history.csv")
    assert int(history[-1]["evaluations"]) == 48
    assert history[-1]["stage"] == "phase2"


def test_networks_that_were_searched_bare_are_repaired_when_they_are_published(varied: Path) -> None:
    seed = varied / SEED
    states = load_networks(seed / "no_repair/networks.safetensors")
    dense = DenseNetwork.load(seed / "dense/model.safetensors")
    trained = dense.network.get_buffer("bn1.running_mean")
    assert states
    assert not any(torch.equal(state["bn1.running_mean"], trained) for state in states)
    counts = rows(seed / "no_phase2/layers.csv")
    assert {"id", "layer", "n_weights", "n_kept"} == set(counts[0])
    layout = WeightUnits.of(dense.network, dense.exclude)
    assert (layout.n_kept(Front.load(seed / "no_repair/masks.npz").masks) > 0).all()
    assert "no_repair" in (varied / "results/report/index.html").read_text()


# A search after latency, beside what is there.
FASTER = {
    "methods": ["faster"],
    "method_settings": {"faster": {"kind": "channels", "repair": "batchnorm", "evaluations": 64}},
    "finetune": {"methods": []},
    "search": {"objectives": ["auto", "latency"]},
    "latency": {"measure": False},
}


def with_latency(**changed: Any) -> dict[str, Any]:
    tiny = yaml.safe_load((ROOT / TINY).read_text()) | {"methods": [], "method_settings": {}}
    return merge(merge(tiny, FASTER), changed)


def planned_with(folder: Path, **changed: Any) -> dict[str, int]:
    (folder / "changed.yaml").write_text(yaml.safe_dump(with_latency(**changed)))
    return planned(folder, "changed.yaml")


def everything_after_the_table() -> dict[str, int]:
    return dict.fromkeys(("measure_latency", "search_channels", "evaluate_front", "time_members", "write_report"), 1)


@pytest.fixture(scope="module")
def faster(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("faster") / "clone"))
    assert planned_with(folder) == everything_after_the_table()
    run = snakemake(folder, config="changed.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_a_search_after_latency_follows_a_table_that_was_measured_before(faster: Path) -> None:
    table = LatencyTable.load(faster / "results/digits/resnet8/latency.json")
    assert table.machine.runtime == "torch"
    assert table.checked is not None
    assert len(table.checked.errors) == 3
    method = faster / SEED / "faster"
    front, (dense, *members) = rows(method / "front.csv"), rows(method / "latency.csv")
    # A column for each objective; what is predicted is what was searched.
    assert list(front[0])[-1] == "latency"
    assert [row["latency"] for row in front] == [row["predicted"] for row in members]
    assert Front.load(method / "masks.npz").names[1:] == ("latency",)
    assert float(dense["predicted"]) == 1
    page = (faster / "results/report/index.html").read_text()
    assert "was tried on 3 random smaller networks" in page
    assert (faster / "results/report/figures/digits-resnet8-prediction.png").stat().st_size > 10_000


def test_nothing_runs_beside_what_is_timed(faster: Path) -> None:
    run = snakemake(faster, "--dry-run", "--forceall", config="changed.yaml")
    said = (run.stdout + run.stderr).split("\nrule ")
    for rule in ("measure_latency:", "time_members:"):
        (job,) = [one for one in said if one.startswith(rule)]
        assert "threads: 2" in job, "all of --cores 2"


def test_the_table_is_kept_until_what_it_depends_on_changes(faster: Path) -> None:
    # What members are timed for does not matter to the table, nor does how the search goes on.
    assert planned_with(faster, latency={"measure": True}) == {}
    assert planned_with(faster, search={"anchors": {"corridors": 2}}) == {
        "search_channels": 1, "evaluate_front": 1, "time_members": 1, "write_report": 1,
    }  # fmt: skip
    assert planned_with(faster, latency={"batch_size": 2}) == everything_after_the_table()


def test_a_table_of_another_machine_is_refused_with_the_command_that_measures_anew(
    faster: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(faster, tmp_path / "clone"))
    path = folder / "results/digits/resnet8/latency.json"
    table = LatencyTable.load(path)
    replace(table, machine=replace(table.machine, processor="another")).save(path)
    (folder / "changed.yaml").write_text(yaml.safe_dump(with_latency()))
    run = snakemake(folder, config="changed.yaml")
    assert run.returncode != 0
    assert "measured elsewhere: expected processor '" in run.stderr
    assert "found 'another'; times do not carry over" in run.stderr
    assert "`snakemake ... --forcerun measure_latency`" in run.stderr
    # The command does what it says.
    run = snakemake(folder, "--forcerun", "measure_latency", "--until", "measure_latency", config="changed.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert LatencyTable.load(path).machine == table.machine


def test_a_second_run_finds_nothing_to_do(finished: Path) -> None:
    assert planned(finished) == {}


def test_touching_a_module_without_changing_it_reruns_nothing(copy_of_finished: Path) -> None:
    (copy_of_finished / "workflow/scripts/paretoprune/evaluation/evaluator.py").touch()
    assert planned(copy_of_finished) == {}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("training/finetuning", {"finetune_members": 2, "write_report": 1}),
        ("reporting/run_plots", {"write_report": 1}),
        ("deployment/running", {"time_members": 1, "write_report": 1}),
        (
            "structured/refit",
            {"search_channels": 1, "evaluate_front": 1, "finetune_members": 1, "time_members": 1, "write_report": 1},
        ),
        ("search/guidance", {"search_corridor": 3, "evaluate_front": 3, "finetune_members": 1, "write_report": 1}),
        (
            "search/groups",
            {
                "choose_anchors": 3,
                "search_corridor": 3,
                "search_channels": 1,
                "search_flat": 1,
                "evaluate_front": 5,
                "finetune_members": 2,
                "time_members": 1,
                "write_report": 1,
            },
        ),
    ],
)
def test_editing_a_module_reruns_its_dependents_only(
    copy_of_finished: Path, module: str, expected: dict[str, int]
) -> None:
    with (copy_of_finished / f"workflow/scripts/paretoprune/{module}.py").open("a") as handle:
        handle.write("\n# edited\n")
    assert planned(copy_of_finished) == expected


def test_changing_one_methods_setting_reruns_that_method_only(copy_of_finished: Path) -> None:
    config = yaml.safe_load((copy_of_finished / TINY).read_text())
    config["method_settings"]["flat_nsga2"] = {"flat": {"flip_rate": 0.5}}
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(copy_of_finished, "changed.yaml") == {"search_flat": 1, "evaluate_front": 1, "write_report": 1}


def test_changing_how_statistics_are_taken_reruns_what_re_fits_only(copy_of_finished: Path) -> None:
    config = yaml.safe_load((copy_of_finished / TINY).read_text())
    config["importance"]["positions"] = 8
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(copy_of_finished, "changed.yaml") == {
        "collect_statistics": 1,
        "compute_importance": 1,
        "search_thresholds": 1,
        "choose_anchors": 1,
        "search_corridor": 1,
        "evaluate_front": 1,
        "write_report": 1,
    }


def test_changing_the_fine_tuning_reruns_no_search(copy_of_finished: Path) -> None:
    config = yaml.safe_load((copy_of_finished / TINY).read_text())
    config["finetune"]["epochs"] = 2
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(copy_of_finished, "changed.yaml") == {"finetune_members": 2, "write_report": 1}


def test_figures_are_drawn_from_small_files_alone_and_never_by_training(finished: Path, tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "clone")
    for file in finished.glob("results/digits/**/*"):
        if file.suffix in (".csv", ".json") and "phase1" not in file.name:
            target = folder / file.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    run = snakemake(folder, "figures", "--workflow-profile", "profiles/figures", python="cold")
    assert run.returncode == 0, run.stderr
    assert (folder / "results/report/summary.csv").read_text() == (finished / "results/report/summary.csv").read_text()
    shutil.rmtree(folder / "results/report")
    (folder / SEED / "flat_nsga2/front.csv").unlink()
    run = snakemake(folder, "figures", "--workflow-profile", "profiles/figures")
    assert run.returncode != 0
    assert "flat_nsga2/front.csv" in run.stdout + run.stderr
    assert not (folder / SEED / "dense/model.safetensors").exists()


def test_a_misspelt_key_stops_before_anything_starts(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "clone")
    (folder / "wrong.yaml").write_text("search: {evaluatoins: 10}\n")
    run = snakemake(folder, config="wrong.yaml")
    assert run.returncode != 0
    assert "unknown key 'search.evaluatoins'; did you mean 'evaluations'?" in run.stdout + run.stderr
    assert not (folder / "results").exists()


def test_diverging_training_is_a_clear_error_and_loses_nothing_done_before(copy_of_finished: Path) -> None:
    config = yaml.safe_load((copy_of_finished / TINY).read_text())
    config["training"].update(learning_rate=1e20, warmup_epochs=0)
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    run = snakemake(copy_of_finished, config="changed.yaml")
    assert run.returncode != 0
    assert re.search(r"ERROR: the loss became (nan|inf) in epoch 1 of 3, step \d+; lower the learning_rate", run.stderr)
    assert not (copy_of_finished / SEED / "dense/metrics.json").exists()
    assert not list((copy_of_finished / SEED / "dense").glob("*.resume"))
    assert (copy_of_finished / "results/digits/data/images.safetensors").is_file()
    assert (copy_of_finished / SEED / "two_phase_moead/front.csv").is_file()


def test_a_file_that_is_no_image_is_named_and_leaves_no_output(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "clone")
    (folder / "data/my-images/train/cat").mkdir(parents=True)
    (folder / "data/my-images/train/cat/notes.png").write_text("not an image")
    run = snakemake(folder, config="experiments/my-network.yaml")
    assert run.returncode != 0
    assert "1 files in 'data/my-images' are no readable images" in run.stderr
    assert "notes.png" in run.stderr
    assert not list((folder / "results").glob("**/*.safetensors"))


def test_a_table_in_an_npz_file_goes_through_the_whole_workflow(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "clone")
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 100)
    table = rng.normal(size=(300, 6)) + 2 * np.eye(6)[labels]
    (folder / "data").mkdir(exist_ok=True)
    np.savez(folder / "data/table.npz", features=table, labels=labels, classes=np.array(["ant", "bee", "cat"]))
    (folder / "perceptron.py").write_text(
        "from torch import nn\n\n\n"
        "def perceptron(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Linear(in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))\n"
    )
    config = yaml.safe_load((ROOT / TINY).read_text())
    config |= {
        "runs": [{"dataset": "table", "network": "perceptron"}],
        "methods": ["two_phase_nsga2", "refitted"],
        "datasets": {
            "table": {
                "source": "npz",
                "path": "table.npz",
                "calibration": 50,
                "search": 60,
                "test": 60,
                "augmentation": {"crop": 0, "flip": False},
            }
        },
        "networks": {
            "perceptron": {
                "architecture": "perceptron:perceptron",
                "arguments": {},
                "checkpoint": None,
                "normalisation": None,
                "exclude": [],
            }
        },
    }
    config["training"]["epochs"] = 10
    config["finetune"]["methods"] = ["refitted"]
    (folder / "table.yaml").write_text(yaml.safe_dump(config))
    run = snakemake(folder, config="table.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    seed = folder / "results/table/perceptron/seed3"
    metrics = json.loads((seed / "dense/metrics.json").read_text())
    # Classes lie two deviations apart in a dimension each; guessing is right on a third.
    assert metrics["accuracy"]["test"] > 0.7
    assert (metrics["n_classes"], metrics["n_prunable"]) == (3, 6 * 16 + 16 * 3)
    for method in ("two_phase_nsga2", "refitted"):
        front = rows(seed / method / "front.csv")
        assert min(float(row["test_error"]) for row in front) < 0.3
    assert rows(seed / "refitted/finetuned.csv")
    assert "refitted" in (folder / "results/report/index.html").read_text()
    log = (folder / "results/logs/table/read_images.log").read_text()
    assert "300 rows of a table of shape (6,), float32" in log
    # What only images have is refused by the first step.
    config["datasets"]["table"]["augmentation"]["flip"] = True
    (folder / "table.yaml").write_text(yaml.safe_dump(config))
    run = snakemake(folder, config="table.yaml")
    assert "expected images to shift or mirror, found rows of a table" in run.stderr


def planned_from_nothing(folder: Path, **changed: Any) -> dict[str, int]:
    """Jobs of a run that starts with nothing, with some settings laid over the tiny ones."""
    config = yaml.safe_load((ROOT / TINY).read_text()) | {"results_directory": str(folder / "results")}
    config["finetune"]["methods"] = []
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(config, changed)))
    return planned(ROOT, str(folder / "config.yaml"))


@pytest.mark.parametrize(
    ("settings", "n_statistics"),
    [
        ({"lamp": {}, "flat_nsga2": {"repair": "none"}}, 0),
        # Two methods and two scores: the statistics are collected once.
        ({"refitted": {}, "lamp": {"repair": "reconstruct"}, "global_magnitude": {"importance": "curvature"}}, 1),
        ({"lamp": {"importance": "elimination"}}, 1),
        ({"lamp": {"search_repair": "reconstruct"}}, 1),
    ],
)
def test_statistics_are_collected_where_a_method_or_a_score_needs_them(
    settings: dict[str, dict[str, Any]], n_statistics: int, tmp_path: Path
) -> None:
    jobs = planned_from_nothing(tmp_path, methods=list(settings), method_settings=settings)
    assert jobs.get("collect_statistics", 0) == n_statistics
    assert jobs["prepare_dense_network"] == 1
    assert jobs["evaluate_front"] == len(settings)


def test_each_run_has_its_own_seeds_or_those_of_all(tmp_path: Path) -> None:
    jobs = planned_from_nothing(
        tmp_path,
        seeds=[3, 4],
        networks={"other": {**yaml.safe_load((ROOT / "config.yaml").read_text())["networks"]["resnet8"]}},
        runs=[
            {"dataset": "digits", "network": "resnet8"},
            {"dataset": "digits", "network": "other", "seeds": [4, 5, 6]},
        ],
        methods=["refitted", "lamp"],
    )
    assert jobs == {
        "read_images": 1,
        "split_images": 4,  # seeds 3 to 6, of which the networks share one
        "prepare_dense_network": 5,
        "collect_statistics": 5,
        "compute_importance": 10,
        "search_thresholds": 5,
        "choose_anchors": 5,
        "search_corridor": 5,
        "sweep_allocation": 5,
        "evaluate_front": 10,
        "write_report": 1,
    }


def test_the_paper_experiment_passes_a_dry_run() -> None:
    run = snakemake(ROOT, "--dry-run", config="experiments/paper.yaml")
    assert run.returncode == 0, run.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout + run.stderr, re.MULTILINE))
    assert jobs["prepare_dense_network"] == "20"
    assert jobs["search_corridor"] == "40"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data with the CIFAR-10 sample and the checkpoints")
def test_the_resnet20_experiment_passes_a_dry_run() -> None:
    run = snakemake(ROOT, "--dry-run", "--forceall", config="experiments/cifar10-sample-resnet20.yaml")
    assert run.returncode == 0, run.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout + run.stderr, re.MULTILINE))
    assert jobs["search_thresholds"] == "2"
