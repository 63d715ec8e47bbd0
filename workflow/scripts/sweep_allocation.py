"""Baseline: one importance score and one allocation rule at several densities, without a search."""

import numpy as np
from paretoprune.importance.allocation import allocate
from paretoprune.search.search import sweep_allocation
from paretoprune.settings import AllocationStep
from paretoprune.workflow.search_steps import allowed_masks, log_progress, make_search_evaluator, publish, read_scores
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    given = snakemake.params.settings
    settings = AllocationStep.of(given)
    evaluate = make_search_evaluator(snakemake.input, given, device, workers=snakemake.threads)
    (scores,) = read_scores(snakemake.input.scores, evaluate.layout).values()
    wanted = settings.densities
    densities = np.geomspace(wanted.lowest, wanted.highest, wanted.size)
    counts = [allocate(settings.allocation, scores, evaluate.layout, density) for density in densities]
    progress, allowed = log_progress(log, len(counts)), allowed_masks(given, evaluate.layout)
    found = sweep_allocation(evaluate, evaluate.layout, scores, counts, progress=progress, allowed=allowed)
    publish(found, evaluate, snakemake.input, snakemake.output, given, device)
