"""The figures of a report: which ones a run has, and which ones all runs have together."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paretoprune.reporting import comparison_plots, latency_plots, run_plots
from paretoprune.reporting.attainment import attainment_surfaces, hypervolume_bands
from paretoprune.reporting.comparison import MEASURE_TITLES, MEASURES, paired_differences
from paretoprune.reporting.read_results import RunResults
from paretoprune.reporting.styles import MethodStyle, comparison_styles

_ERROR_LABELS = {
    "error": "search error (%)",
    "divergence": "divergence from the dense network,\n1 − exp(−KL) (%)",
}
# Points on the axis of evaluations at which bands over seeds are drawn.
_BAND_STEPS = 400


def draw_run(run: RunResults, summary: pd.DataFrame, styles: Mapping[str, MethodStyle]) -> Iterable[tuple[str, Figure]]:
    """Draw the figures of a run that have something to show, each when it is asked for.

    Args:
        run: Its results.
        summary: From `read_results.summarise`.
        styles: From `styles.method_styles`.

    Yields:
        Name and figure.
    """
    if len(run.fronts):
        yield "fronts", run_plots.draw_fronts(run.fronts, run.dense_test_error, styles)
    yield "hypervolume", run_plots.draw_hypervolume(run.histories, styles, largest=run.about.largest_hypervolume)
    if len(run.latencies):
        yield "latency", latency_plots.draw_errors_by_time(run.latencies, run.dense_test_error, styles)
        if run.latencies["predicted"].notna().any():
            checked = run.latency_table.checked if run.latency_table else None
            yield "prediction", latency_plots.draw_predictions(run.latencies, checked, styles)
    if run.two_phase:
        first = run.about.seeds[0]
        gains = summary[summary["method"].isin(run.two_phase)]
        yield "phase2", run_plots.draw_phase2_gain(gains, styles)
        fronts = run.fronts[run.fronts["seed"] == first]
        drawn = [method for method in run.two_phase if (fronts["method"] == method).any()]
        if drawn:
            yield "stages", run_plots.draw_stages(fronts, drawn, _ERROR_LABELS[run.about.objective])
            layers = run.layers[run.layers["seed"] == first]
            layers = layers.merge(fronts[["method", "id", "sparsity"]], on=["method", "id"])
            yield "layers", run_plots.draw_layer_densities(layers, drawn)
        yield "corridor", run_plots.draw_corridor({method: run.anchors[method, first] for method in run.two_phase})
    if len(run.finetuned):
        yield "finetuned", run_plots.draw_finetuned(run.finetuned, run.dense_test_error, styles)


def draw_comparison(
    runs: Sequence[RunResults], summary: pd.DataFrame, tests: pd.DataFrame, shown: Sequence[str]
) -> Iterable[tuple[str, Figure]]:
    """Draw the figures over all runs, each when it is asked for.

    Args:
        runs: Results of every run.
        summary: From `read_results.summarise`, of all runs.
        tests: From `comparison.compare_methods`.
        shown: From `comparison.leading_methods`: the reference and the others that get a colour.

    Yields:
        Name and figure.
    """
    names = {run.about.title: run for run in runs}
    styles = comparison_styles(shown)
    differences = {measure: paired_differences(summary, shown[0], measure) for measure in MEASURES}
    yield "differences", comparison_plots.draw_paired_differences(differences, tests, MEASURE_TITLES)
    surfaces = {
        name: {
            method: attainment_surfaces(run.fronts[run.fronts["method"] == method], run.about.seeds, "test_error")
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
