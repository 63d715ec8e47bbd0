rule search_thresholds:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        statistics=statistics_of_method,
        scores=score_files(configuration.phase1_scores),
        code=code("search_thresholds"),
    output:
        front=f"{METHOD}/phase1.npz",
        history=f"{METHOD}/phase1_history.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/search_thresholds.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/search_thresholds.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "two_phase")),
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=lookup("gpus_per_job", within=config),
    params:
        settings=step_of("threshold_step"),
    script:
        "../scripts/search_thresholds.py"


rule choose_anchors:
    input:
        front=phase1_file("phase1.npz"),
        network=DENSE,
        metrics=METRICS,
        code=code("choose_anchors"),
    output:
        anchors=f"{METHOD}/anchors.npz",
        corridor=f"{METHOD}/anchors.json",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/choose_anchors.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/choose_anchors.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "two_phase")),
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
        gpu=0,
    params:
        settings=step_of("anchor_step"),
    script:
        "../scripts/choose_anchors.py"


rule search_corridor:
    input:
        images=IMAGES,
        splits=SPLITS,
        network=DENSE,
        statistics=statistics_of_method,
        scores=score_files(lambda settings: settings.phase2.scores),
        front=phase1_file("phase1.npz"),
        history=phase1_file("phase1_history.csv"),
        anchors=f"{METHOD}/anchors.npz",
        code=code("search_corridor"),
    output:
        masks=f"{METHOD}/masks.npz",
        networks=f"{METHOD}/networks.safetensors",
        history=f"{METHOD}/history.csv",
    log:
        f"{RESULTS}/logs/{LOG}/{{method}}/search_corridor.log",
    benchmark:
        f"{RESULTS}/benchmarks/{LOG}/{{method}}/search_corridor.tsv"
    wildcard_constraints:
        method=any_of(configuration.methods_of_kind(config, "two_phase")),
    conda:
        "../../envs/environment.yaml"
    threads: lookup("threads_per_search", within=config)
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=lookup("gpus_per_job", within=config),
        prefix_cache_mb=lookup("prefix_cache_mb", within=config),
    params:
        settings=step_of("corridor_step"),
    script:
        "../scripts/search_corridor.py"
