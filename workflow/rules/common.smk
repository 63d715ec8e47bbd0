"""Shared by all rules: the checked configuration, where files lie, and what a rule depends on."""

import sys
from pathlib import Path

import yaml

ROOT = Path(workflow.basedir)
SCRIPTS = ROOT / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

from paretoprune import configuration
from paretoprune.sources import import_closure

try:
    configuration.check_configuration(
        config,
        yaml.safe_load(
            (ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text()
        ),
    )
except configuration.ConfigurationError as error:
    raise WorkflowError(str(error)) from None

RESULTS = config["results_directory"]
IMAGES = f"{RESULTS}/{{dataset}}/data/images.safetensors"
SPLITS = f"{RESULTS}/{{dataset}}/data/splits-seed{{seed}}.npz"
SEED = f"{RESULTS}/{{dataset}}/{{network}}/seed{{seed}}"
DENSE = f"{SEED}/dense/model.safetensors"
METRICS = f"{SEED}/dense/metrics.json"
METHOD = f"{SEED}/{{method}}"
LOG = "{dataset}/{network}/seed{seed}"


wildcard_constraints:
    dataset="[A-Za-z0-9_.-]+",
    network="[A-Za-z0-9_.-]+",
    seed="[0-9]+",
    score="[a-z]+",
    method="[A-Za-z0-9_-]+",


def code(script):
    """The modules behind a script: Snakemake itself only notices changes of the script."""
    closure = import_closure(SCRIPTS / f"{script}.py", SCRIPTS)
    return [os.path.relpath(path) for path in closure]


def any_of(names):
    """A wildcard constraint that matches the given names, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def settings_of(wildcards):
    """The settings of a method, with the objective that its network calls for."""
    settings = configuration.method_settings(config, wildcards.method)
    settings["objective"] = configuration.objective(
        config, wildcards.network, settings["objective"]
    )
    return settings


def score_files(names):
    """An input function for importance scores; `names` maps the settings of a method to them."""
    return lambda wildcards: [
        f"{SEED}/importance/{score}.safetensors".format(**wildcards)
        for score in dict.fromkeys(names(settings_of(wildcards)))
    ]


def each_method(file, methods):
    """A file of every dataset, network and seed, for each of some methods."""
    return [
        f"{METHOD}/{file}".format(**run, seed=seed, method=method)
        for run in config["runs"]
        for seed in config["seeds"]
        for method in methods
    ]
