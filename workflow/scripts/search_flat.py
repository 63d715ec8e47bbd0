"""Baseline: search whole masks in a single phase."""

from paretoprune.checkpoints import DenseNetwork
from paretoprune.files import write_csv
from paretoprune.search import HISTORY_COLUMNS, finish_front, search_flat
from paretoprune.steps import log_progress, make_evaluator, read_splits, step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings = snakemake.params.settings
    dense = DenseNetwork.load(snakemake.input.network)
    search, calibration = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search", "calibration")
    evaluate = make_evaluator(dense, search, calibration, settings, device)
    found = search_flat(
        evaluate,
        evaluate.layout,
        **settings["algorithm"],
        seed=int(snakemake.wildcards.seed),
        progress=log_progress(log, settings["algorithm"]["evaluations"]),
    )
    publish = make_evaluator(dense, search, calibration, settings, device, precision="float32")
    finish_front(found, publish, settings["front_size"]).save(snakemake.output.masks)
    write_csv(snakemake.output.history, found.history, HISTORY_COLUMNS)
