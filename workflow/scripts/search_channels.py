"""Both phases on what can be cut out of a network: channels, heads and branches. The networks get smaller."""

from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.networks.wrapping import without_adaptation
from paretoprune.search.problem import Effort
from paretoprune.settings import ChannelStep, Timing
from paretoprune.stages.latency import read_latency_cost
from paretoprune.stages.slim import SlimSearch, find_slim_networks
from paretoprune.structured.judging import SlimTask
from paretoprune.structured.units import ChannelUnits, slim_costs
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.search_inputs import log_progress, write_published
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    settings, dense = ChannelStep.of(snakemake.params.settings), DenseNetwork.load(snakemake.input.network)
    search, calibration = read_splits(snakemake.input.images, snakemake.input.splits, dense, "search", "calibration")
    image = search.images[:1]
    units = ChannelUnits.of(dense.network, image, dense.exclude, strict=False)
    units.report(log)
    # A table where latency is an objective; the network as it will be shipped.
    measured = [
        read_latency_cost(table, without_adaptation(dense.network), units, image, Timing.of(snakemake.params.timing))
        for table in snakemake.input.table
    ]
    found = find_slim_networks(
        SlimTask(dense.network, units, search.images, search.labels, calibration.images).to(device),
        slim_costs(settings.costs, units, dense.network, image, measured),
        SlimSearch.of(settings, 1 if device.type == "cuda" else snakemake.threads),
        Effort(settings.evaluations, settings.population, int(snakemake.wildcards.seed)),
        phase1=settings.phase1,
        anchors=settings.anchors,
        phase2=settings.phase2,
        progress=log_progress(log, settings.evaluations),
    )
    write_published(found.front, found.history, snakemake.output)
