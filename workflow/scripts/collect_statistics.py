"""Gather the statistics of every prunable layer of the dense network on the calibration images."""

from paretoprune.importance.layer_statistics import collect_statistics, save_statistics
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: layer statistics".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    dense = DenseNetwork.load(snakemake.input.network)
    (calibration,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "calibration")
    layout = WeightUnits.of(dense.network, dense.exclude)
    seed, positions = int(snakemake.wildcards.seed), snakemake.params.positions
    found = collect_statistics(dense.network, layout, calibration.images, seed=seed, positions=positions, device=device)
    save_statistics(snakemake.output.statistics, found)
    log.info("statistics of %d of %d layers from %d images", len(found), layout.n_groups, len(calibration))
