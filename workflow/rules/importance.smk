rule collect_statistics:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        code=code("collect_statistics"),
    output:
        statistics=STATISTICS,
    log:
        f"{RESULTS}/logs/{LOG}/collect_statistics.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/collect_statistics.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=120,
        gpu=lookup("gpus_per_job", within=config),
    params:
        positions=lookup("importance/positions", within=config),
    script:
        "../scripts/collect_statistics.py"


rule compute_importance:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        statistics=statistics_of_score,
        code=code("compute_importance"),
    output:
        scores=f"{SEED}/importance/{{score}}.safetensors",
    log:
        f"{RESULTS}/logs/{LOG}/compute_importance-{{score}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/compute_importance-{{score}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=0,
    params:
        n_images=lookup("importance/images", within=config),
    script:
        "../scripts/compute_importance.py"
