"""Write the report from result files: tables as CSV files, figures, and the page index.html.

All files are read and checked before the first one is written. No network is evaluated.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from paretoprune.files import atomic_path
from paretoprune.reporting.comparison import compare_methods, errors_at_sparsities, leading_methods, phase2_gains
from paretoprune.reporting.drawing import draw_comparison, draw_run
from paretoprune.reporting.figures import save_figure
from paretoprune.reporting.page import comparison_section, render_page, run_section
from paretoprune.reporting.read_results import read_run, summarise
from paretoprune.reporting.styles import MOST_SHOWN, figure_style, method_styles
from paretoprune.reporting.subject import Subject


def write_report(results: Path, subject: Subject, output: Path) -> None:
    """Write figures/*.svg and *.png, summary.csv, comparison.csv, sparsities.csv, phase2_gain.csv, and last index.html.

    Args:
        results: Folder that holds {dataset}/{network}/seed{seed}/.
        subject: What the report is about.
        output: Folder of the report.

    Raises:
        FileNotFoundError: A result file is missing; nothing was written.
        ValueError: A result file lacks a column or holds an impossible value; nothing was written.
    """
    runs = [read_run(results, run, subject.kinds, subject.finetuned, subject.timed) for run in subject.runs]
    summaries = [summarise(run) for run in runs]
    summary = pd.concat(summaries, ignore_index=True)
    tables = {
        "summary": summary,
        "comparison": compare_methods(summary, subject.reference),
        "sparsities": pd.concat([errors_at_sparsities(run) for run in runs], ignore_index=True),
        "phase2_gain": phase2_gains(summary),
    }

    styles = method_styles(subject.kinds)
    sections = []
    for run, own in zip(runs, summaries, strict=True):
        figures = _save_figures(draw_run(run, own, styles), output, run.about.anchor)
        sections.append(run_section(run, own, figures, subject.timing))
    comparison = None
    # With one pair or one method there is nothing to compare.
    if len(subject.kinds) > 1 and sum(len(run.seeds) for run in subject.runs) > 1:
        shown = leading_methods(summary, subject.reference, MOST_SHOWN)
        figures = _save_figures(draw_comparison(runs, summary, tables["comparison"], shown), output, "comparison")
        comparison = comparison_section(runs, tables, shown, figures)
    for name, table in tables.items():
        with atomic_path(output / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    with atomic_path(output / "index.html") as temporary:
        temporary.write_text(render_page(sections, comparison, summary, subject.kinds), encoding="utf-8")


def _save_figures(drawn: Iterable[tuple[str, Figure]], output: Path, prefix: str) -> dict[str, str]:
    """Draw and save figures one by one, and return the path of each relative to the page, without the suffix."""
    paths = {}
    # `drawn` draws each figure when the loop asks for it, so the loop must run inside the style.
    with figure_style():
        for kind, figure in drawn:
            paths[kind] = f"figures/{prefix}-{kind}"
            save_figure(figure, output / paths[kind])
    return paths
