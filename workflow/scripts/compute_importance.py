"""Score every prunable weight of the dense network."""

from paretoprune.importance.layer_statistics import read_statistics
from paretoprune.importance.scores import compute_importance
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.tensors import save_tensors
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {score}".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads) as (log, _):
    dense = DenseNetwork.load(snakemake.input.network)
    (train,) = read_splits(snakemake.input.images, snakemake.input.splits, dense, "train")
    seed = int(snakemake.wildcards.seed)
    chosen = train.sample(snakemake.params.n_images, seed)
    layout = WeightUnits.of(dense.network, dense.exclude)
    scores = compute_importance(
        snakemake.wildcards.score,
        dense.network,
        layout,
        chosen.images,
        chosen.labels,
        seed,
        read_statistics(snakemake.input),
    )
    save_tensors(snakemake.output.scores, scores)
    log.info("importance of %d weights", layout.n_weights)
