"""The page index.html: what its template shows of each run and of all runs together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from paretoprune import __version__
from paretoprune.reporting.comparison import MEASURE_TITLES, SIGNIFICANCE_LEVEL
from paretoprune.reporting.latency_notes import latency_section
from paretoprune.reporting.read_results import RunResults
from paretoprune.reporting.tables import (
    PHASES,
    QUALITY_AND_COST,
    comparison_table,
    costs_table,
    dense_table,
    finetuned_table,
    gains_table,
    per_seed_table,
    sparsities_table,
    summary_table,
)
from paretoprune.settings import Timing


def render_page(
    sections: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    summary: pd.DataFrame,
    kinds: Mapping[str, str],
) -> str:
    """Render the page as HTML.

    Args:
        sections: From `run_section`, one per run.
        comparison: From `comparison_section`; None where there is nothing to compare.
        summary: From `read_results.summarise`, of all runs.
        kinds: "two_phase", "flat" or "allocation" per method.
    """
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


def run_section(
    run: RunResults, summary: pd.DataFrame, figures: Mapping[str, str], timing: Timing | None = None
) -> dict[str, Any]:
    """Collect what the template shows of one run.

    Args:
        run: Its results.
        summary: From `read_results.summarise`, of this run.
        figures: Path of each of its figures relative to the page, without the suffix.
        timing: What members were timed on, where they were.
    """
    first = run.dense[run.about.seeds[0]]
    share = first["n_prunable"] / first["n_parameters"]
    return {
        "dataset": run.about.dataset,
        "network": run.about.network,
        "anchor": run.about.anchor,
        "seeds": run.about.seeds,
        # None if the density is the only cost. Then the page does not explain costs.
        "costs": None if run.about.only_density else list(run.about.costs),
        "largest_hypervolume": f"{run.about.largest_hypervolume:.4g}",
        "objective": run.about.objective,
        "memorised": [seed for seed in run.about.seeds if run.dense[seed]["search_memorised"]],
        "sources": sorted({str(metrics["source"]) for metrics in run.dense.values()}),
        "n_prunable": f"{first['n_prunable']:,}",
        "n_parameters": f"{first['n_parameters']:,}",
        "prunable_share": f"{100 * share:.1f}",
        "sparsity_of_parameters": f"{90 * share:.1f}",
        "n_classes": first["n_classes"],
        "dense_accuracy": f"{100 * (1 - run.dense_test_error):.2f}",
        "evaluations": f"{summary['evaluations'].sum():,}",
        "duration": _duration(float(summary["seconds"].sum())),
        "two_phase": run.two_phase,
        "headlines": _headlines(summary),
        "dense": dense_table(run),
        "summary": summary_table(summary, list(run.kinds), QUALITY_AND_COST),
        "phases": summary_table(summary, run.two_phase, PHASES) if run.two_phase else None,
        "per_seed": per_seed_table(summary),
        "members": None if run.about.only_density else costs_table(run),
        "latency": latency_section(run, timing or Timing()) if len(run.latencies) else None,
        "finetuned": finetuned_table(run) if len(run.finetuned) else None,
        "figures": dict(figures),
    }


def comparison_section(
    runs: Sequence[RunResults], tables: Mapping[str, pd.DataFrame], shown: Sequence[str], figures: Mapping[str, str]
) -> dict[str, Any]:
    """Collect what the template shows of all runs together.

    Args:
        runs: Results of every run.
        tables: "comparison", "sparsities" and "phase2_gain" as they are written to CSV files.
        shown: From `comparison.leading_methods`: the reference and the others that are drawn in colour.
        figures: Path of each figure relative to the page, without the suffix.
    """
    tests = tables["comparison"]
    significant = tests[(tests["measure"] == "hypervolume_test") & (tests["p_holm"] < SIGNIFICANCE_LEVEL)]
    sparsities = tables["sparsities"]
    gains = tables["phase2_gain"]
    return {
        "reference": shown[0],
        "rivals": list(shown[1:]),
        "n_others": tests["method"].nunique(),
        "n_pairs": int(tests["n_pairs"].max()),
        "n_better": int((significant["rank_biserial"] > 0).sum()),
        "n_worse": int((significant["rank_biserial"] < 0).sum()),
        "level": SIGNIFICANCE_LEVEL,
        "tests": [
            (title, comparison_table(tests[tests["measure"] == measure])) for measure, title in MEASURE_TITLES.items()
        ],
        "sparsities": [
            (
                run.about.title,
                f"{100 * run.dense_test_error:.2f}",
                sparsities_table(_rows_of_run(sparsities, run)),
            )
            for run in runs
        ],
        "gains": gains_table(gains) if len(gains) else None,
        "figures": dict(figures),
    }


def _rows_of_run(table: pd.DataFrame, run: RunResults) -> pd.DataFrame:
    return table[(table["dataset"] == run.about.dataset) & (table["network"] == run.about.network)]


def _headlines(summary: pd.DataFrame) -> list[dict[str, str]]:
    """The few numbers to read first: each with its value, its label, and the method that reached it."""
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
    # Only methods that stay within a point in every seed. A mean over the lucky seeds of others would flatter them.
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


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
