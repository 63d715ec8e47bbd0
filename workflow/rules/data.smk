def dataset_settings(wildcards):
    """What decoding depends on; the sizes of the splits are not part of it."""
    dataset = config["datasets"][wildcards.dataset]
    keys = ("source", "path", "image_size", "channels")
    settings = {key: dataset[key] for key in keys if key in dataset}
    return settings


def image_files(wildcards):
    """The user's own images, so that a changed folder or archive is read again."""
    dataset = config["datasets"][wildcards.dataset]
    own = dataset["source"] == "imagefolder"
    return [str(configuration.data_path(config, dataset["path"]))] if own else []


rule read_images:
    input:
        files=image_files,
        code=code("read_images"),
    output:
        images=IMAGES,
    params:
        settings=dataset_settings,
        directory=lookup("data_directory", within=config),
    log:
        f"{RESULTS}/logs/{{dataset}}/read_images.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/read_images.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        "../../envs/environment.yaml"
    script:
        "../scripts/read_images.py"


rule split_images:
    input:
        images=IMAGES,
        code=code("split_images"),
    output:
        splits=SPLITS,
    params:
        sizes=lambda wildcards: {
            name: config["datasets"][wildcards.dataset][name]
            for name in ("calibration", "search", "test")
        },
    log:
        f"{RESULTS}/logs/{{dataset}}/split_images-seed{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/split_images-seed{{seed}}.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
        gpu=0,
    conda:
        "../../envs/environment.yaml"
    script:
        "../scripts/split_images.py"
