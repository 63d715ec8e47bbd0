def full_precision(wildcards):
    """How finished networks are judged: by the method's own repair and objective, in float32."""
    settings = configuration.judging_settings(settings_of(wildcards))
    return settings | {"precision": "float32"}


rule evaluate_front:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        masks=f"{METHOD}/masks.npz",
        code=code("evaluate_front"),
    output:
        front=f"{METHOD}/front.csv",
        layers=f"{METHOD}/layers.csv",
    params:
        settings=full_precision,
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/evaluate_front.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/evaluate_front.tsv"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=lookup("gpus_per_job", within=config),
    conda:
        "../../envs/environment.yaml"
    script:
        "../scripts/evaluate_front.py"
