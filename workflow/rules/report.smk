rule write_report:
    input:
        metrics=[
            METRICS.format(**run, seed=seed)
            for run in config["runs"]
            for seed in configuration.seeds_of(config, run)
        ],
        fronts=each_method("front.csv", config["methods"]),
        layers=each_method("layers.csv", compared("two_phase")),
        histories=each_method("history.csv", config["methods"]),
        corridors=each_method("anchors.json", compared("two_phase")),
        finetuned=each_method("finetuned.csv", config["finetune"]["methods"]),
        times=each_method("latency.csv", configuration.timed_methods(config)),
        tables=latency_tables(),
        template=f"{os.path.relpath(SCRIPTS)}/paretoprune/reporting/report.html.jinja",
        code=code("write_report"),
    output:
        page=f"{RESULTS}/report/index.html",
        summary=f"{RESULTS}/report/summary.csv",
        comparison=f"{RESULTS}/report/comparison.csv",
        sparsities=f"{RESULTS}/report/sparsities.csv",
        phase2_gain=f"{RESULTS}/report/phase2_gain.csv",
        figures=directory(f"{RESULTS}/report/figures"),
    log:
        f"{RESULTS}/logs/write_report.log",
    benchmark:
        f"{RESULTS}/benchmarks/write_report.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
        gpu=0,
    params:
        runs=[
            run
            | {
                "objective": configuration.loss_of(config, run["network"]),
                "costs": configuration.costs_of(config),
                "seeds": configuration.seeds_of(config, run),
            }
            for run in config["runs"]
        ],
        seeds=config["seeds"],
        methods=config["methods"],
        settings={
            "method_kinds": {
                name: config["method_settings"][name]["kind"]
                for name in config["methods"]
            },
            "finetuned_methods": config["finetune"]["methods"],
            "timed_methods": configuration.timed_methods(config),
            # Nothing where nothing is timed, so that no report is written again for it.
            "timing": timing_of_report(),
            "reference": configuration.reference_method(config),
        },
    script:
        "../scripts/write_report.py"


rule figures:
    input:
        rules.write_report.output,
