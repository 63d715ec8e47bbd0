"""Measure the latency table of a network: every layer at several widths, on this machine."""

from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.wrapping import without_adaptation
from paretoprune.settings import Tabulating
from paretoprune.stages.timing import make_table
from paretoprune.structured.units import ChannelUnits
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network}: latency table".format(**snakemake.wildcards)
with step(name, snakemake.log[0]) as (log, _):
    settings, dense = Tabulating.of(snakemake.params.settings), DenseNetwork.load(snakemake.input.network)
    (search,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search")
    image = search.images[:1]
    units = ChannelUnits.of(dense.network, image, dense.exclude, strict=False)
    table = make_table(without_adaptation(dense.network), units, image, settings)
    table.save(snakemake.output.table)
    log.info("times of %d layers are known to %.1f %%", len(table.blocks), 100 * table.uncertainty)
