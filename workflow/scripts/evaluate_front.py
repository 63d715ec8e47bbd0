"""Measure every finished network of a front on the test split, once, in float32."""

from paretoprune.evaluation.measurement import LAYER_COLUMNS, front_columns, front_rows, layer_rows, measure_errors
from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, test".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    dense = DenseNetwork.load(snakemake.input.network)
    (test,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "test")
    front = Front.published(snakemake.input.masks, snakemake.input.networks, dense.network)
    states = front.states or []
    errors = measure_errors(dense.network, states, test, device, n_workers=snakemake.threads)
    write_csv(snakemake.output.front, front_rows(front, errors), front_columns(front))
    write_csv(
        snakemake.output.layers, layer_rows(front, WeightUnits.of(dense.network, dense.exclude), states), LAYER_COLUMNS
    )
    log.info("%d members measured", len(front))
