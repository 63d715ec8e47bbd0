"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.fronts import Front
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult, read_history
from paretoprune.settings import CorridorStep
from paretoprune.stages.candidates import Setup
from paretoprune.stages.phase2 import refine_bits
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import log_progress, read_scores, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = CorridorStep.of(snakemake.params.settings), read_task(snakemake.input)
    compute = settings.compute(str(device), snakemake.threads, snakemake.resources.prefix_cache_mb)
    before = SearchResult(Front.load(snakemake.input.front), read_history(snakemake.input.history))
    spent = before.history[-1]["evaluations"]
    evaluations = settings.budget.phase2(spent)
    setup = Setup(task, settings, compute, log_progress(log, spent + evaluations))
    found = refine_bits(
        setup,
        read_scores(snakemake.input.scores, task.units),
        Front.load(snakemake.input.anchors).masks if settings.corridors else None,
        before,
        settings.phase2,
        Effort(evaluations, settings.population, int(snakemake.wildcards.seed)),
    )
    front = publish(found.front, setup, settings)
    write_published(front, found.history, snakemake.output)
