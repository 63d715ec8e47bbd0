"""Phase 1: search one threshold per layer."""

from paretoprune.files import write_csv
from paretoprune.importance.allocation import starting_allocations
from paretoprune.search.search import HISTORY_COLUMNS, search_thresholds
from paretoprune.settings import ThresholdStep
from paretoprune.workflow.search_steps import allowed_masks, log_progress, make_search_evaluator, read_scores
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 1".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    given = snakemake.params.settings
    settings = ThresholdStep.of(given)
    evaluate = make_search_evaluator(snakemake.input, given, device, workers=snakemake.threads)
    scores, phase1 = read_scores(snakemake.input.scores, evaluate.layout), settings.phase1
    found = search_thresholds(
        evaluate,
        evaluate.layout,
        scores[settings.importance],
        starting_allocations(phase1.starts, phase1.start_densities, scores, evaluate.layout),
        evaluations=settings.evaluations,
        population=settings.population,
        rungs=phase1.rungs,
        level_switches=phase1.level_switches,
        n_reselected=phase1.n_reselected,
        sparsities=settings.sparsities,
        seed=int(snakemake.wildcards.seed),
        reselect=evaluate.reselect,
        precompute=evaluate.precompute,
        progress=log_progress(log, settings.evaluations),
        allowed=allowed_masks(given, evaluate.layout),
    )
    found.front.save(snakemake.output.front)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
