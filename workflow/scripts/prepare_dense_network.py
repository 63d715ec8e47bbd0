"""Train the dense network, or load it from a checkpoint, and measure it on every split."""

from paretoprune.files import write_json
from paretoprune.training.dense import measure_dense, prepare_dense
from paretoprune.workflow.steps import step

name = "{dataset} {network} seed {seed}: dense".format(**snakemake.wildcards)
with step(name, snakemake.log[0], snakemake.threads, snakemake.resources.gpu) as (log, device):
    dense = prepare_dense(
        snakemake.input.images,
        snakemake.input.splits,
        snakemake.params.network,
        snakemake.params.training,
        seed=int(snakemake.wildcards.seed),
        device=device,
        log=log,
        resume=f"{snakemake.output.network}.resume",
    )
    dense.save(snakemake.output.network)
    metrics = measure_dense(dense, snakemake.input.images, snakemake.input.splits, device)
    write_json(snakemake.output.metrics, {**snakemake.wildcards, **snakemake.params.facts, **metrics})
    log.info("accuracy: %s", ", ".join(f"{k} {100 * v:.2f} %" for k, v in metrics["accuracy"].items()))
