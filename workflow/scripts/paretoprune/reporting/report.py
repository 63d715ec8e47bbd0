"""The report: its tables as CSV files, the figures and one page, index.html, from result files alone.

Everything is read and checked before anything is written, and nothing is recomputed that needs a network.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from paretoprune import __version__
from paretoprune.files import atomic_path
from paretoprune.reporting import comparison_plots, run_plots
from paretoprune.reporting.attainment import attainment_surfaces, hypervolume_bands
from paretoprune.reporting.comparison import (
    ALL_RUNS,
    MEASURES,
    SIGNIFICANCE,
    compare_methods,
    errors_at_sparsities,
    leading_methods,
    paired_differences,
    phase2_gains,
)
from paretoprune.reporting.figures import save_figure
from paretoprune.reporting.read_results import SPLITS, RunResults, method_kinds, read_run, summarise
from paretoprune.reporting.styles import MOST_SHOWN, MethodStyle, comparison_styles, figure_style, method_styles

# Fine-tuned networks are compared only where all of them removed about the same share of the weights.
_COMPARABLE_SPARSITY = 0.01
_ERROR_LABELS = {
    "error": "search error (%)",
    "divergence": "divergence from the dense network,\n1 − exp(−KL) (%)",
}
_MEASURE_TITLES = {"hypervolume_test": "Hypervolume, test split", "hypervolume_search": "Hypervolume, search split"}
# Points of the evaluation axis at which bands over seeds are drawn.
_BAND_STEPS = 400


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
        factor: From the stored to the shown unit.
        contest: Whether it measures quality, larger is better; costs and details have no best.
        signed: Whether a plus sign is shown.
    """

    column: str
    heading: str
    decimals: int
    factor: float = 1
    contest: bool = False
    signed: bool = False


_QUALITY_AND_COST = (
    View("hypervolume_test", "hypervolume, test split", 4, contest=True),
    View("hypervolume_search", "hypervolume, search split", 4, contest=True),
    View("sparsity_within_1pt", "sparsity within 1 point of dense (%)", 1, 100, contest=True),
    View("n_members", "members of the front", 0),
    View("evaluations", "evaluations", 0),
    View("seconds", "time (s)", 1),
)
_PHASES = (
    View("hypervolume_phase1", "hypervolume after Phase 1, search split", 4),
    View("phase2_gain", "added by Phase 2", 4, signed=True),
)


