"""Phase 1: search one threshold per layer."""

from paretoprune.files import write_csv
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import HISTORY_COLUMNS
from paretoprune.settings import Phase1, Searching
from paretoprune.stages.phase1 import find_thresholds
from paretoprune.workflow.search_inputs import granted, log_progress, read_scores, read_task
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 1".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = snakemake.params.settings, read_task(snakemake.input)
    found = find_thresholds(
        task,
        read_scores(snakemake.input.scores, task.units),
        Searching.of(settings),
        Phase1.of(settings),
        Effort(settings["evaluations"], settings["population"], int(snakemake.wildcards.seed)),
        granted(settings, device, snakemake.threads),
        sparsities=settings["sparsities"],
        progress=log_progress(log, settings["evaluations"]),
    )
    found.front.save(snakemake.output.front)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
