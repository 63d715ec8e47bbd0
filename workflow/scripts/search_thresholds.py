"""Phase 1: search one threshold per layer."""

from paretoprune.files import write_csv
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import HISTORY_COLUMNS
from paretoprune.settings import ThresholdStep
from paretoprune.stages.candidates import Setup
from paretoprune.stages.phase1 import find_thresholds
from paretoprune.workflow.search_inputs import log_progress, read_scores, read_task
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 1".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = ThresholdStep.of(snakemake.params.settings), read_task(snakemake.input)
    compute = settings.compute(str(device), snakemake.threads)
    found = find_thresholds(
        Setup(task, settings, compute, log_progress(log, settings.evaluations)),
        read_scores(snakemake.input.scores, task.units),
        settings.phase1,
        Effort(settings.evaluations, settings.population, int(snakemake.wildcards.seed)),
        sparsities=settings.sparsities,
    )
    found.front.save(snakemake.output.front)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
