"""paretoprune: dense network -> importance -> Phase 1 -> anchors -> Phase 2 -> fine-tuning -> report."""

from snakemake.utils import min_version

min_version("9.8")


configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/dense.smk"
include: "workflow/rules/importance.smk"
include: "workflow/rules/two_phase.smk"
include: "workflow/rules/baselines.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/finetuning.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.write_report.output,