def write_report(
    results: Path,
    runs: list[dict[str, Any]],
    seeds: list[int],
    methods: list[str],
    output: Path,
    settings: dict[str, Any],
) -> None:
    """Write summary.csv, comparison.csv, sparsities.csv, phase2_gain.csv, figures/*.svg and *.png, last index.html.

    Args:
        results: Folder that holds {dataset}/{network}/seed{seed}/.
        runs: `dataset`, `network` and `objective` of each run, in the order of the page, and `seeds` of those that have
            their own.
        seeds: Seeds of every other run.
        methods: Methods of every run, in the order of tables and legends.
        output: Folder of the report.
        settings: `method_kinds`, "two_phase", "flat" or "allocation" per method; `finetuned_methods`, the methods
            that have a finetuned.csv; and `reference`, the method that the others are tested against, the first where
            it is missing or None.

    Raises:
        FileNotFoundError: A result file is missing; nothing was written.
        ValueError: A result file lacks a column or holds something impossible, or the reference is not among the
            methods; nothing was written.
    """
    results, output = Path(results), Path(output)
    for name, wanted in (("runs", runs), ("seeds", seeds), ("methods", methods)):
        if not wanted:
            raise ValueError(f"expected at least one of {name}, found none; name what the report is about")
    kinds = method_kinds(methods, settings["method_kinds"])
    finetuned = settings["finetuned_methods"]
    reference = settings.get("reference") or methods[0]
    if reference not in methods:
        raise ValueError(
            f"expected settings['reference'] to be one of {', '.join(methods)}, found '{reference}'; correct it, or "
            "leave it out for the first"
        )
    read = [
        read_run(results, run["dataset"], run["network"], run.get("seeds", seeds), kinds, finetuned, run["objective"])
        for run in runs
    ]
    summaries = [summarise(run) for run in read]
    summary = pd.concat(summaries, ignore_index=True)
    tables = {
        "summary": summary,
        "comparison": compare_methods(summary, reference),
        "sparsities": pd.concat([errors_at_sparsities(run) for run in read], ignore_index=True),
        "phase2_gain": phase2_gains(summary),
    }

    styles = method_styles(kinds)
    sections = []
    for run, own in zip(read, summaries, strict=True):
        with figure_style():
            figures = {
                kind: _save(figure, output, f"{run.dataset}-{run.network}-{kind}")
                for kind, figure in draw_figures(run, own, styles)
            }
        sections.append(_section(run, own, figures))
    comparison = None
    # One pair, or one method, leaves nothing to compare over.
    if len(methods) > 1 and sum(len(run.seeds) for run in read) > 1:
        shown = leading_methods(summary, reference, MOST_SHOWN)
        with figure_style():
            figures = {
                kind: _save(figure, output, f"comparison-{kind}")
                for kind, figure in draw_comparison(read, summary, tables["comparison"], shown)
            }
        comparison = _comparison(read, tables, shown, figures)
    for name, table in tables.items():
        with atomic_path(output / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    with atomic_path(output / "index.html") as temporary:
        temporary.write_text(_page(sections, comparison, summary, kinds), encoding="utf-8")


def draw_figures(
    run: RunResults, summary: pd.DataFrame, styles: Mapping[str, MethodStyle]
) -> Iterable[tuple[str, Figure]]:
    """Draw, one after the other, every figure of a run that has something to show.

    Args:
        run: Its results.
        summary: From `summarise`.
        styles: From `styles.method_styles`.

    Yields:
        Name and figure.
    """
    if len(run.fronts):
        yield "fronts", run_plots.draw_fronts(run.fronts, run.dense_test_error, styles)
    yield "hypervolume", run_plots.draw_hypervolume(run.histories, styles)
    if run.two_phase:
        first = run.seeds[0]
        gains = summary[summary["method"].isin(run.two_phase)]
        yield "phase2", run_plots.draw_phase2_gain(gains, styles)
        fronts = run.fronts[run.fronts["seed"] == first]
        drawn = [method for method in run.two_phase if (fronts["method"] == method).any()]
        if drawn:
            yield "stages", run_plots.draw_stages(fronts, drawn, _ERROR_LABELS[run.objective])
            layers = run.layers[run.layers["seed"] == first]
            layers = layers.merge(fronts[["method", "id", "sparsity"]], on=["method", "id"])
            yield "layers", run_plots.draw_layer_densities(layers, drawn)
        yield "corridor", run_plots.draw_corridor({method: run.anchors[method, first] for method in run.two_phase})
    if len(run.finetuned):
        yield "finetuned", run_plots.draw_finetuned(run.finetuned, run.dense_test_error, styles)


def draw_comparison(
    runs: Sequence[RunResults], summary: pd.DataFrame, tests: pd.DataFrame, shown: Sequence[str]
) -> Iterable[tuple[str, Figure]]:
    """Draw, one after the other, the figures over all runs.

    Args:
        runs: Results of every run.
        summary: From `summarise`, of all runs.
        tests: From `comparison.compare_methods`.
        shown: From `comparison.leading_methods`: the reference and the others that get a colour.

    Yields:
        Name and figure.
    """
    names = {f"{run.dataset} / {run.network}": run for run in runs}
    styles = comparison_styles(shown)
    differences = {measure: paired_differences(summary, shown[0], measure) for measure in MEASURES}
    yield "differences", comparison_plots.draw_paired_differences(differences, tests, _MEASURE_TITLES)
    surfaces = {
        name: {
            method: attainment_surfaces(run.fronts[run.fronts["method"] == method], run.seeds, "test_error")
            for method in shown
        }
        for name, run in names.items()
    }
    dense_errors = {name: run.dense_test_error for name, run in names.items()}
    yield "attainment", comparison_plots.draw_attainment(surfaces, dense_errors, styles)
    ends, bands = {}, {}
    for name, run in names.items():
        grid = np.linspace(0, run.histories["evaluations"].max(), _BAND_STEPS)
        histories = {method: run.histories[run.histories["method"] == method] for method in run.kinds}
        bands[name] = {method: hypervolume_bands(history, grid) for method, history in histories.items()}
        ends[name] = {method: float(history["evaluations"].max()) for method, history in histories.items()}
    yield "hypervolume", comparison_plots.draw_hypervolume_bands(bands, ends, styles)


def _save(figure: Figure, output: Path, name: str) -> str:
    """Save a figure and return its path relative to the page, without the suffix."""
    save_figure(figure, output / "figures" / name)
    return f"figures/{name}"


def _page(
    sections: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    summary: pd.DataFrame,
    kinds: Mapping[str, str],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        sections=sections,
        comparison=comparison,
        kinds=kinds,
        objectives=sorted(set(summary["objective"])),
        evaluations=f"{summary['evaluations'].sum():,}",
        duration=_duration(float(summary["seconds"].sum())),
        version=__version__,
    )


def _section(run: RunResults, summary: pd.DataFrame, figures: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of one run."""
    return {
        "dataset": run.dataset,
        "network": run.network,
        "anchor": f"{run.dataset}-{run.network}",
        "seeds": run.seeds,
        "objective": run.objective,
        "memorised": [seed for seed in run.seeds if run.dense[seed]["search_memorised"]],
        "sources": sorted({str(metrics["source"]) for metrics in run.dense.values()}),
        "n_prunable": f"{run.dense[run.seeds[0]]['n_prunable']:,}",
        "n_parameters": f"{run.dense[run.seeds[0]]['n_parameters']:,}",
        "n_classes": run.dense[run.seeds[0]]["n_classes"],
        "dense_accuracy": f"{100 * (1 - run.dense_test_error):.2f}",
        "evaluations": f"{summary['evaluations'].sum():,}",
        "duration": _duration(float(summary["seconds"].sum())),
        "two_phase": run.two_phase,
        "headlines": _headlines(summary),
        "dense": _dense_table(run),
        "summary": _summary_table(summary, list(run.kinds), _QUALITY_AND_COST),
        "phases": _summary_table(summary, run.two_phase, _PHASES) if run.two_phase else None,
        "per_seed": _per_seed_table(summary),
        "finetuned": _finetuned_table(run) if len(run.finetuned) else None,
        "figures": dict(figures),
    }


def _comparison(
    runs: Sequence[RunResults], tables: Mapping[str, pd.DataFrame], shown: Sequence[str], figures: Mapping[str, str]
) -> dict[str, Any]:
    """What the template shows of all runs together."""
    tests = tables["comparison"]
    clear = tests[(tests["measure"] == "hypervolume_test") & (tests["p_holm"] < SIGNIFICANCE)]
    sparsities = tables["sparsities"]
    gains = tables["phase2_gain"]
    return {
        "reference": shown[0],
        "rivals": list(shown[1:]),
        "n_others": tests["method"].nunique(),
        "n_pairs": int(tests["n_pairs"].max()),
        "n_better": int((clear["rank_biserial"] > 0).sum()),
        "n_worse": int((clear["rank_biserial"] < 0).sum()),
        "level": SIGNIFICANCE,
        "tests": [(_MEASURE_TITLES[measure], _tests_table(tests[tests["measure"] == measure])) for measure in MEASURES],
        "sparsities": [
            (
                f"{run.dataset} / {run.network}",
                f"{100 * run.dense_test_error:.2f}",
                _sparsities_table(
                    sparsities[(sparsities["dataset"] == run.dataset) & (sparsities["network"] == run.network)]
                ),
            )
            for run in runs
        ],
        "gains": _gains_table(gains) if len(gains) else None,
        "figures": dict(figures),
    }


def _tests_table(tests: pd.DataFrame) -> Table:
    """Every other method against the reference; corrected p-values below the level are marked."""
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
            Cell(_p_value(row["p_holm"]), row["p_holm"] < SIGNIFICANCE),
            Cell(row["note"], number=False),
        ]
        for row in tests.to_dict("records")
    ]
    return Table(head, rows)


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _sparsities_table(sparsities: pd.DataFrame) -> Table:
    """Test error per method and least sparsity; the least is marked among methods that every seed speaks for."""
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


def _gains_table(gains: pd.DataFrame) -> Table:
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


def _headlines(summary: pd.DataFrame) -> list[dict[str, str]]:
    """The few numbers to read first: a value, what it is, and whose."""
    n_seeds = summary["seed"].nunique()
    over = f"mean of {n_seeds} seeds" if n_seeds > 1 else "1 seed"
    quality = summary.groupby("method", sort=False)["hypervolume_test"].mean()
    headlines = [
        {
            "value": f"{quality.max():.4f}",
            "label": "largest hypervolume on the test split",
            "by": f"{quality.idxmax()}, {over}",
        }
    ]
    # Only methods that stay within a point in every seed: a mean over the lucky seeds would flatter.
    within = summary.groupby("method", sort=False)["sparsity_within_1pt"].agg(lambda values: values.mean(skipna=False))
    if within.notna().any():
        value, by = f"{100 * within.max():.1f} %", f"{within.idxmax()}, {over}"
    else:
        value, by = "none", "no method stays that close in every seed"
    headlines.append({"value": value, "label": "of the weights removed at a loss of at most 1 point", "by": by})
    gains = summary["phase2_gain"].dropna()
    if len(gains):
        headlines.append(
            {
                "value": f"{gains.mean():+.4f}",
                "label": "hypervolume added by Phase 2 on the search split",
                "by": f"mean of {len(gains)} searches, positive in {int((gains > 0).sum())}",
            }
        )
    return headlines


def _dense_table(run: RunResults) -> Table:
    head = ["seed", "source", *(f"{split} accuracy (%)" for split in SPLITS), "search split memorised"]
    rows = []
    for seed in run.seeds:
        metrics = run.dense[seed]
        scores = [
            Cell(f"{100 * metrics['accuracy'][split]:.2f} ({metrics['n_images'][split]:,} images)") for split in SPLITS
        ]
        memorised = "yes" if metrics["search_memorised"] else "no"
        source = Cell(str(metrics["source"]), number=False)
        rows.append([Cell(str(seed)), source, *scores, Cell(memorised, number=False)])
    return Table(head, rows)


def _summary_table(summary: pd.DataFrame, methods: Sequence[str], views: Sequence[View]) -> Table:
    """Mean ± standard deviation over seeds per method; the best of each measure of quality is marked."""
    groups = {method: summary[summary["method"] == method] for method in methods}
    rows = [[Cell(method, number=False), Cell(str(len(group)))] for method, group in groups.items()]
    for view in views:
        # NaN in any seed keeps a method out of the comparison, see _headlines.
        means = pd.Series([group[view.column].mean(skipna=False) for group in groups.values()], dtype=float)
        best = np.isclose(means, means.max()) & (view.contest and len(groups) > 1)
        for row, group, is_best in zip(rows, groups.values(), best, strict=True):
            text = _mean_std(view.factor * group[view.column], view.decimals, signed=view.signed)
            row.append(Cell(text, bool(is_best)))
    return Table(["method", "seeds", *(view.heading for view in views)], rows)


def _per_seed_table(summary: pd.DataFrame) -> Table:
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


def _finetuned_table(run: RunResults) -> Table:
    """Per target and method, mean ± standard deviation over seeds; best where the sparsities can be compared."""
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
        all_seeds = all(len(members) == len(run.seeds) for _, members in groups)
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
    """Mean ± sample standard deviation of the values that are there, and how many when some are not."""
    found = values.dropna().astype(float)
    if not len(found):
        return "none"
    text = f"{found.mean():{'+' if signed else ''},.{decimals}f}"
    if len(found) > 1:
        text += f" ± {found.std():,.{decimals}f}"
    if len(found) < len(values):
        text += f" ({len(found)} of {len(values)} seeds)"
    return text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
