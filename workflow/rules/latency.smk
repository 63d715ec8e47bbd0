rule measure_latency:
    input:
        images=IMAGES,
        splits=of_first_seed(SPLITS),
        network=of_first_seed(DENSE),
        code=code("measure_latency"),
    output:
        table=LATENCY,
    log:
        f"{RESULTS}/logs/{{dataset}}/{{network}}/measure_latency.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/{{network}}/measure_latency.tsv"
    conda:
        "../../envs/environment.yaml"
    # Every core, so that no other step runs beside it.
    threads: EVERY_CORE
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=0,
    params:
        settings=configuration.latency_of(config).tabulating.plain(),
    script:
        "../scripts/measure_latency.py"


rule time_members:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        code=code("time_members"),
    output:
        times=f"{METHOD}/latency.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/time_members.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/time_members.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "channels")),
    conda:
        "../../envs/environment.yaml"
    # Every core, so that no other step runs beside it.
    threads: EVERY_CORE
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=0,
    params:
        settings=configuration.latency_of(config).timing.plain(),
    script:
        "../scripts/time_members.py"
