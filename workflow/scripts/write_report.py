"""Write the report: figures, tables and summary.csv, from files alone."""

from pathlib import Path

from paretoprune.reporting.report import write_report
from paretoprune.reporting.subject import Subject
from paretoprune.workflow.logs import logged

with logged("report", snakemake.log[0]) as log:
    params, page = snakemake.params, Path(snakemake.output.page)
    results = page.parents[1]
    subject = Subject.of(params.runs, params.seeds, params.methods, params.settings)
    write_report(results, subject, page.parent)
    log.info("the report is at %s", page)
