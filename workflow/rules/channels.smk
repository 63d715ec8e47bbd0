rule search_channels:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        table=latency_table,
        code=code("search_channels"),
    output:
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        history=f"{METHOD}/history.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/search_channels.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/search_channels.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "channels")),
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=lookup("gpus_per_job", within=config),
    params:
        settings=step_of("channel_step"),
        timing=timing_of_search,
    script:
        "../scripts/search_channels.py"
