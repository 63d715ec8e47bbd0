"""Baseline: search whole masks in a single phase."""

from paretoprune.search.search import search_flat
from paretoprune.settings import FlatStep
from paretoprune.workflow.search_steps import allowed_masks, log_progress, make_search_evaluator, publish
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    given = snakemake.params.settings
    settings = FlatStep.of(given)
    evaluate = make_search_evaluator(snakemake.input, given, device, workers=snakemake.threads)
    found = search_flat(
        evaluate,
        evaluate.layout,
        **settings.flat.plain(),
        evaluations=settings.evaluations,
        population=settings.population,
        seed=int(snakemake.wildcards.seed),
        progress=log_progress(log, settings.evaluations),
        allowed=allowed_masks(given, evaluate.layout),
    )
    publish(found, evaluate, snakemake.input, snakemake.output, given, device)
