"""The report: summary.csv against hand-computed numbers, figures and page, and errors before anything is written."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from paretoprune.files import write_json
from paretoprune.reporting import report as report_module
from paretoprune.reporting.comparison import COMPARISON_COLUMNS
from paretoprune.reporting.read_results import SUMMARY_COLUMNS
from result_files import (
    DIVERGENCE,
    ERRORS,
    KINDS,
    MACS,
    SEEDS,
    report_on,
    settings,
    write_anchors,
    write_dense,
    write_front,
    write_hand_computed,
    write_history,
    write_layers,
    write_macs,
)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results tree of one run, for tests that spoil it."""
    write_hand_computed(tmp_path / "results", ERRORS, "error")
    return tmp_path / "results"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the run of `results`, for tests that only read it."""
    root = tmp_path_factory.mktemp("single")
    write_hand_computed(root / "results", ERRORS, "error")
    return report_on(root / "results")


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the first seed of that run."""
    root = tmp_path_factory.mktemp("one_seed")
    write_hand_computed(root / "results", ERRORS, "error")
    return report_on(root / "results", seeds=[0])


@pytest.fixture(scope="module")
def one_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on one method of that run."""
    root = tmp_path_factory.mktemp("one_method")
    write_hand_computed(root / "results", ERRORS, "error")
    return report_on(root / "results", ["pareto"])


@pytest.fixture(scope="module")
def no_members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on that run where `nsga2` found nothing in any seed."""
    root = tmp_path_factory.mktemp("no_members")
    write_hand_computed(root / "results", ERRORS, "error")
    for seed in SEEDS:
        write_front(root / "results" / "digits" / "resnet8" / f"seed{seed}" / "nsga2", [])
    return report_on(root / "results")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and not rendered: for tests of the page's text, whose figures others render."""
    monkeypatch.setattr(report_module, "save_figure", lambda *_: None)


COMPARISON_FIGURES = {"comparison-differences", "comparison-attainment", "comparison-hypervolume"}
COMPARED_SEEDS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on three methods, two runs and four seeds; `nsga2` is the reference and loses to `pareto`.

    On test images `nsga2` is ahead of `uniform` in every pair, and on the search split in all but one.
    """
    root = tmp_path_factory.mktemp("compared")
    for run, network in enumerate((ERRORS, DIVERGENCE)):
        for seed in COMPARED_SEEDS:
            folder = root / "results" / network["dataset"] / network["network"] / f"seed{seed}"
            write_dense(folder, network, seed, accuracy=0.9, objective=network["objective"])
            step = 0.001 * (1 + seed + 4 * run)
            upset = 0.2 if (run, seed) == (1, 3) else 0.0
            for method, behind in (("pareto", 0.0), ("nsga2", 10 * step), ("uniform", 30 * step)):
                search = behind - upset if method == "uniform" else behind
                write_front(
                    folder / method,
                    [("phase1", 0.5, 0.3 + search, 0.12 + behind), ("phase2", 0.1, 0.5 + search, 0.2 + behind)],
                )
                write_history(
                    folder / method,
                    [(20 + seed, 1.0, 0.4 - behind, "phase1"), (40, 2.0, 0.4 - behind + step, "phase2")],
                )
            write_layers(folder / "pareto", [0.5, 0.1], n_layers=4)
            write_anchors(folder / "pareto", n_layers=4)
    names = settings(finetuned=[]) | {"reference": "nsga2"}
    return report_on(root / "results", runs=[ERRORS, DIVERGENCE], seeds=COMPARED_SEEDS, settings=names)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on two runs, the second with the divergence as objective."""
    root = tmp_path_factory.mktemp("report")
    write_hand_computed(root / "results", ERRORS, "error")
    write_hand_computed(root / "results", DIVERGENCE, "divergence")
    return report_on(root / "results", runs=[ERRORS, DIVERGENCE])


