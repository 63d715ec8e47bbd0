"""Checking a configuration before anything starts, and working out what its parts mean together."""

import copy
import difflib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema

from paretoprune.importance.allocation import STARTS
from paretoprune.networks.names import broken_architecture
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.search.sparse_ea import n_groups_within
from paretoprune.settings import AUTO, CHANNEL_COSTS, LATENCY, N_CHANNEL_STARTS, REFIT_GUIDE, ComparedMethod, Latency
from paretoprune.workflow.resolving import expanded
from paretoprune.workflow.sections import OWN_KEYS

Config = Mapping[str, Any]
# Keys of `search` and of the entries of `method_settings` by their old names, which go on working.
RENAMED = {"ladder": "densities", "refine": "sequential_refit", "objective": "objectives"}


class ConfigurationError(ValueError):
    """The configuration cannot be used; the message lists every problem found."""

    @classmethod
    def of(cls, problems: Iterable[str]) -> "ConfigurationError":
        """With a line for each problem."""
        lines = [f"\n  - {problem}" for problem in dict.fromkeys(problems)]
        return cls(f"the configuration has {len(lines)} problem(s):{''.join(lines)}")


def check_configuration(config: Config, schema: Config) -> None:
    """Check a configuration against its schema, its own cross-references and the files it names.

    Args:
        config: The merged configuration; old names of keys are taken for the new ones.
        schema: The JSON schema, from `workflow.schema.configuration_schema`.

    Raises:
        ConfigurationError: With one line for each problem, what was found and what to do about it.
    """
    config = with_new_names(config)
    validator = jsonschema.Draft202012Validator(schema)
    problems = [line for error in validator.iter_errors(config) for line in _describe(error)]
    # References are only worth following in a configuration whose shape is right.
    problems = problems or list(_broken_references(config)) or list(_missing_files(config))
    if problems:
        raise ConfigurationError.of(problems)


def with_new_names(config: Config) -> dict[str, Any]:
    """A copy of a configuration in which keys under old names have their new ones, see `RENAMED`.

    Where both are there, the old one goes first: a user's file is laid over `config.yaml`, which has the new one.
    """
    renamed = copy.deepcopy(dict(config))
    methods = renamed.get("method_settings")
    for settings in (renamed.get("search"), *(methods.values() if isinstance(methods, dict) else ())):
        if isinstance(settings, dict):
            for old in RENAMED.keys() & settings.keys():
                new, value = RENAMED[old], settings.pop(old)
                settings.update(merge(settings, {new: [value, "density"] if old == "objective" else value}))
    return renamed


def _describe(error: jsonschema.ValidationError) -> Iterator[str]:
    where = ".".join(str(part) for part in error.absolute_path)
    rule: Any = error.schema
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = list(rule.get("properties", {}))
        for key in sorted(set(dict(instance)) - set(known), key=str):
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
            yield f"unknown key '{f'{where}.' if where else ''}{key}'; {hint}"
        return
    meaning = rule.get("description")
    yield f"{where or 'configuration'}: {error.message}" + (f" ({meaning})" if meaning else "")


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"defined: {', '.join(known)}"


