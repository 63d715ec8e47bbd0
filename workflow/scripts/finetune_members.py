"""Train chosen members of a front further with their mask fixed, distilled from the dense network."""

from pathlib import Path

from paretoprune.files import write_csv
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.training.finetuning import FINETUNED_COLUMNS, FinetuneData, choose_members, finetune_members
from paretoprune.training.loop import Recipe
from paretoprune.workflow.inputs import read_splits
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, fine-tuning".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    dense = DenseNetwork.load(snakemake.input.network)
    front = Front.published(snakemake.input.masks, snakemake.input.networks, dense.network)
    splits = read_splits(snakemake.input.images, snakemake.input.splits, dense, "train", "search", "test")
    members = snakemake.params.members
    rows = finetune_members(
        front,
        WeightUnits.of(dense.network, dense.exclude),
        FinetuneData(*(part.to(device) for part in splits)),
        Recipe(**snakemake.params.recipe),
        choose_members(front, members["sparsities"], members["knee"]),
        seed=int(snakemake.wildcards.seed),
        folder=Path(snakemake.output.networks),
        log=log,
    )
    write_csv(snakemake.output.finetuned, rows, FINETUNED_COLUMNS)
