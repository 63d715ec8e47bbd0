"""paretoprune: dense network -> importance -> Phase 1 -> anchors -> Phase 2 -> fine-tuning -> report."""

from pathlib import Path

from snakemake.utils import min_version

min_version("9.8")


# From any folder: the defaults beside this file, and what a config.yaml in the working folder changes.
configfile: f"{workflow.basedir}/config.yaml"


if Path("config.yaml").is_file() and not Path("config.yaml").samefile(
    f"{workflow.basedir}/config.yaml"
):

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/dense.smk"
include: "workflow/rules/importance.smk"
include: "workflow/rules/two_phase.smk"
include: "workflow/rules/latency.smk"
include: "workflow/rules/channels.smk"
include: "workflow/rules/baselines.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/finetuning.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.write_report.output,
