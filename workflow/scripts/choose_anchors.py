"""Choose the light and the heavy anchor and report the corridor between them."""

from paretoprune.files import read_json, write_json
from paretoprune.fronts import Front
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.search.corridor import Corridor, describe_corridor
from paretoprune.settings import AnchorStep
from paretoprune.stages.anchors import find_anchors
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: {method}, anchors".format(**snakemake.wildcards)
with step(name, snakemake.log[0]) as (log, _):
    front = Front.load(snakemake.input.front)
    metrics = read_json(snakemake.input.metrics)
    dense = DenseNetwork.load(snakemake.input.network)
    units, settings = WeightUnits.of(dense.network, dense.exclude), AnchorStep.of(snakemake.params.settings)
    dense_loss = 0.0 if settings.objective == "divergence" else 1 - metrics["accuracy"]["search"]
    chosen = find_anchors(front, dense_loss, metrics["n_classes"], settings)
    anchors = front.select(chosen)
    anchors.save(snakemake.output.anchors)
    bounded = settings.corridors and len(chosen) > 1
    corridor = Corridor.around(anchors.masks, units) if bounded else Corridor.everything(units)
    facts = {
        "light_tolerance": settings.light_tolerance,
        "heavy_tolerance": settings.heavy_tolerance,
        "n_corridors": settings.corridors,
    }
    write_json(snakemake.output.corridor, facts | describe_corridor(front, chosen[0], chosen[-1], corridor))
    log.info("corridor of %d bits out of %d weights", corridor.n_searched, units.n_weights)
