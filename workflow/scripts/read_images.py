"""Decode a dataset once into a cached tensor file."""

from pathlib import Path

from paretoprune.data.datasets import read_images
from paretoprune.workflow.steps import step

with step(snakemake.wildcards.dataset, snakemake.log[0]) as (log, _):
    settings = dict(snakemake.params.settings)
    image_set = read_images(settings.pop("source"), Path(snakemake.params.directory), **settings)
    image_set.save(snakemake.output.images)
    n, channels, height, width = image_set.images.shape
    log.info("%d images of %d x %d x %d, %d classes", n, channels, height, width, len(image_set.classes))
