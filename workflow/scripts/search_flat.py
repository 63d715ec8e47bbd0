"""Baseline: search whole masks in a single phase."""

from paretoprune.search.search import search_flat
from paretoprune.workflow.search_steps import allowed_masks, log_progress, make_search_evaluator, publish
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    evaluate = make_search_evaluator(snakemake.input, settings, device, workers=snakemake.threads)
    found = search_flat(
        evaluate,
        evaluate.layout,
        **settings["algorithm"],
        seed=int(snakemake.wildcards.seed),
        progress=log_progress(log, settings["algorithm"]["evaluations"]),
        allowed=allowed_masks(settings, evaluate.layout),
    )
    publish(found, evaluate, snakemake.input, snakemake.output, settings, device)
