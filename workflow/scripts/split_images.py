"""Divide the images into train, calibration, search and test."""

from paretoprune.data.datasets import ImageSet
from paretoprune.data.splits import SPLITS, split_images
from paretoprune.workflow.steps import step

with step(f"{snakemake.wildcards.dataset} seed {snakemake.wildcards.seed}", snakemake.log[0]) as (log, _):
    image_set = ImageSet.load(snakemake.input.images)
    labels, is_test = image_set.labels.numpy(), image_set.is_test.numpy()
    splits = split_images(labels, is_test, **snakemake.params.sizes, seed=int(snakemake.wildcards.seed))
    splits.save(snakemake.output.splits)
    log.info("splits: %s", ", ".join(f"{name} {len(getattr(splits, name))}" for name in SPLITS))
