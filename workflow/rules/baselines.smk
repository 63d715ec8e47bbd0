rule search_flat:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        statistics=statistics_of_method,
        code=code("search_flat"),
    output:
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        history=f"{METHOD}/history.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/search_flat.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/search_flat.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "flat")),
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=lookup("gpus_per_job", within=config),
    params:
        settings=step_of("flat_step"),
    script:
        "../scripts/search_flat.py"


rule sweep_allocation:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        statistics=statistics_of_method,
        scores=score_files(lambda settings: [settings.importance]),
        code=code("sweep_allocation"),
    output:
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        history=f"{METHOD}/history.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/sweep_allocation.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/sweep_allocation.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "allocation")),
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=lookup("gpus_per_job", within=config),
    params:
        settings=step_of("allocation_step"),
    script:
        "../scripts/sweep_allocation.py"
