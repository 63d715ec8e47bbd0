"""Baseline: one importance score and one allocation rule at several densities, without a search."""

from paretoprune.settings import Densities, Publishing, Searching
from paretoprune.stages.allocation import try_allocation
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import granted, log_progress, read_scores, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = snakemake.params.settings, read_task(snakemake.input)
    searching, compute = Searching.of(settings), granted(settings, device, snakemake.threads)
    (scores,) = read_scores(snakemake.input.scores, task.units).values()
    densities = Densities.of(settings["ladder"])
    progress = log_progress(log, densities.size)
    found = try_allocation(task, scores, settings["allocation"], searching, densities, compute, progress=progress)
    front = publish(found.front, task, searching, Publishing.of(settings), compute)
    write_published(front, found.history, snakemake.output)
