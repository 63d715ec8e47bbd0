rule evaluate_front:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        code=code("evaluate_front"),
    output:
        front=f"{METHOD}/front.csv",
        layers=f"{METHOD}/layers.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/evaluate_front.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/evaluate_front.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=lookup("gpus_per_job", within=config),
    script:
        "../scripts/evaluate_front.py"
