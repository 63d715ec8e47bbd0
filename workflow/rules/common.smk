"""Shared by all rules: the checked configuration, where files lie, and what a rule depends on."""

import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
SCRIPTS = ROOT / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

from paretoprune.importance.registry import SCORE_NEEDS
from paretoprune.workflow import configuration
from paretoprune.workflow.resolving import resolved
from paretoprune.workflow.reruns import import_closure
from paretoprune.workflow.runtimes import unusable_runtime
from paretoprune.workflow.schema import configuration_schema
from paretoprune.workflow.trial import unbuildable_networks

schema = configuration_schema()
typed = resolved(configuration.with_new_names(config), schema)
try:
    configuration.check_configuration(typed, schema)
    # Not again in every job: it takes seconds.
    if workflow.is_main_process:
        problems = list(unbuildable_networks(typed))
        # Steps in environments of their own have other packages than this process, those on a cluster another machine.
        if workflow.local_exec and not workflow.deployment_settings.deployment_method:
            problems += unusable_runtime(typed)
        if problems:
            raise configuration.ConfigurationError.of(problems)
except configuration.ConfigurationError as error:
    raise WorkflowError(str(error)) from None
# In place: Snakemake and all rules hold this one dictionary.
config.clear()
config.update(typed)

RESULTS = config["results_directory"]
IMAGES = f"{RESULTS}/{{dataset}}/data/images.safetensors"
SPLITS = f"{RESULTS}/{{dataset}}/data/splits-seed{{seed}}.npz"
SEED = f"{RESULTS}/{{dataset}}/{{network}}/seed{{seed}}"
DENSE = f"{SEED}/dense/model.safetensors"
STATISTICS = f"{SEED}/statistics.safetensors"
METRICS = f"{SEED}/dense/metrics.json"
METHOD = f"{SEED}/{{method}}"
LATENCY = f"{RESULTS}/{{dataset}}/{{network}}/latency.json"
LOG = "{dataset}/{network}/seed{seed}"
# What a step asks for that no other may run beside; on a cluster, where a job has no more than it asks for, the threads
# that are timed.
EVERY_CORE = (
    workflow.local_exec and workflow.resource_settings.cores
) or configuration.latency_of(config).threads


wildcard_constraints:
    dataset="[A-Za-z0-9_.-]+",
    network="[A-Za-z0-9_.-]+",
    seed="[0-9]+",
    score="[a-z]+",
    method="[A-Za-z0-9_.-]+",


def code(script):
    """The modules behind a script: Snakemake itself only notices changes of the script."""
    closure = import_closure(SCRIPTS / f"{script}.py", SCRIPTS)
    return [os.path.relpath(path) for path in closure]


def any_of(names):
    """A wildcard constraint that matches the given names, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def settings_of(wildcards):
    """The settings of a method, with the loss that its network calls for."""
    return configuration.method_of(config, wildcards.method, wildcards.network)


def step_of(name):
    """A parameter function for the settings that a step depends on, a property of `settings.ComparedMethod`."""
    return lambda wildcards: getattr(settings_of(wildcards), name).plain()


def score_files(names):
    """An input function for importance scores; `names` maps the settings of a method to them."""
    return lambda wildcards: [
        f"{SEED}/importance/{score}.safetensors".format(**wildcards)
        for score in dict.fromkeys(names(settings_of(wildcards)))
    ]


def statistics_of_method(wildcards):
    """The layer statistics, for a method that re-fits weights."""
    refits = configuration.refits(settings_of(wildcards))
    return [STATISTICS.format(**wildcards)] if refits else []


def statistics_of_score(wildcards):
    """The layer statistics, for a score that follows from them."""
    needed = "statistics" in SCORE_NEEDS[wildcards.score]
    return [STATISTICS.format(**wildcards)] if needed else []


def of_first_seed(file):
    """An input function for a file of a dataset and a network, that of their smallest seed: times do not depend on it."""

    def input_file(wildcards):
        pair = {"dataset": wildcards.dataset, "network": wildcards.network}
        run = next(run for run in config["runs"] if pair.items() <= run.items())
        return file.format(**pair, seed=min(configuration.seeds_of(config, run)))

    return input_file


def latency_table(wildcards):
    """The table of a network's times, for a search after latency."""
    wanted = "latency" in settings_of(wildcards).costs
    return [LATENCY.format(**wildcards)] if wanted else []


def timing_of_search(wildcards):
    """What networks will run on, for a search after latency; None elsewhere, so that nothing runs again for it."""
    timing = configuration.latency_of(config).timing.plain()
    return timing if latency_table(wildcards) else None


def each_method(file, methods):
    """A file of every dataset, network and seed, for each of some methods."""
    return [
        f"{METHOD}/{file}".format(**run, seed=seed, method=method)
        for run in config["runs"]
        for seed in configuration.seeds_of(config, run)
        for method in methods
    ]


def latency_tables():
    """The tables of all runs, where methods search after latency."""
    wanted = "latency" in configuration.costs_of(config)
    return [LATENCY.format(**run) for run in config["runs"] if wanted]


def timing_of_report():
    """What members were timed on, and how well their times were to be known; empty where none are timed."""
    timed = configuration.timed_methods(config)
    return configuration.latency_of(config).timing.plain() if timed else {}


def dataset_settings(wildcards):
    """What decoding depends on; the sizes of the splits are not part of it."""
    dataset = config["datasets"][wildcards.dataset]
    keys = ("source", *configuration.keys_of_source(dataset["source"]))
    return {key: dataset[key] for key in keys if key in dataset}


def image_files(wildcards):
    """The user's own data: a folder, an archive, or a file of arrays."""
    path = config["datasets"][wildcards.dataset].get("path")
    return [str(configuration.data_path(config, path))] if path else []


def network_settings(wildcards):
    """How to make the network, with the place of its checkpoint filled in."""
    network = config["networks"][wildcards.network]
    keys = ("architecture", "arguments", "checkpoint", "normalisation", "exclude")
    settings = {key: network[key] for key in keys}
    if settings["checkpoint"] is not None:
        path = configuration.data_path(config, settings["checkpoint"])
        settings["checkpoint"] = str(path)
        # Left out where it says nothing, so that naming none reruns nothing.
        if network.get("checkpoint_key") is not None:
            settings["checkpoint_key"] = network["checkpoint_key"]
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
    package, _, function = network["architecture"].partition(":")
    factory = Path(*package.split(".")).with_suffix(".py")
    own = [str(factory)] if function and factory.is_file() else []
    return own + ([network["checkpoint"]] if network["checkpoint"] else [])


def phase1_file(file):
    """An input function for a result of the Phase 1 that a method continues, its own or a shared one."""
    return lambda wildcards: f"{METHOD}/{file}".format(
        **{
            **wildcards,
            "method": configuration.phase1_source(config, wildcards.method),
        }
    )


def finetuning_recipe(wildcards):
    """The recipe of fine-tuning; augmentation belongs to the data."""
    members = ("methods", "sparsities", "knee")
    recipe = {k: v for k, v in config["finetune"].items() if k not in members}
    return recipe | config["datasets"][wildcards.dataset]["augmentation"]


def compared(kind):
    """The methods of one kind that are compared."""
    of_kind = configuration.methods_of_kind(config, kind)
    return [name for name in config["methods"] if name in of_kind]
