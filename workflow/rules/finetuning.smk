def finetuning_recipe(wildcards):
    """The recipe of fine-tuning; augmentation belongs to the data."""
    members = ("methods", "sparsities", "knee")
    recipe = {k: v for k, v in config["finetune"].items() if k not in members}
    return recipe | config["datasets"][wildcards.dataset]["augmentation"]


rule finetune_members:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        masks=f"{METHOD}/masks.npz",
        code=code("finetune_members"),
    output:
        finetuned=f"{METHOD}/finetuned.csv",
        networks=directory(f"{METHOD}/finetuned"),
    params:
        settings=full_precision,
        recipe=finetuning_recipe,
        members={key: config["finetune"][key] for key in ("sparsities", "knee")},
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/finetune_members.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/finetune_members.tsv"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=720,
        gpu=lookup("gpus_per_job", within=config),
    conda:
        "../../envs/environment.yaml"
    script:
        "../scripts/finetune_members.py"
