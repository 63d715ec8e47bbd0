"""Time every finished network of a front in turn with the dense one, on this machine."""

from dataclasses import replace

from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.wrapping import without_adaptation
from paretoprune.settings import Timing
from paretoprune.stages.timing import LATENCY_COLUMNS, time_rows
from paretoprune.structured.units import ChannelUnits
from paretoprune.tensors import load_networks
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, timing".format(**snakemake.wildcards)
with step(name, snakemake.log[0]) as (log, _):
    timing, dense = Timing.of(snakemake.params.settings), DenseNetwork.load(snakemake.input.network)
    (search,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search")
    image = search.images[:1]
    units = ChannelUnits.of(dense.network, image, dense.exclude, strict=False)
    states, found = load_networks(snakemake.input.networks), Front.load(snakemake.input.masks)
    front = replace(found, dense=without_adaptation(dense.network), states=states)
    rows = time_rows(front, units, image, timing)
    write_csv(snakemake.output.times, rows, LATENCY_COLUMNS)
    log.info("%d members timed; the dense network takes %.3g ms", len(front), rows[0]["milliseconds"])