def summary_rows(output: Path) -> list[dict[str, str]]:
    with (output / "summary.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def summary_row(output: Path, method: str, seed: int = 0) -> dict[str, str]:
    """The row of one method on the run whose objective is the error."""
    (row,) = [
        row
        for row in summary_rows(output)
        if (row["dataset"], row["seed"], row["method"]) == ("digits", str(seed), method)
    ]
    return row


def test_summary_has_the_documented_columns_and_rows(report: Path) -> None:
    rows = summary_rows(report)
    assert tuple(rows[0]) == SUMMARY_COLUMNS
    places = [(row["dataset"], row["network"], row["seed"], row["method"]) for row in rows]
    assert places == [
        (run["dataset"], run["network"], str(seed), method)
        for run in (ERRORS, DIVERGENCE)
        for seed in SEEDS
        for method in KINDS
    ]
    assert [row["objective"] for row in rows] == ["error"] * 6 + ["divergence"] * 6


@pytest.mark.parametrize(
    ("method", "column", "expected"),
    [
        # Two boxes: (1 - 0.1)(1 - 0.5) + (1 - 0.3)(0.5 - 0.2), and the same with the test errors 0.12 and 0.28.
        ("pareto", "hypervolume_search", 0.66),
        ("pareto", "hypervolume_test", 0.656),
        ("pareto", "evaluations", 60),
        ("pareto", "seconds", 6.5),
        ("pareto", "n_members", 2),
        ("pareto", "hypervolume_phase1", 0.6),
        ("pareto", "phase2_gain", 0.06),
        # The dense error is 0.11, so a test error of 0.12 is one point above it exactly, and allowed.
        ("pareto", "sparsity_within_1pt", 0.5),
        ("nsga2", "hypervolume_search", 0.5 * 0.6),
        ("nsga2", "evaluations", 60),
        ("nsga2", "seconds", 6.0),
        # The dense member lies on the reference line and adds nothing: (1 - 0.2)(1 - 0.9).
        ("uniform", "hypervolume_search", 0.08),
        ("uniform", "hypervolume_test", 0.89 * 0.1),
        ("uniform", "sparsity_within_1pt", 0.1),
    ],
)
def test_summary_hand_computed(report: Path, method: str, column: str, expected: float) -> None:
    assert float(summary_row(report, method)[column]) == pytest.approx(expected, abs=1e-12)


def test_summary_is_empty_where_nothing_qualifies(report: Path) -> None:
    assert summary_row(report, "nsga2")["sparsity_within_1pt"] == ""
    # Seed 1's dense error is 0.10: a test error of 0.12 is two points more.
    assert summary_row(report, "pareto", seed=1)["sparsity_within_1pt"] == ""
    for method in ("nsga2", "uniform"):
        assert summary_row(report, method)["hypervolume_phase1"] == ""
        assert summary_row(report, method)["phase2_gain"] == ""


def test_front_without_members_counts_as_nothing(no_members: Path) -> None:
    row = summary_row(no_members, "nsga2")
    assert float(row["hypervolume_search"]) == 0.0
    assert row["sparsity_within_1pt"] == ""
    assert row["n_members"] == "0"
    assert (no_members / "figures" / "digits-resnet8-fronts.svg").is_file()


def test_figures_are_written_and_not_trivial(report: Path) -> None:
    kinds = ("fronts", "hypervolume", "phase2", "stages", "layers", "corridor", "finetuned")
    expected = {f"{run['dataset']}-{run['network']}-{kind}" for run in (ERRORS, DIVERGENCE) for kind in kinds}
    expected |= COMPARISON_FIGURES
    assert {path.stem for path in (report / "figures").iterdir()} == expected
    for name in expected:
        svg = (report / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")
        assert len(svg) > 10_000
        png = (report / "figures" / f"{name}.png").read_bytes()
        assert png.startswith(PNG_MAGIC)
        assert len(png) > 10_000


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_results_give_equal_files_and_leave_matplotlib_as_it_was(results: Path, single: Path) -> None:
    before = dict(mpl.rcParams)
    assert contents(report_on(results)) == contents(single)
    assert dict(mpl.rcParams) == before, "drawing leaves matplotlib as it was"


def test_page_shows_the_tables(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    # Mean over seeds of equal fronts, so the standard deviation is 0.
    assert "0.6560 ± 0.0000" in cells
    assert "0.0890 ± 0.0000" in cells
    assert "+0.0600 ± 0.0000" in cells
    assert "50.0 (1 of 2 seeds)" in cells
    # Fine-tuning: after, and its distance from the dense network in points.
    assert "11.50 ± 0.00" in cells
    assert "+0.50 ± 0.00" in cells
    assert "89.00 (1,017 images)" in cells
    for heading in ("method", "time (s)", "sparsity (%)", "test error after (%)", "after − dense (points)"):
        assert f">{heading}</th>" in page


def test_page_gives_sparsity_over_all_parameters_too(report: Path) -> None:
    page = " ".join((report / "index.html").read_text(encoding="utf-8").split())
    # 26,800 of 27,500 are 97.45 %, and nine tenths of that 87.7 %.
    assert "26,800 of 27,500 parameters can be pruned, 97.5 %: a sparsity of 90 % removes 87.7 % of all" in page


def test_page_marks_the_best_of_a_column(report: Path) -> None:
    _, page = (report / "index.html").read_text(encoding="utf-8").split('<section id="digits-resnet8">')
    best = re.findall(r'<td class="number best">(.*?)</td>', page)
    # Per run: two hypervolumes, the sparsity of the one method that qualifies in every seed, and
    # the one fine-tuned target whose sparsities can be compared.
    expected = ["0.6560 ± 0.0000", "0.6600 ± 0.0000", "10.0 ± 0.0", "11.50 ± 0.00"]
    assert sorted(best) == sorted(2 * expected)


def test_page_is_complete_and_self_contained(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 17
    for image in images:
        assert re.search(r'alt="[^"]{20,}"', image)
        source = re.search(r'src="([^"]+)"', image)
        assert source is not None
        assert (report / source[1]).is_file()
    assert "<script" not in page
    assert "http" not in page


@pytest.mark.usefixtures("undrawn")
def test_page_lists_what_members_cost_where_that_is_more_than_density(results: Path, single: Path) -> None:
    page = (report_on(write_macs(results), runs=[MACS]) / "index.html").read_text(encoding="utf-8")
    plain = (single / "index.html").read_text(encoding="utf-8")
    assert ">macs (%)</th>" in page
    assert '<td class="number">110.00</td>' in page
    for words in ("What the members cost", "error, costs: density, macs", "<dt>cost</dt>", "between 0 and 1.21."):
        assert words in page
        assert words not in plain
    assert "hypervolumes lie between 0 and 1." in plain


def test_page_warns_that_a_divergence_is_no_error(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    first, second = page.split('<section id="cifar10-resnet20">')
    warning = "Here search_error is not a top-1 error."
    assert warning in second
    assert "memorised" in second
    assert warning not in first


@pytest.mark.usefixtures("undrawn")
def test_page_warns_of_a_memorised_split_with_errors(results: Path) -> None:
    path = results / "digits" / "resnet8" / "seed1" / "dense" / "metrics.json"
    write_json(path, {**json.loads(path.read_text()), "search_memorised": True})
    page = (report_on(results) / "index.html").read_text(encoding="utf-8")
    assert "The search split was memorised by the dense network" in page
    assert "(seed 1)" in page


def test_figures_with_nothing_to_show_are_left_out(results: Path) -> None:
    output = report_on(results, ["nsga2", "uniform"], settings=settings(finetuned=[]))
    assert {path.stem for path in (output / "figures").iterdir()} == {
        "digits-resnet8-fronts",
        "digits-resnet8-hypervolume",
        *COMPARISON_FIGURES,
    }
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "Progress of the search" in page
    for heading in ("What Phase 2 added", "The corridor", "After fine-tuning", "Which layers are pruned"):
        assert f"<h3>{heading}</h3>" not in page


def test_one_seed_has_no_deviation(one_seed: Path) -> None:
    page = (one_seed / "index.html").read_text(encoding="utf-8")
    assert '<td class="number best">0.6560</td>' in page


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_seeds_of_its_own_is_read_with_these(results: Path, report: Path) -> None:
    write_hand_computed(results, DIVERGENCE, "divergence")
    output = report_on(results, runs=[ERRORS | {"seeds": [1]}, DIVERGENCE])
    found = {(row["dataset"], row["seed"]) for row in summary_rows(output)}
    assert found == {("digits", "1"), ("cifar10", "0"), ("cifar10", "1")}
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "<small>1 and 2 seeds</small>" in page
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "<small>2 seeds each (0, 1)</small>" in page


def test_names_are_escaped(results: Path) -> None:
    for seed in SEEDS:
        folder = results / "digits" / "resnet8" / f"seed{seed}"
        shutil.copytree(folder / "nsga2", folder / "a<b")
    page = (report_on(results, ["a<b"], settings=settings({"a<b": "flat"}, [])) / "index.html").read_text(
        encoding="utf-8"
    )
    assert "a&lt;b" in page
    assert "a<b" not in page


def test_failed_page_leaves_the_old_one(results: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = shutil.copytree(single, results.parent / "report")
    before = (output / "index.html").read_bytes()

    def fail(*_: Any) -> Iterator[None]:
        raise OSError("disk full")

    monkeypatch.setattr(report_module, "save_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        report_on(results)
    assert (output / "index.html").read_bytes() == before
    assert not list(output.glob(".*"))


def test_figures_need_no_torch() -> None:
    code = (
        "import sys; import paretoprune.reporting.report; "
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    scripts = Path(__file__).parents[2] / "workflow" / "scripts"
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# The comparison over runs and seeds


def table_by(path: Path, *keys: str) -> dict[Any, dict[str, Any]]:
    """Rows of a CSV file by what they hold under `keys`."""
    records = pd.read_csv(path, keep_default_na=False).to_dict("records")
    return {tuple(row[key] for key in keys): {str(name): value for name, value in row.items()} for row in records}


def test_comparison_hand_computed(compared: Path) -> None:
    tests = table_by(compared / "comparison.csv", "measure", "method")
    assert {tuple(row) for row in tests.values()} == {COMPARISON_COLUMNS}
    assert {row["reference"] for row in tests.values()} == {"nsga2"}
    pareto, uniform = (tests["hypervolume_test", method] for method in ("pareto", "uniform"))
    assert (pareto["wins"], pareto["ties"], pareto["losses"]) == (0, 0, 8)
    assert (uniform["wins"], uniform["ties"], uniform["losses"]) == (8, 0, 0)
    # An error that is larger by e takes e x (1 - density of the sparsest member) of area; e is 0.01 to 0.08.
    assert pareto["median_difference"] == pytest.approx(-0.9 * 0.045)
    assert pareto["p_value"] == pytest.approx(2 / 2**8)
    assert pareto["p_holm"] == pytest.approx(4 / 2**8)
    assert (pareto["rank_biserial"], pareto["note"]) == (-1.0, "")
    search = tests["hypervolume_search", "uniform"]
    assert (search["wins"], search["losses"]) == (7, 1)
    # The one loss, 0.16 - 0.2, is as large as the second smallest win: they share the ranks 2 and 3 of 8.
    assert search["rank_biserial"] == pytest.approx((36 - 2 * 2.5) / 36)


def test_sparsities_and_gains_hand_computed(compared: Path) -> None:
    sparsities = table_by(compared / "sparsities.csv", "dataset", "method", "at_least_sparsity")
    half = sparsities["digits", "nsga2", 0.5]
    assert float(half["test_error_mean"]) == pytest.approx(0.12 + 0.025)
    assert float(half["points_over_dense_mean"]) == pytest.approx(4.5)
    assert float(sparsities["cifar10", "pareto", 0.8]["test_error_mean"]) == pytest.approx(0.2)
    assert sparsities["digits", "pareto", 0.95]["n_found"] == 0
    gains = pd.read_csv(compared / "phase2_gain.csv")
    assert list(gains["method"]) == ["pareto"] * 3
    assert list(gains["n_searches"]) == [8, 4, 4]
    np.testing.assert_allclose(gains["min"], [0.001, 0.001, 0.005])
    np.testing.assert_allclose(gains["median"], [0.0045, 0.0025, 0.0065])
    np.testing.assert_allclose(gains["max"], [0.008, 0.004, 0.008])


def test_page_shows_the_comparison(compared: Path) -> None:
    page = (compared / "index.html").read_text(encoding="utf-8")
    assert '<a href="#comparison">Comparison</a>' in page
    section, _ = page.split('<section id="comparison">')[1].split("</section>", 1)
    assert "Every method against <strong>nsga2</strong>" in section
    text = " ".join(re.sub(r"<[^>]+>", "", section).split())
    assert "a larger hypervolume on the test split than 1 of the other methods and a smaller one than 1 (p" in text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section)
    assert "0 / 0 / 8" in cells
    assert "-0.0405" in cells
    assert "+0.0045" in cells
    assert "none" in cells
    assert re.findall(r'<td class="number best">(0\.\d+)</td>', section)[:2] == ["0.0156", "0.0156"]
    assert {path.stem for path in (compared / "figures").iterdir()} >= COMPARISON_FIGURES
    for name in COMPARISON_FIGURES:
        assert f'src="figures/{name}.svg"' in section
        assert (compared / "figures" / f"{name}.png").read_bytes().startswith(PNG_MAGIC)


def test_the_first_method_is_the_reference_unless_another_is_named(single: Path, compared: Path) -> None:
    assert set(pd.read_csv(single / "comparison.csv")["reference"]) == {"pareto"}
    assert set(pd.read_csv(compared / "comparison.csv")["method"]) == {"pareto", "uniform"}


@pytest.mark.parametrize(("name", "n_methods"), [("one_seed", len(KINDS)), ("one_method", 1)])
def test_one_pair_or_one_method_is_no_comparison(name: str, n_methods: int, request: pytest.FixtureRequest) -> None:
    output: Path = request.getfixturevalue(name)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "<h2>Comparison</h2>" not in page
    assert "#comparison" not in page
    assert not any(path.stem.startswith("comparison") for path in (output / "figures").iterdir())
    # The tables are outputs of the workflow and always there, if only with their heads.
    assert tuple(pd.read_csv(output / "comparison.csv").columns) == COMPARISON_COLUMNS
    assert len(pd.read_csv(output / "sparsities.csv")) == 6 * n_methods
    assert len(pd.read_csv(output / "phase2_gain.csv")) == 2


def test_a_method_without_members_is_compared_all_the_same(no_members: Path) -> None:
    tests = table_by(no_members / "comparison.csv", "measure", "method")
    assert tests["hypervolume_test", "nsga2"]["median_difference"] == pytest.approx(0.656)
