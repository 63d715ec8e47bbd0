"""Phase 1: search one threshold per layer."""

from paretoprune.files import write_csv
from paretoprune.importance.allocation import starting_allocations
from paretoprune.search.search import HISTORY_COLUMNS, search_thresholds
from paretoprune.workflow.search_steps import (
    allowed_masks,
    log_progress,
    make_evaluator,
    make_finisher,
    read_scores,
    read_task,
    searching_repair,
)
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 1".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    task = read_task(snakemake.input, settings["candidate_images"])
    granted = {"workers": snakemake.threads, **searching_repair(settings)}
    evaluate = make_evaluator(task, settings, device, **granted)
    finisher = make_finisher(task, settings, device, evaluate.refit, **granted)
    scores = read_scores(snakemake.input.scores, evaluate.layout)
    found = search_thresholds(
        evaluate,
        evaluate.layout,
        scores[settings["importance"]],
        starting_allocations(settings["starts"], settings["start_densities"], scores, evaluate.layout),
        **settings["algorithm"],
        seed=int(snakemake.wildcards.seed),
        reselect=finisher.reselect,
        precompute=evaluate.precompute,
        progress=log_progress(log, settings["algorithm"]["evaluations"]),
        allowed=allowed_masks(settings, evaluate.layout),
    )
    found.front.save(snakemake.output.front)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
