"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.fronts import Front
from paretoprune.search.problem import Effort
from paretoprune.search.recorder import SearchResult, read_history
from paretoprune.settings import Budget, Phase2, Publishing, Searching
from paretoprune.stages.phase2 import refine_bits
from paretoprune.stages.publish import publish
from paretoprune.workflow.search_inputs import granted, log_progress, read_scores, read_task, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, task = snakemake.params.settings, read_task(snakemake.input)
    searching = Searching.of(settings)
    compute = granted(settings, device, snakemake.threads, snakemake.resources.prefix_cache_mb)
    before = SearchResult(Front.load(snakemake.input.front), read_history(snakemake.input.history))
    spent = before.history[-1]["evaluations"]
    evaluations = Budget(settings["evaluations"], settings["share"]).phase2(spent)
    found = refine_bits(
        task,
        read_scores(snakemake.input.scores, task.units),
        Front.load(snakemake.input.anchors).masks if settings["corridors"] else None,
        before,
        searching,
        Phase2.of(settings),
        Effort(evaluations, settings["population"], int(snakemake.wildcards.seed)),
        compute,
        progress=log_progress(log, spent + evaluations),
    )
    front = publish(found.front, task, searching, Publishing.of(settings), compute)
    write_published(front, found.history, snakemake.output)
