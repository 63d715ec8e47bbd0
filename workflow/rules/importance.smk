rule compute_importance:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
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
