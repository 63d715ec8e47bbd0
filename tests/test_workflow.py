"""The workflow as a user runs it: snakemake in a copy of the repository."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.workflow

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SEED = Path("results/digits/resnet8/seed3")
TINY = "tests/tiny.yaml"


def copy_repository(target: Path) -> Path:
    """The files that git knows or would add, as a clone would have them."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file in files:
        if (ROOT / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file)
    return target


def snakemake(folder: Path, *arguments: str, config: str | None = TINY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
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
    assert {path.stem for path in (seed / "importance").iterdir()} == {"magnitude", "lamp", "fisher"}
    for method in ("two_phase_nsga2", "two_phase_moead", "flat_nsga2", "global_magnitude"):
        front = rows(seed / method / "front.csv")
        assert {"id", "stage", "density", "sparsity", "search_error", "test_error"} <= set(front[0])
        assert 1 <= len(front) <= 8
        assert (seed / method / "masks.npz").is_file()
        history = rows(seed / method / "history.csv")
        assert {"generation", "evaluations", "seconds", "hypervolume"} <= set(history[0])
        assert int(history[-1]["evaluations"]) == (6 if method == "global_magnitude" else 48)
    finetuned = rows(seed / "two_phase_moead/finetuned.csv")
    assert "sparsity 0.5" in finetuned[0]["target"]
    members = {f"member{row['id']}.safetensors" for row in finetuned}
    assert {path.name for path in (seed / "two_phase_moead/finetuned").glob("*.safetensors")} == members
    summary = rows(finished / "results/report/summary.csv")
    assert [row["method"] for row in summary] == [
        "two_phase_nsga2",
        "two_phase_moead",
        "flat_nsga2",
        "global_magnitude",
    ]
    assert {"hypervolume_search", "hypervolume_test", "sparsity_within_1pt", "evaluations", "seconds"} <= set(
        summary[0]
    )
    assert "two_phase_moead" in (finished / "results/report/index.html").read_text()


def test_each_front_is_at_least_as_good_as_its_starting_allocations(finished: Path) -> None:
    for method in ("two_phase_nsga2", "two_phase_moead"):
        history = rows(finished / SEED / method / "history.csv")
        volumes = [float(row["hypervolume"]) for row in history]
        assert volumes == sorted(volumes)
        assert history[0]["stage"] == "start"
        assert {row["stage"] for row in history} == {"start", "phase1", "phase2"}


def test_a_second_run_finds_nothing_to_do(finished: Path) -> None:
    assert planned(finished) == {}


def test_touching_a_module_without_changing_it_reruns_nothing(copy_of_finished: Path) -> None:
    (copy_of_finished / "workflow/scripts/paretoprune/evaluation.py").touch()
    assert planned(copy_of_finished) == {}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("finetuning", {"finetune_members": 1, "write_report": 1}),
        ("plots", {"write_report": 1}),
        (
            "operators",
            {
                "search_thresholds": 1,
                "choose_anchors": 2,
                "search_corridor": 2,
                "search_flat": 1,
                "sweep_allocation": 1,
                "evaluate_front": 4,
                "finetune_members": 1,
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
    config["method_settings"] = {"flat_nsga2": {"flat": {"flip_rate": 0.5}}}
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(copy_of_finished, "changed.yaml") == {"search_flat": 1, "evaluate_front": 1, "write_report": 1}


def test_changing_the_fine_tuning_reruns_no_search(copy_of_finished: Path) -> None:
    config = yaml.safe_load((copy_of_finished / TINY).read_text())
    config["finetune"]["epochs"] = 2
    (copy_of_finished / "changed.yaml").write_text(yaml.safe_dump(config))
    assert planned(copy_of_finished, "changed.yaml") == {"finetune_members": 1, "write_report": 1}


def test_figures_are_drawn_from_small_files_alone_and_never_by_training(finished: Path, tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "clone")
    for file in finished.glob("results/digits/**/*"):
        if file.suffix in (".csv", ".json") and "phase1" not in file.name:
            target = folder / file.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    run = snakemake(folder, "figures", "--workflow-profile", "profiles/figures")
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
    (folder / "data/my-images/train/cat/notes.txt").write_text("not an image")
    run = snakemake(folder, config="experiments/my-network.yaml")
    assert run.returncode != 0
    assert "1 files in 'data/my-images' are no readable images" in run.stderr
    assert "notes.txt" in run.stderr
    assert not list((folder / "results").glob("**/*.safetensors"))


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
