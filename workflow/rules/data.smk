rule read_images:
    input:
        files=image_files,
        code=code("read_images"),
    output:
        images=IMAGES,
    log:
        f"{RESULTS}/logs/{{dataset}}/read_images.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/read_images.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    params:
        settings=dataset_settings,
        folders=lambda wildcards: [
            configuration.folder_state(Path(path)) for path in image_files(wildcards)
        ],
        directory=lookup("data_directory", within=config),
    script:
        "../scripts/read_images.py"


rule split_images:
    input:
        images=IMAGES,
        code=code("split_images"),
    output:
        splits=SPLITS,
    log:
        f"{RESULTS}/logs/{{dataset}}/split_images-seed{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/split_images-seed{{seed}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
        gpu=0,
    params:
        sizes=lambda wildcards: {
            name: config["datasets"][wildcards.dataset][name]
            for name in ("calibration", "search", "test")
        },
    script:
        "../scripts/split_images.py"
