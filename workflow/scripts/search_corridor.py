"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.fronts import Front
from paretoprune.search.corridor import corridors_of
from paretoprune.search.guidance import CandidateGuide
from paretoprune.search.search import SearchResult, read_history, search_corridor
from paretoprune.settings import CorridorStep, Moves
from paretoprune.workflow.search_steps import (
    allowed_masks,
    log_progress,
    make_search_evaluator,
    publish,
    read_scores,
)
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    given = snakemake.params.settings
    settings = CorridorStep.of(given)
    granted = {"workers": snakemake.threads, "prefix_cache_mb": snakemake.resources.prefix_cache_mb}
    evaluate = make_search_evaluator(snakemake.input, given, device, **granted)
    scores = read_scores(snakemake.input.scores, evaluate.layout)
    anchors = Front.load(snakemake.input.anchors).masks
    before = SearchResult(Front.load(snakemake.input.front), read_history(snakemake.input.history))
    spent = before.history[-1]["evaluations"]
    evaluations = settings.budget.phase2(spent)
    moving_guide = None
    if settings.phase2.follows_refits:
        costs = evaluate.refit_costs()
        moving_guide = lambda corridor: CandidateGuide(costs, evaluate.layout, corridor.layers)  # noqa: E731
    found = search_corridor(
        evaluate,
        corridors_of(anchors, settings.corridors, evaluate.layout),
        [scores[guide] for guide in settings.phase2.scores],
        before,
        **settings.phase2.part(Moves).plain(),
        algorithm=settings.phase2.algorithm,
        evaluations=evaluations,
        population=settings.population,
        seed=int(snakemake.wildcards.seed),
        moving_guide=moving_guide,
        progress=log_progress(log, spent + evaluations),
        allowed=allowed_masks(given, evaluate.layout),
    )
    publish(found, evaluate, snakemake.input, snakemake.output, given, device)
