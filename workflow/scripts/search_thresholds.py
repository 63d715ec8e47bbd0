"""Phase 1: search one threshold per layer."""

from paretoprune.allocation import starting_allocations
from paretoprune.checkpoints import DenseNetwork
from paretoprune.files import write_csv
from paretoprune.search import HISTORY_COLUMNS, search_thresholds
from paretoprune.steps import log_progress, make_evaluator, read_scores, read_splits, step

name = "{dataset} {network} seed {seed}: {method}, phase 1".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    dense = DenseNetwork.load(snakemake.input.network)
    search, calibration = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search", "calibration")
    evaluate = make_evaluator(dense, search, calibration, settings, device)
    scores = read_scores(snakemake.input.scores, evaluate.layout)
    found = search_thresholds(
        evaluate,
        evaluate.layout,
        scores[settings["importance"]],
        starting_allocations(settings["starts"], settings["start_densities"], scores, evaluate.layout),
        evaluations=settings["evaluations"],
        population=settings["population"],
        seed=int(snakemake.wildcards.seed),
        progress=log_progress(log, settings["evaluations"]),
    )
    found.front.save(snakemake.output.front)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
