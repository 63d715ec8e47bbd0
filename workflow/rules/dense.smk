def network_settings(wildcards):
    """How to make the network, with the place of its checkpoint filled in."""
    network = config["networks"][wildcards.network]
    keys = ("architecture", "arguments", "checkpoint", "normalisation", "exclude")
    settings = {key: network[key] for key in keys}
    if settings["checkpoint"] is not None:
        path = configuration.data_path(config, settings["checkpoint"])
        settings["checkpoint"] = str(path)
    return settings


def training_settings(wildcards):
    """The recipe of the dense network; augmentation belongs to the data. None for a checkpoint."""
    network = config["networks"][wildcards.network]
    if network["checkpoint"] is not None:
        return None
    recipe = configuration.merge(config["training"], network.get("training", {}))
    return recipe | config["datasets"][wildcards.dataset]["augmentation"]


def network_files(wildcards):
    """A checkpoint, and the source file of a user's own factory where it lies beside the workflow."""
    network = network_settings(wildcards)
    factory = network["architecture"].partition(":")[0].replace(".", "/") + ".py"
    own = [factory] if ":" in network["architecture"] and Path(factory).is_file() else []
    return own + ([network["checkpoint"]] if network["checkpoint"] else [])


rule prepare_dense_network:
    input:
        images=IMAGES,
        splits=SPLITS,
        files=network_files,
        code=code("prepare_dense_network"),
    output:
        network=DENSE,
        metrics=METRICS,
    params:
        network=network_settings,
        training=training_settings,
        facts=lambda wildcards: {
            "search_memorised": configuration.search_is_memorised(
                config, wildcards.network
            ),
            "objective": configuration.objective(
                config, wildcards.network, config["search"]["objective"]
            ),
            "source": Path(
                config["networks"][wildcards.network]["checkpoint"] or "trained"
            ).name,
        },
    log:
        f"{RESULTS}/logs/{LOG}/prepare_dense_network.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/prepare_dense_network.tsv"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=720,
        gpu=lookup("gpus_per_job", within=config),
    conda:
        "../../envs/environment.yaml"
    script:
        "../scripts/prepare_dense_network.py"
