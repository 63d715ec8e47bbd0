"""Train chosen members of a front further with their mask fixed, distilled from the dense network."""

from pathlib import Path

from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork, load_networks
from paretoprune.training.finetuning import FINETUNED_COLUMNS, finetune_members
from paretoprune.training.loop import Recipe
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, fine-tuning".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    front = Front.load(snakemake.input.masks)
    dense = DenseNetwork.load(snakemake.input.network)
    rows = finetune_members(
        front,
        load_networks(snakemake.input.networks),
        WeightUnits.of(dense.network, dense.exclude),
        dense.network,
        *read_splits(snakemake.input.images, snakemake.input.splits, dense, "train", "search", "test"),
        Recipe(**snakemake.params.recipe),
        sparsities=snakemake.params.members["sparsities"],
        with_knee=snakemake.params.members["knee"],
        seed=int(snakemake.wildcards.seed),
        device=device,
        folder=Path(snakemake.output.networks),
        log=log,
    )
    write_csv(snakemake.output.finetuned, rows, FINETUNED_COLUMNS)
