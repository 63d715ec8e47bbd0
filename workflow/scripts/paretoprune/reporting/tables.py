"""The tables of the page: cells of text, made from the tables of `read_results` and `comparison`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from paretoprune.reporting.comparison import ALL_RUNS, SIGNIFICANCE_LEVEL
from paretoprune.reporting.read_results import SPLITS, RunResults, rows_of

# Fine-tuned networks are compared only if their sparsities differ by no more than this share of the weights.
_COMPARABLE_SPARSITY = 0.01


@dataclass(frozen=True)
class Cell:
    """One cell of a table on the page.

    Attributes:
        text: What it shows.
        best: Whether it is the best of its column.
        number: Whether it is aligned as a number.
    """

    text: str
    best: bool = False
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table on the page: headings with units, and rows of cells as long as `head`."""

    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class View:
    """How a column of the summary is shown on the page.

    Attributes:
        column: Its name.
        heading: Heading with unit.
        decimals: Decimals shown.
        factor: Shown value divided by the stored one, 100 for a share in %.
        marks_best: Whether the largest mean is marked as the best; costs and details have no best.
        signed: Whether a plus sign is shown.
    """

    column: str
    heading: str
    decimals: int
    factor: float = 1
    marks_best: bool = False
    signed: bool = False


QUALITY_AND_COST = (
    View("hypervolume_test", "hypervolume, test split", 4, marks_best=True),
    View("hypervolume_search", "hypervolume, search split", 4, marks_best=True),
    View("sparsity_within_1pt", "sparsity within 1 point of dense (%)", 1, 100, marks_best=True),
    View("n_members", "members of the front", 0),
    View("evaluations", "evaluations", 0),
    View("seconds", "time (s)", 1),
)
PHASES = (
    View("hypervolume_phase1", "hypervolume after Phase 1, search split", 4),
    View("phase2_gain", "added by Phase 2", 4, signed=True),
)


def comparison_table(tests: pd.DataFrame) -> Table:
    """Every other method against the reference; adjusted p-values below the significance level are marked."""
    head = [
        "method",
        "pairs",
        "better / equal / worse",
        "median difference",
        "rank-biserial (paired)",
        "A12 (unpaired)",
        "p",
        "p, Holm",
        "note",
    ]
    rows = [
        [
            Cell(row["method"], number=False),
            Cell(str(row["n_pairs"])),
            Cell(f"{row['wins']} / {row['ties']} / {row['losses']}"),
            Cell(f"{row['median_difference']:+.4f}"),
            Cell(f"{row['rank_biserial']:+.2f}"),
            Cell(f"{row['a12']:.2f}"),
            Cell(_p_value(row["p_value"]) + ("" if row["exact"] else " (approximate)")),
            Cell(_p_value(row["p_holm"]), row["p_holm"] < SIGNIFICANCE_LEVEL),
            Cell(row["note"], number=False),
        ]
        for row in tests.to_dict("records")
    ]
    return Table(head, rows)


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def sparsities_table(sparsities: pd.DataFrame) -> Table:
    """Test error per method and least sparsity; the least is marked among methods with a member in every seed."""
    levels = list(dict.fromkeys(sparsities["at_least_sparsity"]))
    complete = sparsities[sparsities["n_found"] == sparsities["n_seeds"]]
    least = complete.groupby("at_least_sparsity")["test_error_mean"].min()
    rows = []
    for method, group in sparsities.groupby("method", sort=False):
        cells = []
        for row in group.to_dict("records"):
            text = "none"
            if row["n_found"]:
                text = f"{100 * row['test_error_mean']:.2f}"
                if row["n_found"] > 1:
                    text += f" ± {100 * row['test_error_std']:.2f}"
                text += f" ({row['points_over_dense_mean']:+.2f})"
            if 0 < row["n_found"] < row["n_seeds"]:
                text += f", {row['n_found']} of {row['n_seeds']} seeds"
            best = row["n_found"] == row["n_seeds"] and np.isclose(
                row["test_error_mean"], least[row["at_least_sparsity"]]
            )
            cells.append(Cell(text, bool(best)))
        rows.append([Cell(str(method), number=False), *cells])
    return Table(["method", *(f"≥ {100 * level:.0f} % removed" for level in levels)], rows)


def gains_table(gains: pd.DataFrame) -> Table:
    """What Phase 2 added per two-phase method, over all runs and in each."""
    head = ["method", "dataset / network", "searches", "positive in", "least", "median", "largest"]
    rows = [
        [
            Cell(str(method), number=False),
            Cell("all" if row["dataset"] == ALL_RUNS else f"{row['dataset']} / {row['network']}", number=False),
            Cell(str(row["n_searches"])),
            Cell(str(row["n_positive"])),
            *(Cell(f"{row[column]:+.4f}") for column in ("min", "median", "max")),
        ]
        for method, group in gains.groupby("method", sort=False)
        for row in group.to_dict("records")
    ]
    return Table(head, rows)


