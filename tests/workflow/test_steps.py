"""What every step does: log, keep to the granted threads and device, and read its inputs."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import LabelledImages, Splits, normalise
from paretoprune.importance.layer_statistics import collect_statistics, read_statistics, save_statistics
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

ARCHITECTURE = Architecture("resnet8", 3, 1, {"base_width": 2})
SETTINGS: dict[str, Any] = {
    "repair": "none",
    "repair_images": 3,
    "damping": 0.02,
    "sequential_refit": False,
    "objective": "divergence",
    "precision": "float32",
    "batch_size": 4,
    "evaluations": 7,
}


@pytest.fixture(autouse=True)
def _program_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A step is a program of its own and changes what is global; the tests put it back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    loggers = [logging.getLogger(name) for name in ("paretoprune", "py.warnings")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
    logging.captureWarnings(False)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            handler.close()
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers


def test_a_step_logs_to_its_file_and_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with step("digits: dense", str(tmp_path / "log")) as (log, device):
        log.info("half of it is done")
    assert device == torch.device("cpu")
    assert "INFO half of it is done" in (tmp_path / "log").read_text()
    captured = capsys.readouterr()
    assert captured.err == "[digits: dense] half of it is done\n"
    assert captured.out == ""


def test_a_step_uses_the_threads_it_was_granted(tmp_path: Path) -> None:
    for threads, expected in ((2, 2), (1, 1), (0, 1)):
        with step("x", str(tmp_path / "log"), threads):
            assert torch.get_num_threads() == expected


def test_a_granted_gpu_that_is_not_there_is_warned_about_and_the_cpu_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with step("x", str(tmp_path / "log"), 1, 1) as (_, device):
        assert device.type == "cpu"
    assert "WARNING a GPU was granted but torch finds none; computing on the CPU" in (tmp_path / "log").read_text()
    assert "computing on the CPU" in capsys.readouterr().err


def test_a_gpu_is_used_only_where_it_was_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, expected in ((0, "cpu"), (1, "cuda")):
        with step("x", str(tmp_path / "log"), 1, gpus) as (_, device):
            assert device.type == expected
    assert (tmp_path / "log").read_text() == ""


def test_a_mendable_error_ends_a_step_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit, match=r"^\[x\] ERROR: expected a share, found 80$"),
        step("x", str(tmp_path / "log")),
    ):
        raise ValueError("expected a share, found 80")
    assert "Traceback" in (tmp_path / "log").read_text()
    assert "Traceback" not in capsys.readouterr().err


def test_factories_in_the_folder_where_the_workflow_runs_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"steps_factory_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    with step("x", str(tmp_path / "log")):
        network = Architecture(f"{name}:build", 3, 1).build()
    assert isinstance(network, torch.nn.Linear)


def dense() -> DenseNetwork:
    return DenseNetwork(ARCHITECTURE.build(0).eval(), ARCHITECTURE, (0.5,), (0.25,), ("conv1.weight",))


def images() -> ImageSet:
    pixels = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(30) % 3, torch.zeros(30, dtype=torch.bool), ("a", "b", "c"))


def test_splits_are_read_in_the_order_asked_for_and_normalised_for_the_network(tmp_path: Path) -> None:
    images().save(tmp_path / "images")
    order = np.arange(30)
    Splits(order[:10], order[10:15], order[15:22], order[22:]).save(tmp_path / "splits.npz")
    files = str(tmp_path / "images"), str(tmp_path / "splits.npz")
    test, calibration = read_splits(*files, dense(), "test", "calibration")
    assert (len(test), len(calibration)) == (8, 5)
    assert torch.equal(test.labels, images().labels[22:])
    assert torch.equal(calibration.images, normalise(images().images[10:15], (0.5,), (0.25,)))
    assert read_splits(*files, dense()) == []


def evaluated() -> LabelledImages:
    return LabelledImages.of(images(), np.arange(20), (0.5,), (0.25,))


def test_statistics_are_read_whatever_snakemake_makes_of_their_input(tmp_path: Path) -> None:
    layout = WeightUnits.of(dense().network, ["conv1.weight"])
    collected = collect_statistics(dense().network, layout, evaluated().images, seed=0, positions=4)
    file = str(tmp_path / "statistics.safetensors")
    save_statistics(file, collected)
    for inputs in ({"statistics": file}, {"statistics": [file]}):
        found = read_statistics(inputs)
        assert found is not None
        assert found.keys() == collected.keys()
        assert all(torch.equal(found[name].curvature, collected[name].curvature) for name in collected)
    assert read_statistics({"statistics": []}) is None
    assert read_statistics({}) is None
