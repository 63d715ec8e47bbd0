"""Write the report: figures, tables and summary.csv, from files alone."""

from pathlib import Path

from paretoprune.reporting.report import write_report
from paretoprune.workflow.logs import logged

with logged("report", snakemake.log[0]) as log:
    params, page = snakemake.params, Path(snakemake.output.page)
    results = page.parents[1]
    write_report(results, params.runs, params.seeds, params.methods, page.parent, params.settings)
    log.info("the report is at %s", page)