def _broken_references(config: Config) -> Iterator[str]:
    for key in ("results_directory", "data_directory"):
        if set("{}") & set(config[key]):
            yield f"{key}: braces are wildcards to Snakemake, found '{config[key]}'; choose a name without them"
        elif config[key].startswith("~") or "$" in config[key]:
            yield f"{key}: no such user or variable is known, found '{config[key]}'; write the path out"
    yield from _not_finite(config)
    for name in dict.fromkeys(run["network"] for run in config["runs"] if run["network"] in config["networks"]):
        network = config["networks"][name]
        if problem := broken_architecture(network["architecture"], network["arguments"]):
            yield f"networks.{name}.architecture: {problem}"
    for name, dataset in config["datasets"].items():
        yield from _broken_dataset(name, dataset)
    for run in config["runs"]:
        for part in ("dataset", "network"):
            if run[part] not in config[f"{part}s"]:
                yield f"runs: no {part} '{run[part]}' under `{part}s`; {_suggest(run[part], config[f'{part}s'])}"
    pairs = [(run["dataset"], run["network"]) for run in config["runs"]]
    for dataset, network in sorted({pair for pair in pairs if pairs.count(pair) > 1}):
        yield f"runs: dataset '{dataset}' and network '{network}' are listed twice; join their `seeds` in one run"
    settings = config["method_settings"]
    for name in [*config["methods"], *config["finetune"]["methods"]]:
        if name not in settings:
            yield f"methods: no method '{name}' under `method_settings`; {_suggest(name, settings)}"
    for name in config["finetune"]["methods"]:
        if name in settings and name not in config["methods"]:
            yield f"finetune.methods: '{name}' is not among `methods`; add it there or remove it here"
    reference = reference_method(config)
    if reference not in config["methods"]:
        close = _suggest(reference, dict.fromkeys(config["methods"]))
        yield f"report.reference: expected one of `methods`, found '{reference}'; {close}"
    for name in config["methods"]:
        if name in settings:
            yield from _broken_method(config, name)
    latency = latency_of(config)
    if latency.most_repeats < latency.repeats:
        yield (
            f"latency: expected most_repeats of at least the {latency.repeats} repeats, found {latency.most_repeats}; "
            "raise it or lower `repeats`"
        )


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    """Numbers that no range of the schema refuses, as nothing is larger or smaller than nan."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield from _not_finite(inner, f"{where}.{key}" if where else str(key))
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: expected a finite number, found {value}; correct it"


def keys_of_source(source: str) -> tuple[str, ...]:
    """The keys of a dataset that say how it is read, beside its source."""
    return OWN_KEYS.get(source, ())


def _broken_dataset(name: str, dataset: Config) -> Iterator[str]:
    """What does not fit together in how a dataset is read."""
    source = dataset["source"]
    every = dict.fromkeys(key for keys in OWN_KEYS.values() for key in keys if key != "augmentation")
    if odd := [key for key in every if key in dataset and key not in keys_of_source(source)]:
        where = [one for one, keys in OWN_KEYS.items() if set(odd) <= set(keys)]
        fits = f" (for {', '.join(where)})" if where else ""
        yield f"datasets.{name}: {', '.join(odd)} do not fit source '{source}'{fits}; remove"
    size, resize = dataset.get("image_size"), dataset.get("resize")
    if resize is not None and (size is None or resize < size):
        yield f"datasets.{name}: resize {resize} needs an image_size that is no larger, found {size}; set it"
    between = dataset.get("value_range")
    if isinstance(between, Sequence) and not isinstance(between, str) and between[0] >= between[1]:
        yield f"datasets.{name}: expected value_range [black, white] to grow, found {list(between)}; reorder it"


def _broken_method(config: Config, name: str) -> Iterator[str]:
    own, method = config["method_settings"][name], method_of(config, name)
    if method.kind == "allocation" and method.allocation is None:
        yield f"method_settings.{name}: a method of kind 'allocation' needs `allocation`, the rule"
    if "objectives" in own:
        yield f"method_settings.{name}: hypervolumes on different objectives cannot be compared; set search.objectives"
    for cost in CHANNEL_COSTS if method.kind != "channels" else ():
        if cost in method.costs:
            yield (
                f"method_settings.{name}: {cost} is a cost of networks that get smaller (kind channels), found kind "
                f"'{method.kind}'; compare methods of kind channels alone, or remove {cost} from search.objectives"
            )
    if method.densities.lowest >= method.densities.highest:
        yield f"method_settings.{name}: densities.lowest must be smaller than densities.highest"
    if method.kind != "allocation":
        yield from _broken_effort(method, name)
    if method.kind == "two_phase":
        yield from _broken_phases(method, name)
        yield from _broken_refitting(method, name)
        if method.anchors.light_tolerance >= method.anchors.heavy_tolerance:
            yield f"method_settings.{name}: anchors.light_tolerance must be smaller than anchors.heavy_tolerance"
    if method.phase1_from is not None:
        yield from _broken_source(config, method, name)


def _broken_effort(method: ComparedMethod, name: str) -> Iterator[str]:
    """Too few candidates for a search."""
    if method.kind == "channels":
        if method.search_repair not in (None, method.repair):
            yield (
                f"method_settings.{name}: a search over channels repairs candidates as they will be shipped, found "
                f"search_repair '{method.search_repair}' beside repair '{method.repair}'; set it to null"
            )
        needed = N_CHANNEL_STARTS + method.population
        if method.budget.phase1 < needed:
            yield (
                f"method_settings.{name}: Phase 1 gets {method.budget.phase1} evaluations, expected at least {needed} "
                f"({N_CHANNEL_STARTS} starting allocations and a population of {method.population}); "
                "raise `evaluations` or lower `population`"
            )
        return
    smallest = method.population * (1 if method.kind == "flat" else 4)
    if method.evaluations < smallest:
        yield (
            f"method_settings.{name}: evaluations is {method.evaluations}, expected at least {smallest} for a "
            f"population of {method.population}; raise `evaluations` or lower `population`"
        )
    if method.kind == "flat" and method.flat.has_scores:
        groups = n_groups_within(method.evaluations, method.flat.score_share)
        if method.evaluations < groups + method.population:
            yield (
                f"method_settings.{name}: evaluations is {method.evaluations}, expected at least "
                f"{groups + method.population} ({groups} groups of weights to score and a population of "
                f"{method.population}); raise `evaluations`, or lower `population` or `flat.score_share`"
            )


def _broken_phases(method: ComparedMethod, name: str) -> Iterator[str]:
    """Too few candidates for one of the two phases."""
    phase1, budget = method.phase1, method.budget
    needed = phase1.least_evaluations(method.population)
    if budget.phase1 < needed:
        yield (
            f"method_settings.{name}: Phase 1 gets {budget.phase1} evaluations, expected at least "
            f"{needed} ({phase1.n_starts} starting allocations, a population of {method.population} and "
            f"{phase1.n_reselected} members chosen anew); raise "
            "`evaluations` or `phase1.share`, or start from fewer densities"
        )
    if phase1.share < 1 and budget.phase1 >= budget.total:
        yield f"method_settings.{name}: phase1.share leaves Phase 2 no evaluations; lower it, or 1 for none at all"


def _broken_refitting(method: ComparedMethod, name: str) -> Iterator[str]:
    """What only makes sense where candidates are re-fitted."""
    refits = REPAIR_REFITS[method.repair_in_search]
    if method.phase2.follows_refits and not refits:
        yield f"method_settings.{name}: guide '{REFIT_GUIDE}' needs repair reconstruct during the search; remove it"
    if method.phase2.guides[0] == REFIT_GUIDE:
        yield f"method_settings.{name}: the first guide shapes the first population and must be a score; reorder them"
    if method.phase1.n_reselected and not refits:
        yield f"method_settings.{name}: phase1.n_reselected needs repair reconstruct during the search; set it to 0"


def _broken_source(config: Config, method: ComparedMethod, name: str) -> Iterator[str]:
    """Phase 1 from a method that has none, or another one."""
    settings, source = config["method_settings"], phase1_source(config, name)
    if method.kind != "two_phase" or settings.get(source, {}).get("kind") != "two_phase":
        yield f"method_settings.{name}: phase1_from joins methods of kind two_phase; '{source}' or '{name}' is none"
    elif settings[source].get("phase1_from"):
        yield f"method_settings.{name}: phase1_from names '{source}', which takes its own Phase 1 from elsewhere"
    elif method.threshold_step != method_of(config, source).threshold_step:
        yield (
            f"method_settings.{name}: phase1_from takes Phase 1 from '{source}', but the two differ in settings that "
            "Phase 1 depends on; make them equal or remove phase1_from"
        )


def _missing_files(config: Config) -> Iterator[str]:
    if not config["inputs_needed"]:
        return
    for run in config["runs"]:
        dataset, network = config["datasets"][run["dataset"]], config["networks"][run["network"]]
        images, checkpoint = dataset.get("path"), network["checkpoint"]
        if images is not None and not data_path(config, images).exists():
            place = data_path(config, images)
            yield f"datasets.{run['dataset']}.path: expected '{place}', found nothing there; {_remedy_for(images)}"
        if checkpoint is not None and not data_path(config, checkpoint).is_file():
            place = data_path(config, checkpoint)
            yield (
                f"networks.{run['network']}.checkpoint: expected '{place}', found nothing that is a file; "
                f"{_remedy_for(checkpoint)}"
            )


def _remedy_for(path: str) -> str:
    """What to do about a path that leads nowhere."""
    return "download it, and give the file" if "://" in path else "correct it or `data_directory`"


def merge(base: Config, override: Config) -> dict[str, Any]:
    """`base` with `override` laid over it, nested mappings key by key; neither is changed."""
    merged = copy.deepcopy(dict(base))
    for key, value in override.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def seeds_of(config: Config, run: Config) -> list[int]:
    """The seeds of one run: its own, or those of all."""
    return list(run.get("seeds", config["seeds"]))


def data_path(config: Config, path: str) -> Path:
    """A path of a dataset or checkpoint: as it stands when absolute, otherwise inside `data_directory`."""
    return Path(expanded(config["data_directory"])) / expanded(path)


def folder_state(folder: Path) -> str:
    """A digest that changes when files in a folder are added, removed, moved or edited; empty for a file."""
    if not folder.is_dir():
        return ""
    # Links to folders are followed, as reading does; one that leads back to a folder around it ends there.
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = {name: os.path.realpath(Path(place, name)) for name in folders}
        folders[:] = [name for name in folders if not (Path(place, name).is_symlink() and inner[name] in seen)]
        seen.update(inner.values())
        found += [Path(place, name) for name in names if Path(place, name).is_file()]
    files = sorted((path.relative_to(folder).as_posix(), path.stat()) for path in found)
    states = repr([(name, state.st_size, state.st_mtime_ns) for name, state in files])
    return hashlib.blake2b(states.encode(), digest_size=16).hexdigest()


def method_of(config: Config, name: str, network: str | None = None) -> ComparedMethod:
    """Everything that holds for one method: the common `search` settings with the method's own laid over them.

    Args:
        config: The configuration, under new names.
        name: The method.
        network: Whose loss `auto` stands for; None to leave it open.
    """
    method = ComparedMethod.of(merge(config["search"], config["method_settings"][name]))
    return method if network is None else replace(method, objectives=(loss_of(config, network), *method.costs))


def methods_of_kind(config: Config, kind: str) -> list[str]:
    """Names of all defined methods of one kind, whether compared or not."""
    return sorted(name for name, own in config["method_settings"].items() if own["kind"] == kind)


def latency_of(config: Config) -> Latency:
    """How networks are timed."""
    return Latency.of(config.get("latency", {}))


def timed_methods(config: Config) -> list[str]:
    """The compared methods whose members are timed."""
    if not (latency_of(config).measure or LATENCY in costs_of(config)):
        return []
    of_kind = methods_of_kind(config, "channels")
    return [name for name in config["methods"] if name in of_kind]


def reference_method(config: Config) -> str:
    """The method that the report tests the others against: the first, unless `report` names another."""
    return str(config.get("report", {}).get("reference") or config["methods"][0])


def phase1_source(config: Config, name: str) -> str:
    """The method whose Phase 1 a two-phase method continues: itself, unless it shares another's."""
    return config["method_settings"][name].get("phase1_from") or name


def phase1_scores(method: ComparedMethod) -> list[str]:
    """The score that thresholds cut, and those that the starting allocations follow."""
    return [method.importance, *(STARTS[name][1] for name in method.phase1.starts)]


def refits(method: ComparedMethod) -> bool:
    """Whether weights are chosen anew, of candidates or of finished networks, for which layer statistics are needed."""
    return REPAIR_REFITS[method.repair_in_search] or REPAIR_REFITS[method.repair]


def search_is_memorised(config: Config, network: str) -> bool:
    """Whether the network may have been trained on the search images: a checkpoint, unless it says otherwise."""
    own = config["networks"][network]
    return own["checkpoint"] is not None and not own.get("search_held_out", False)


def loss_of(config: Config, network: str) -> str:
    """The loss; behind `auto` the divergence where the search images are memorised, the error elsewhere."""
    loss = str(config["search"]["objectives"][0])
    if loss != AUTO:
        return loss
    return "divergence" if search_is_memorised(config, network) else "error"


def costs_of(config: Config) -> list[str]:
    """What is minimised beside the loss."""
    return list(config["search"]["objectives"][1:])
