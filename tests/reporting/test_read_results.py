"""Result files read back: what is missing or spoilt is named before anything is written."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from paretoprune.files import write_json
from paretoprune.reporting.read_results import read_run, summarise
from paretoprune.reporting.subject import Run
from result_files import (
    ERRORS,
    FINETUNED,
    KINDS,
    MACS,
    SEEDS,
    report_on,
    write_finetuned,
    write_hand_computed,
    write_history,
    write_layers,
    write_macs,
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results tree of one run, for tests that spoil it."""
    write_hand_computed(tmp_path / "results", ERRORS, "error")
    return tmp_path / "results"


def spoil_column(folder: Path) -> None:
    path = folder / "pareto" / "front.csv"
    pd.read_csv(path).drop(columns="test_error").to_csv(path, index=False)


def spoil_share(folder: Path) -> None:
    path = folder / "pareto" / "front.csv"
    pd.read_csv(path).assign(sparsity=[50.0, 80.0]).to_csv(path, index=False)


def spoil_number(folder: Path) -> None:
    path = folder / "nsga2" / "history.csv"
    pd.read_csv(path).assign(seconds=["soon", "later"]).to_csv(path, index=False)


def spoil_stage(folder: Path) -> None:
    write_history(folder / "pareto", [(10, 1.0, 0.5, "flat")])


def spoil_order(folder: Path) -> None:
    write_history(folder / "uniform", [(10, 1.0, 0.5, "allocation"), (5, 2.0, 0.5, "allocation")])


def spoil_rows(folder: Path) -> None:
    write_history(folder / "uniform", [])


def spoil_members(folder: Path) -> None:
    write_layers(folder / "pareto", [0.5], n_layers=4)


def spoil_content(folder: Path) -> None:
    (folder / "uniform" / "front.csv").write_text("")


def spoil_anchors(folder: Path) -> None:
    path = folder / "pareto" / "anchors.json"
    content = json.loads(path.read_text())
    del content["layers"][0]["n_corridor"]
    write_json(path, content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_column, r"front\.csv: expected the columns id, .*found .* without test_error; delete"),
        (spoil_share, r"expected a share between 0 and 1 .* of column 'sparsity', found 50\.0 in row 1; delete"),
        (spoil_number, r"expected a finite number.* of column 'seconds', found soon in row 1; delete"),
        (spoil_stage, r"expected rows of stage 'phase1' for a two-phase method, found flat; delete"),
        (spoil_order, r"expected cumulative evaluations, found some that decrease; delete"),
        (spoil_rows, r"expected at least one row, found none; delete"),
        (spoil_members, r"expected the members of front\.csv beside it, found 1 that only one .*; delete"),
        (spoil_content, r"front\.csv: expected the columns .*; delete"),
        (spoil_anchors, r"anchors\.json: expected .* in every entry of 'layers', found .* without n_corridor; delete"),
    ],
)
def test_spoilt_results_are_refused_before_anything_is_written(results: Path, spoil: Any, message: str) -> None:
    spoil(results / "digits" / "resnet8" / "seed1")
    with pytest.raises(ValueError, match=message):
        report_on(results)
    assert not (results.parent / "report").exists()


@pytest.mark.parametrize(
    "name",
    [
        "dense/metrics.json",
        "uniform/front.csv",
        "nsga2/history.csv",
        "pareto/layers.csv",
        "pareto/anchors.json",
        "uniform/finetuned.csv",
    ],
)
def test_missing_file_is_named_before_anything_is_written(results: Path, name: str) -> None:
    (results / "digits" / "resnet8" / "seed1" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected the result file .*seed1/{name}, found nothing there; run"):
        report_on(results)
    assert not (results.parent / "report").exists()


def test_a_member_fine_tuned_for_several_targets_counts_for_each_of_them(results: Path) -> None:
    folder = results / "digits" / "resnet8" / "seed1" / "pareto"
    write_finetuned(folder, [("sparsity 0.5, knee", 0.5, 0.12, 0.115, 0.11)])
    run = read_run(results, Run("digits", "resnet8", tuple(SEEDS), "error"), KINDS, FINETUNED)
    pareto = run.finetuned[run.finetuned["method"] == "pareto"]
    assert sorted(zip(pareto["target"], pareto["seed"], strict=True)) == [
        ("knee", 0),
        ("knee", 1),
        ("sparsity 0.5", 0),
        ("sparsity 0.5", 1),
    ]


# Costs other than the density


def summary_of(results: Path, *costs: str) -> dict[str, dict[Hashable, Any]]:
    """Summary of the first seed by method."""
    run = read_run(results, Run("digits", "resnet8", (0,), "error", costs), KINDS, FINETUNED)
    return {row["method"]: row for row in summarise(run).to_dict("records")}


def test_hypervolumes_are_on_the_error_and_every_cost(results: Path) -> None:
    summary = summary_of(write_macs(results), "density", "macs")
    # One box, with sides to an error of 1, and a density and macs of 1.1.
    assert summary["nsga2"]["hypervolume_search"] == pytest.approx(0.5 * 0.7 * 0.6)
    # Two boxes less what they share, from the points (0.1, 0.5, 0.6) and (0.3, 0.2, 0.3).
    boxes, shared = 0.9 * 0.6 * 0.5 + 0.7 * 0.9 * 0.8, 0.7 * 0.6 * 0.5
    assert summary["pareto"]["hypervolume_search"] == pytest.approx(boxes - shared)
    boxes, shared = 0.88 * 0.6 * 0.5 + 0.72 * 0.9 * 0.8, 0.72 * 0.6 * 0.5
    assert summary["pareto"]["hypervolume_test"] == pytest.approx(boxes - shared)


def test_one_cost_may_take_the_place_of_the_density(results: Path) -> None:
    summary = summary_of(write_macs(results), "macs")
    assert summary["nsga2"]["hypervolume_search"] == pytest.approx(0.5 * (1.1 - 0.5))
    # A member that costs 1.1 times the dense network adds nothing.
    assert summary["uniform"]["hypervolume_search"] == pytest.approx(0.8 * 0.1)
    assert summary["uniform"]["sparsity_within_1pt"] == pytest.approx(0.1)


def test_a_hypervolume_over_several_costs_may_exceed_1(results: Path) -> None:
    folder = write_macs(results) / "digits" / "resnet8" / "seed0"
    write_history(folder / "nsga2", [(30, 3.0, 1.2, "flat")])
    assert len(summary_of(results, "density", "macs")) == 3
    with pytest.raises(ValueError, match=r"expected a share between 0 and 1 .* of column 'hypervolume', found 1\.2"):
        summary_of(results, "density")


def test_a_missing_cost_is_refused_before_anything_is_written(results: Path) -> None:
    with pytest.raises(ValueError, match=r"front\.csv: expected the columns .*, macs, found .* without macs; delete"):
        report_on(results, runs=[MACS])
    assert not (results.parent / "report").exists()


@pytest.mark.parametrize("wrong", ["-0.5", "much", ""])
def test_an_impossible_cost_is_refused(results: Path, wrong: str) -> None:
    path = write_macs(results) / "digits" / "resnet8" / "seed0" / "nsga2" / "front.csv"
    pd.read_csv(path).assign(macs=[wrong]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"expected a finite number, at least 0 in every row of column 'macs', found"):
        summary_of(results, "density", "macs")