def costs_table(run: RunResults) -> Table:
    """What every member of the first seed's fronts costs, sparsest first within each method."""
    costs = ("density", *(cost for cost in run.about.costs if cost != "density"))
    head = ["method", "member", *(f"{cost} (%)" for cost in costs), "search error (%)", "test error (%)"]
    rows = [
        [
            Cell(method, number=False),
            Cell(str(member["id"]), number=False),
            *(Cell(f"{100 * member[column]:.2f}") for column in (*costs, "search_error", "test_error")),
        ]
        for method in run.kinds
        for member in rows_of(run.fronts, method, run.about.seeds[0])
        .sort_values(list(costs), kind="stable")
        .to_dict("records")
    ]
    return Table(head, rows)


def dense_table(run: RunResults) -> Table:
    """Accuracy of the dense network on every split, a row per seed."""
    head = ["seed", "source", *(f"{split} accuracy (%)" for split in SPLITS), "search split memorised"]
    rows = []
    for seed in run.about.seeds:
        metrics = run.dense[seed]
        scores = [
            Cell(f"{100 * metrics['accuracy'][split]:.2f} ({metrics['n_images'][split]:,} images)") for split in SPLITS
        ]
        memorised = "yes" if metrics["search_memorised"] else "no"
        source = Cell(str(metrics["source"]), number=False)
        rows.append([Cell(str(seed)), source, *scores, Cell(memorised, number=False)])
    return Table(head, rows)


def summary_table(summary: pd.DataFrame, methods: Sequence[str], views: Sequence[View]) -> Table:
    """Mean ± standard deviation over seeds per method; the best of each measure of quality is marked."""
    groups = {method: summary[summary["method"] == method] for method in methods}
    rows = [[Cell(method, number=False), Cell(str(len(group)))] for method, group in groups.items()]
    for view in views:
        # A method with NaN in any seed is never the best: a mean over its lucky seeds would flatter it.
        means = pd.Series([group[view.column].mean(skipna=False) for group in groups.values()], dtype=float)
        best = np.isclose(means, means.max()) & (view.marks_best and len(groups) > 1)
        for row, group, is_best in zip(rows, groups.values(), best, strict=True):
            text = _mean_std(view.factor * group[view.column], view.decimals, signed=view.signed)
            row.append(Cell(text, bool(is_best)))
    return Table(["method", "seeds", *(view.heading for view in views)], rows)


def per_seed_table(summary: pd.DataFrame) -> Table:
    """The summary, a row per seed and method."""
    head = [
        "seed",
        "method",
        "hypervolume, test split",
        "hypervolume, search split",
        "sparsity within 1 point (%)",
        "members",
        "evaluations",
        "time (s)",
    ]
    rows = [
        [
            Cell(str(row["seed"])),
            Cell(row["method"], number=False),
            Cell(f"{row['hypervolume_test']:.4f}"),
            Cell(f"{row['hypervolume_search']:.4f}"),
            Cell("none" if np.isnan(row["sparsity_within_1pt"]) else f"{100 * row['sparsity_within_1pt']:.1f}"),
            Cell(f"{row['n_members']:,}"),
            Cell(f"{row['evaluations']:,}"),
            Cell(f"{row['seconds']:,.1f}"),
        ]
        for row in summary.to_dict("records")
    ]
    return Table(head, rows)


def finetuned_table(run: RunResults) -> Table:
    """Mean ± standard deviation over seeds per target and method; the best is marked if sparsities are comparable."""
    head = [
        "target",
        "method",
        "seeds",
        "sparsity (%)",
        "test error before (%)",
        "test error after (%)",
        "after − dense (points)",
    ]
    rows = []
    finetuned = run.finetuned.assign(excess=run.finetuned["test_error"] - run.finetuned["dense_test_error"])
    for target, group in finetuned.groupby("target", sort=False):
        groups = [(method, group[group["method"] == method]) for method in run.kinds]
        groups = [(method, members) for method, members in groups if len(members)]
        sparsity = [members["sparsity"].mean() for _, members in groups]
        errors = [members["test_error"].mean() for _, members in groups]
        all_seeds = all(len(members) == len(run.about.seeds) for _, members in groups)
        comparable = len(groups) > 1 and all_seeds and max(sparsity) - min(sparsity) <= _COMPARABLE_SPARSITY
        for (method, members), error in zip(groups, errors, strict=True):
            rows.append(
                [
                    Cell(str(target), number=False),
                    Cell(method, number=False),
                    Cell(str(len(members))),
                    Cell(_mean_std(100 * members["sparsity"], 1)),
                    Cell(_mean_std(100 * members["test_error_pruned"], 2)),
                    Cell(
                        _mean_std(100 * members["test_error"], 2), comparable and bool(np.isclose(error, min(errors)))
                    ),
                    Cell(_mean_std(100 * members["excess"], 2, signed=True)),
                ]
            )
    return Table(head, rows)


def _mean_std(values: pd.Series, decimals: int, *, signed: bool = False) -> str:
    """Mean ± sample standard deviation of the values that are not NaN, and their number if some are NaN."""
    found = values.dropna().astype(float)
    if not len(found):
        return "none"
    text = f"{found.mean():{'+' if signed else ''},.{decimals}f}"
    if len(found) > 1:
        text += f" ± {found.std():,.{decimals}f}"
    if len(found) < len(values):
        text += f" ({len(found)} of {len(values)} seeds)"
    return text
