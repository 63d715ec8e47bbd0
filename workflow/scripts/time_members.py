"""Time every finished network of a front in turn with the dense one, on this machine."""

from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.wrapping import without_adaptation
from paretoprune.settings import Timing
from paretoprune.stages.timing import LATENCY_COLUMNS, time_rows
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, timing".format(**snakemake.wildcards)
with step(name, snakemake.log[0]) as (log, _):
    timing, dense = Timing.of(snakemake.params.settings), DenseNetwork.load(snakemake.input.network)
    (search,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search")
    bare = without_adaptation(dense.network)
    front = Front.published(snakemake.input.masks, snakemake.input.networks, bare)
    rows = time_rows(front, search.images[:1], timing)
    write_csv(snakemake.output.times, rows, LATENCY_COLUMNS)
    log.info("%d members timed; the dense network takes %.3g ms", len(front), rows[0]["milliseconds"])
