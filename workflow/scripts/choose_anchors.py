"""Choose the light and the heavy anchor and report the corridor between them."""

from paretoprune.files import read_json, write_json
from paretoprune.fronts import Front
from paretoprune.masks.units import MaskLayout
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.search.corridor import anchors_between, choose_anchors, corridor_around, describe_corridor
from paretoprune.settings import AnchorStep
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, anchors".format(**snakemake.wildcards)
with step(name, snakemake.log[0]) as (log, _):
    front = Front.load(snakemake.input.front)
    metrics = read_json(snakemake.input.metrics)
    dense = DenseNetwork.load(snakemake.input.network)
    layout = MaskLayout.of(dense.network, dense.exclude)
    settings = AnchorStep.of(snakemake.params.settings)
    dense_error = 0.0 if settings.objective == "divergence" else 1 - metrics["accuracy"]["search"]
    tolerances = {"light_tolerance": settings.light_tolerance, "heavy_tolerance": settings.heavy_tolerance}
    light, heavy = choose_anchors(front, dense_error, 1 - 1 / metrics["n_classes"], **tolerances)
    anchors = anchors_between(front, light, heavy, max(1, settings.corridors))
    front.select(anchors).save(snakemake.output.anchors)
    corridor = corridor_around(front.masks.select(anchors), settings.corridors, layout)
    description = describe_corridor(front, light, heavy, corridor)
    write_json(snakemake.output.corridor, {**tolerances, "n_corridors": settings.corridors, **description})
    log.info("corridor of %d bits out of %d weights", corridor.n_searched, layout.n_weights)
