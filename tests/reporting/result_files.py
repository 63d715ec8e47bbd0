"""Small trees of result files for the tests of the report, and the report on them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from paretoprune.deployment.latency import Checked, LatencyTable
from paretoprune.deployment.machines import Machine
from paretoprune.files import write_csv, write_json
from paretoprune.reporting.report import write_report
from paretoprune.reporting.subject import Subject

SEEDS = [0, 1]
KINDS = {"pareto": "two_phase", "nsga2": "flat", "uniform": "allocation"}
FINETUNED = ["pareto", "uniform"]
ERRORS = {"dataset": "digits", "network": "resnet8", "objective": "error"}
MACS: dict[str, Any] = ERRORS | {"costs": ["density", "macs"]}
DIVERGENCE = {"dataset": "cifar10", "network": "resnet20", "objective": "divergence"}

FRONT = ("id", "stage", "density", "sparsity", "search_error", "test_error")
HISTORY = ("generation", "evaluations", "seconds", "hypervolume", "stage")
LAYERS = ("id", "layer", "n_weights", "n_kept")
FINETUNED_COLUMNS = (
    "id",
    "target",
    "density",
    "sparsity",
    "search_top1_error",
    "test_error_pruned",
    "test_error",
    "dense_test_error",
)


def write_dense(folder: Path, run: Mapping[str, str], seed: int, *, accuracy: float, objective: str) -> None:
    splits = ("train", "calibration", "search", "test")
    memorised = objective == "divergence"
    metrics = {
        **run,
        "seed": seed,
        "accuracy": {split: 1.0 if memorised and split != "test" else accuracy for split in splits},
        "n_images": dict(zip(splits, (4000, 500, 1000, 1017), strict=True)),
        "n_prunable": 26_800,
        "n_parameters": 27_500,
        "n_classes": 10,
        "search_memorised": memorised,
        "source": "published checkpoint" if memorised else "trained",
    }
    write_json(folder / "dense" / "metrics.json", metrics)


def write_front(folder: Path, members: Sequence[tuple[str, float, float, float]]) -> None:
    """Members as (stage, density, search error, test error)."""
    rows = [
        dict(zip(FRONT, (i, stage, density, 1 - density, search, test), strict=True))
        for i, (stage, density, search, test) in enumerate(members)
    ]
    write_csv(folder / "front.csv", rows, FRONT)


def write_history(folder: Path, rows: Sequence[tuple[int, float, float, str]]) -> None:
    """Rows as (evaluations, seconds, hypervolume, stage)."""
    write_csv(
        folder / "history.csv", [dict(zip(HISTORY, (i, *row), strict=True)) for i, row in enumerate(rows)], HISTORY
    )


def write_layers(folder: Path, densities: Sequence[float], n_layers: int) -> None:
    rows = []
    for i, density in enumerate(densities):
        for layer in range(n_layers):
            n_weights = 144 * 4 ** (3 * layer // n_layers)
            share = min(1.0, density * (1.6 - layer / n_layers))
            name = "conv1.weight" if layer == 0 else f"layer{1 + 3 * layer // n_layers}.{layer}.conv1.weight"
            rows.append({"id": i, "layer": name, "n_weights": n_weights, "n_kept": round(n_weights * share)})
    write_csv(folder / "layers.csv", rows, LAYERS)


def write_anchors(folder: Path, n_layers: int) -> None:
    layers: list[dict[str, Any]] = []
    with (folder / "layers.csv").open(newline="") as handle:
        sizes = [(row["layer"], int(row["n_weights"])) for row in csv.DictReader(handle) if row["id"] == "0"]
    for i, (name, n_weights) in enumerate(sizes):
        kept, dropped = int(0.1 * n_weights), int((0.3 + 0.4 * i / n_layers) * n_weights)
        counts = {"n_always_kept": kept, "n_corridor": n_weights - kept - dropped, "n_always_dropped": dropped}
        layers.append({"layer": name, "n_weights": n_weights, **counts})
    content = {
        "light": {"id": 0, "density": 0.4, "error": 0.12},
        "heavy": {"id": 1, "density": 0.1, "error": 0.4},
        "n_weights": sum(layer["n_weights"] for layer in layers),
        "n_corridor": sum(layer["n_corridor"] for layer in layers),
        "layers": layers,
    }
    write_json(folder / "anchors.json", content)


def write_finetuned(folder: Path, rows: Sequence[tuple[str, float, float, float, float]]) -> None:
    """Rows as (target, density, test error pruned, test error, dense test error)."""
    contents = [
        dict(zip(FINETUNED_COLUMNS, (i, target, density, 1 - density, 0.1, before, after, dense), strict=True))
        for i, (target, density, before, after, dense) in enumerate(rows)
    ]
    write_csv(folder / "finetuned.csv", contents, FINETUNED_COLUMNS)


def write_hand_computed(root: Path, run: Mapping[str, str], objective: str) -> None:
    """The small tree whose summary is computed by hand in `test_summary_hand_computed`."""
    for seed in SEEDS:
        folder = root / run["dataset"] / run["network"] / f"seed{seed}"
        write_dense(folder, run, seed, accuracy=0.89 + 0.01 * seed, objective=objective)
        write_front(folder / "pareto", [("phase1", 0.5, 0.1, 0.12), ("phase2", 0.2, 0.3, 0.28)])
        write_history(
            folder / "pareto",
            [(10, 1.0, 0.5, "phase1"), (20, 2.0, 0.6, "phase1"), (40, 4.5, 0.63, "phase2"), (60, 6.5, 0.66, "phase2")],
        )
        write_layers(folder / "pareto", [0.5, 0.2], n_layers=4)
        write_anchors(folder / "pareto", n_layers=4)
        write_front(folder / "nsga2", [("flat", 0.4, 0.5, 0.5)])
        write_history(folder / "nsga2", [(30, 3.0, 0.2, "flat"), (60, 6.0, 0.3, "flat")])
        write_front(folder / "uniform", [("allocation", 1.0, 0.1, 0.1), ("allocation", 0.9, 0.2, 0.11)])
        write_history(folder / "uniform", [(2, 0.25, 0.08, "allocation")])
        write_finetuned(folder / "pareto", [("sparsity 0.5", 0.5, 0.12, 0.115, 0.11), ("knee", 0.2, 0.28, 0.15, 0.11)])
        write_finetuned(folder / "uniform", [("sparsity 0.5", 0.505, 0.3, 0.2, 0.11)])


def write_macs(root: Path) -> Path:
    """Give every member of the hand-computed tree macs: 0.1 more than its density, up to 1.1."""
    for path in root.rglob("front.csv"):
        front = pd.read_csv(path)
        front.assign(macs=(front["density"] + 0.1).round(6)).to_csv(path, index=False)
    return root


LATENCY = ("id", "macs", "predicted", "measured", "uncertainty", "spread", "milliseconds", "bytes")


def write_latency(folder: Path, rows: Sequence[tuple[Any, ...]]) -> None:
    """Rows as (id, macs, predicted, measured, uncertainty); the dense network, with the id `dense`, takes 2 ms."""
    contents = [dict(zip(LATENCY, (*row, 0.05, 2 * row[3], 4000 * row[1]), strict=True)) for row in rows]
    write_csv(folder / "latency.csv", contents, LATENCY)


def write_latency_table(folder: Path, *, uncertainty: float = 0.01) -> None:
    """A table of one layer that was tried on four networks, of which it predicted three well."""
    machine = Machine("a processor avx2", 2, "cpu", "onnxruntime", "1.30.0", 1, 1)
    checked = Checked((0.5, 0.63, 0.8, 0.96), (0.5, 0.6, 0.8, 0.8), 0.01)
    times: dict[str, dict[tuple[int, ...], float]] = {"one": {(8,): 1.0, (16,): 2.0}}
    table = LatencyTable(machine, times, uncertainty=uncertainty, bound=0.02, checked=checked)
    table.save(folder / "latency.json")


def settings(kinds: Mapping[str, str] = KINDS, finetuned: Sequence[str] = tuple(FINETUNED)) -> dict[str, Any]:
    return {"method_kinds": dict(kinds), "finetuned_methods": list(finetuned)}


def report_on(results: Path, methods: Sequence[str] = tuple(KINDS), **changes: Any) -> Path:
    """Write the report on some results beside them, as the workflow's script does, and return its folder."""
    output = results.parent / "report"
    arguments = {"runs": [ERRORS], "seeds": SEEDS, "settings": settings(), **changes}
    write_report(results, Subject.of(methods=list(methods), **arguments), output)
    return output
