"""Phase 2: search a bit per corridor weight, and publish the front of both phases."""

from paretoprune.checkpoints import DenseNetwork
from paretoprune.corridor import Corridor
from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.search import HISTORY_COLUMNS, SearchResult, finish_front, read_history, search_corridor
from paretoprune.steps import log_progress, make_evaluator, read_scores, read_splits, step

name = "{dataset} {network} seed {seed}: {method}, phase 2".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    dense = DenseNetwork.load(snakemake.input.network)
    search, calibration = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search", "calibration")
    evaluate = make_evaluator(dense, search, calibration, settings, device)
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
    publish = make_evaluator(dense, search, calibration, settings, device, precision="float32")
    finish_front(found, publish, settings["front_size"]).save(snakemake.output.masks)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
