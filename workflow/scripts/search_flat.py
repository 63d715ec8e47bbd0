"""Baseline: search whole masks in a single phase."""

from paretoprune.search.problem import Effort
from paretoprune.settings import FlatStep
from paretoprune.stages.candidates import Setup
from paretoprune.stages.flat import find_flat
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import log_progress, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = FlatStep.of(snakemake.params.settings), read_task(snakemake.input)
    compute, progress = settings.compute(str(device), snakemake.threads), log_progress(log, settings.evaluations)
    setup = Setup(task, settings, compute, progress)
    effort = Effort(settings.evaluations, settings.population, int(snakemake.wildcards.seed))
    found = find_flat(setup, settings.flat, effort)
    front = publish(found.front, setup, settings)
    write_published(front, found.history, snakemake.output)
