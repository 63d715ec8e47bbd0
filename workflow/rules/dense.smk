rule prepare_dense_network:
    input:
        images=IMAGES,
        splits=SPLITS,
        files=network_files,
        code=code("prepare_dense_network"),
    output:
        network=DENSE,
        metrics=METRICS,
    log:
        f"{RESULTS}/logs/{LOG}/prepare_dense_network.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/prepare_dense_network.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=720,
        gpu=lookup("gpus_per_job", within=config),
    params:
        network=network_settings,
        training=training_settings,
        facts=lambda wildcards: {
            "search_memorised": configuration.search_is_memorised(
                config, wildcards.network
            ),
            "source": Path(
                config["networks"][wildcards.network]["checkpoint"] or "trained"
            ).name,
        },
    script:
        "../scripts/prepare_dense_network.py"
