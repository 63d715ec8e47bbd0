"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.corridor import corridors_of
from paretoprune.fronts import Front
from paretoprune.guidance import curvature_guide
from paretoprune.search import SearchResult, read_history, search_corridor
from paretoprune.search_steps import (
    allowed_masks,
    log_progress,
    make_search_evaluator,
    phase2_budget,
    publish,
    read_scores,
)
from paretoprune.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    granted = {"workers": snakemake.threads, "prefix_cache_mb": snakemake.resources.prefix_cache_mb}
    evaluate = make_search_evaluator(snakemake.input, settings, device, **granted)
    scores = read_scores(snakemake.input.scores, evaluate.layout)
    anchors = Front.load(snakemake.input.anchors).masks
    before = SearchResult(Front.load(snakemake.input.front), read_history(snakemake.input.history))
    algorithm = settings["algorithm"] | {"evaluations": phase2_budget(settings, before)}
    found = search_corridor(
        evaluate,
        corridors_of(anchors, settings["corridors"], evaluate.layout),
        [scores[guide] for guide in settings["guides"]],
        before,
        **algorithm,
        seed=int(snakemake.wildcards.seed),
        moving_guide=curvature_guide(evaluate) if settings["refit_guide"] else None,
        progress=log_progress(log, before.history[-1]["evaluations"] + algorithm["evaluations"]),
        allowed=allowed_masks(settings, evaluate.layout),
    )
    publish(found, evaluate, snakemake.input, snakemake.output, settings, device)
