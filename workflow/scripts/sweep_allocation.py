"""Baseline: one importance score and one allocation rule at several densities, without a search."""

from paretoprune.settings import AllocationStep
from paretoprune.stages.allocation import try_allocation
from paretoprune.stages.candidates import Setup
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import log_progress, read_scores, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = AllocationStep.of(snakemake.params.settings), read_task(snakemake.input)
    compute, progress = settings.compute(str(device), snakemake.threads), log_progress(log, settings.densities.size)
    setup = Setup(task, settings, compute, progress)
    (scores,) = read_scores(snakemake.input.scores, task.units).values()
    found = try_allocation(setup, scores, settings.allocation, settings.densities)
    front = publish(found.front, setup, settings)
    write_published(front, found.history, snakemake.output)
