"""Baseline: one importance score and one allocation rule at a ladder of densities, without a search."""

import numpy as np
from paretoprune.allocation import allocate
from paretoprune.checkpoints import DenseNetwork
from paretoprune.files import write_csv
from paretoprune.search import HISTORY_COLUMNS, finish_front, sweep_allocation
from paretoprune.steps import log_progress, make_evaluator, read_scores, read_splits, step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, ladder = snakemake.params.settings, snakemake.params.settings["ladder"]
    dense = DenseNetwork.load(snakemake.input.network)
    search, calibration = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search", "calibration")
    evaluate = make_evaluator(dense, search, calibration, settings, device)
    (scores,) = read_scores(snakemake.input.scores, evaluate.layout).values()
    densities = np.geomspace(ladder["lowest"], ladder["highest"], ladder["size"])
    counts = [allocate(settings["allocation"], scores, evaluate.layout, density) for density in densities]
    found = sweep_allocation(evaluate, evaluate.layout, scores, counts, progress=log_progress(log, len(counts)))
    publish = make_evaluator(dense, search, calibration, settings, device, precision="float32")
    finish_front(found, publish, settings["front_size"]).save(snakemake.output.masks)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
