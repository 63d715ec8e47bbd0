rule finetune_members:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        code=code("finetune_members"),
    output:
        finetuned=f"{METHOD}/finetuned.csv",
        networks=directory(f"{METHOD}/finetuned"),
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/finetune_members.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/finetune_members.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=720,
        gpu=lookup("gpus_per_job", within=config),
    params:
        recipe=finetuning_recipe,
        members={key: config["finetune"][key] for key in ("sparsities", "knee")},
    script:
        "../scripts/finetune_members.py"
