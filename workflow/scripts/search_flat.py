"""Baseline: search whole masks in a single phase."""

from paretoprune.search.problem import Effort
from paretoprune.settings import Flat, Publishing, Searching
from paretoprune.stages.flat import find_flat
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import granted, log_progress, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = snakemake.params.settings, read_task(snakemake.input)
    searching, compute = Searching.of(settings), granted(settings, device, snakemake.threads)
    effort = Effort(settings["evaluations"], settings["population"], int(snakemake.wildcards.seed))
    progress = log_progress(log, effort.evaluations)
    found = find_flat(task, searching, Flat.of(settings), effort, compute, progress=progress)
    front = publish(found.front, task, searching, Publishing.of(settings), compute)
    write_published(front, found.history, snakemake.output)
