"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.corridor import Corridor
from paretoprune.fronts import Front
from paretoprune.search import SearchResult, read_history, search_corridor
from paretoprune.search_steps import log_progress, make_search_evaluator, publish, read_scores
from paretoprune.steps import step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    granted = {"workers": snakemake.threads, "prefix_cache_mb": snakemake.resources.prefix_cache_mb}
    evaluate = make_search_evaluator(snakemake.input, settings, device, **granted)
    scores = read_scores(snakemake.input.scores, evaluate.layout)
    anchors = Front.load(snakemake.input.anchors).masks
    before = SearchResult(Front.load(snakemake.input.front), read_history(snakemake.input.history))
    found = search_corridor(
        evaluate,
        Corridor.between(anchors.unpack(0), anchors.unpack(1), evaluate.layout),
        [scores[guide] for guide in settings["guides"]],
        before,
        **settings["algorithm"],
        seed=int(snakemake.wildcards.seed),
        progress=log_progress(log, before.history[-1]["evaluations"] + settings["algorithm"]["evaluations"]),
    )
    publish(found, evaluate, snakemake.input, snakemake.output, settings, device)
