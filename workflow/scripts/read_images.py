"""Decode a dataset once into a cached tensor file."""

from pathlib import Path

from paretoprune.data.reading import read_images
from paretoprune.workflow.steps import step

with step(snakemake.wildcards.dataset, snakemake.log[0]) as (log, _):
    settings = dict(snakemake.params.settings)
    image_set = read_images(settings.pop("source"), Path(snakemake.params.directory), log=log, **settings)
    image_set.save(snakemake.output.images)
    n, *shape = image_set.images.shape
    log.info("%d examples of %s, %d classes", n, " x ".join(map(str, shape)), len(image_set.classes))
