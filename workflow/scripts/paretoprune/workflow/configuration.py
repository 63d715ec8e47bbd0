"""Checking a configuration before anything starts, and working out what its parts mean together."""

import copy
import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema

from paretoprune.importance.allocation import STARTS
from paretoprune.settings import REFIT_GUIDE, SPARSE_ALGORITHMS, Budget, Compute, Searching

Config = Mapping[str, Any]
# Settings that say which members of a front are published.
PUBLISHING = ("front_size", "sparsities")


class ConfigurationError(ValueError):
    """The configuration cannot be used; the message lists every problem found."""


def check_configuration(config: Config, schema: Config) -> None:
    """Check a configuration against its schema, its own cross-references and the files it names.

    Args:
        config: The merged configuration.
        schema: The JSON schema.

    Raises:
        ConfigurationError: With one line for each problem, what was found and what to do about it.
    """
    validator = jsonschema.Draft202012Validator(schema)
    problems = [line for error in validator.iter_errors(config) for line in _describe(error)]
    # References are only worth following in a configuration whose shape is right.
    problems = problems or list(_broken_references(config)) or list(_missing_files(config))
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise ConfigurationError(f"the configuration has {len(dict.fromkeys(problems))} problem(s):{lines}")


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
    for name, dataset in config["datasets"].items():
        own = [key for key in ("path", "image_size", "channels") if key in dataset]
        if own and dataset["source"] != "imagefolder":
            yield f"datasets.{name}: {', '.join(own)} only fit source imagefolder, found '{dataset['source']}'; remove"
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


def _broken_method(config: Config, name: str) -> Iterator[str]:
    settings = config["method_settings"]
    own = settings[name]
    if own["kind"] == "allocation" and "allocation" not in own:
        yield f"method_settings.{name}: a method of kind 'allocation' needs `allocation`, the rule"
    if "objective" in own:
        yield f"method_settings.{name}: hypervolumes on different objectives cannot be compared; set search.objective"
    if "costs" in own:
        yield f"method_settings.{name}: hypervolumes on different costs cannot be compared; set search.costs"
    merged = method_settings(config, name)
    if merged["ladder"]["lowest"] >= merged["ladder"]["highest"]:
        yield f"method_settings.{name}: ladder.lowest must be smaller than ladder.highest"
    if own["kind"] != "allocation":
        smallest = merged["population"] * (1 if own["kind"] == "flat" else 4)
        if merged["evaluations"] < smallest:
            yield (
                f"method_settings.{name}: evaluations is {merged['evaluations']}, expected at least {smallest} for a "
                f"population of {merged['population']}; raise `evaluations` or lower `population`"
            )
    if own["kind"] == "flat" and merged["flat"]["algorithm"] in SPARSE_ALGORITHMS:
        # As `search.sparse_ea.n_groups_within` has it, which takes numpy to import.
        groups = max(2, int(merged["flat"]["score_share"] * merged["evaluations"]))
        if merged["evaluations"] < groups + merged["population"]:
            yield (
                f"method_settings.{name}: evaluations is {merged['evaluations']}, expected at least "
                f"{groups + merged['population']} ({groups} groups of weights to score and a population of "
                f"{merged['population']}); raise `evaluations`, or lower `population` or `flat.score_share`"
            )
    source = own.get("phase1_from")
    if own["kind"] == "two_phase":
        phase1 = merged["phase1"]
        starts = len(phase1["starts"]) * len(phase1["start_densities"])
        needed = starts + merged["population"] + phase1["n_reselected"]
        if budget_of(merged).phase1 < needed:
            yield (
                f"method_settings.{name}: Phase 1 gets {budget_of(merged).phase1} evaluations, expected at least "
                f"{needed} ({starts} starting allocations, a population of {merged['population']} and "
                f"{phase1['n_reselected']} members chosen anew); raise "
                "`evaluations` or `phase1.share`, or start from fewer densities"
            )
        if phase1["share"] < 1 and budget_of(merged).phase1 >= merged["evaluations"]:
            yield f"method_settings.{name}: phase1.share leaves Phase 2 no evaluations; lower it, or 1 for none at all"
        yield from _broken_refitting(merged, name)
        if merged["anchors"]["light_tolerance"] >= merged["anchors"]["heavy_tolerance"]:
            yield f"method_settings.{name}: anchors.light_tolerance must be smaller than anchors.heavy_tolerance"
    if source is None:
        return
    if own["kind"] != "two_phase" or settings.get(source, {}).get("kind") != "two_phase":
        yield f"method_settings.{name}: phase1_from joins methods of kind two_phase; '{source}' or '{name}' is none"
    elif settings[source].get("phase1_from"):
        yield f"method_settings.{name}: phase1_from names '{source}', which takes its own Phase 1 from elsewhere"
    elif phase1_settings(merged) != phase1_settings(method_settings(config, source)):
        yield (
            f"method_settings.{name}: phase1_from takes Phase 1 from '{source}', but the two differ in settings that "
            "Phase 1 depends on; make them equal or remove phase1_from"
        )


def _broken_refitting(merged: Config, name: str) -> Iterator[str]:
    """What only makes sense where candidates are re-fitted."""
    refits = (merged["search_repair"] or merged["repair"]) == "reconstruct"
    guides = merged["phase2"]["guides"]
    if REFIT_GUIDE in guides and not refits:
        yield f"method_settings.{name}: guide '{REFIT_GUIDE}' needs repair reconstruct during the search; remove it"
    if guides[0] == REFIT_GUIDE:
        yield f"method_settings.{name}: the first guide shapes the first population and must be a score; reorder them"
    if merged["phase1"]["n_reselected"] and not refits:
        yield f"method_settings.{name}: phase1.n_reselected needs repair reconstruct during the search; set it to 0"


def _missing_files(config: Config) -> Iterator[str]:
    if not config["inputs_needed"]:
        return
    for run in config["runs"]:
        dataset, network = config["datasets"][run["dataset"]], config["networks"][run["network"]]
        images, checkpoint = dataset.get("path"), network["checkpoint"]
        remedy = "correct it or `data_directory`"
        if images is not None and not data_path(config, images).exists():
            place = data_path(config, images)
            yield f"datasets.{run['dataset']}.path: expected '{place}', found nothing there; {remedy}"
        if checkpoint is not None and not data_path(config, checkpoint).is_file():
            place = data_path(config, checkpoint)
            yield f"networks.{run['network']}.checkpoint: expected '{place}', found nothing that is a file; {remedy}"


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
    return Path(config["data_directory"]).expanduser() / Path(path).expanduser()


def folder_state(folder: Path) -> str:
    """A digest that changes when files in a folder are added, removed, moved or edited; empty for a file."""
    if not folder.is_dir():
        return ""
    files = sorted((path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file())
    states = repr([(name, state.st_size, state.st_mtime_ns) for name, state in files])
    return hashlib.blake2b(states.encode(), digest_size=16).hexdigest()


def method_settings(config: Config, name: str) -> dict[str, Any]:
    """Everything that holds for one method: the common `search` settings with the method's own laid over them."""
    own = {k: v for k, v in config["method_settings"][name].items() if k not in ("kind", "phase1_from")}
    return merge(config["search"], own)


def methods_of_kind(config: Config, kind: str) -> list[str]:
    """Names of all defined methods of one kind, whether compared or not."""
    return sorted(name for name, own in config["method_settings"].items() if own["kind"] == kind)


def reference_method(config: Config) -> str:
    """The method that the report tests the others against: the first, unless `report` names another."""
    return str(config.get("report", {}).get("reference") or config["methods"][0])


def phase1_source(config: Config, name: str) -> str:
    """The method whose Phase 1 a two-phase method continues: itself, unless it shares another's."""
    return config["method_settings"][name].get("phase1_from") or name


def budget_of(settings: Config) -> Budget:
    """How a method's evaluations are divided."""
    return Budget(settings["evaluations"], settings["phase1"]["share"])


def phase1_settings(settings: Config) -> dict[str, Any]:
    """The part of a method's settings that its Phase 1 depends on."""
    own = dict(settings["phase1"])
    own.pop("share")
    return {
        **searching_settings(settings),
        **own,
        "importance": settings["importance"],
        # Nothing else in Phase 1 asks for them, and it need not run again for their sake.
        "sparsities": settings["sparsities"] if own["n_reselected"] else [],
        "evaluations": budget_of(settings).phase1,
        "population": settings["population"],
    }


def searching_settings(settings: Config) -> dict[str, Any]:
    """The part of a method's settings that says how candidates and finished networks are made and judged."""
    names = [one.name for kind in (Searching, Compute) for one in fields(kind)]
    return {name: settings[name] for name in names if name in settings}


def repairs_of(settings: Config) -> set[str]:
    """The repairs that a method uses, during the search and afterwards."""
    return {settings["repair"], settings["search_repair"] or settings["repair"]}


def start_scores(starts: Sequence[str]) -> list[str]:
    """The scores that classical allocations follow."""
    return [STARTS[name][1] for name in starts]


def score_guides(settings: Config) -> list[str]:
    """The importance scores among Phase 2's guides; `refit` is worked out for each candidate."""
    return [guide for guide in settings["phase2"]["guides"] if guide != REFIT_GUIDE]


def search_is_memorised(config: Config, network: str) -> bool:
    """Whether the network may have been trained on the search images: a checkpoint, unless it says otherwise."""
    own = config["networks"][network]
    return own["checkpoint"] is not None and not own.get("search_held_out", False)


def objective(config: Config, network: str) -> str:
    """What is minimised; behind `auto` the divergence where the search images are memorised, the error elsewhere."""
    if config["search"]["objective"] != "auto":
        return str(config["search"]["objective"])
    return "divergence" if search_is_memorised(config, network) else "error"


def phase2_settings(settings: Config) -> dict[str, Any]:
    """The part of a method's settings that its Phase 2 depends on, beyond the results of Phase 1."""
    return {
        **searching_settings(settings),
        **{key: settings[key] for key in PUBLISHING},
        **settings["phase2"],
        "corridors": settings["anchors"]["corridors"],
        "evaluations": settings["evaluations"],
        "share": settings["phase1"]["share"],
        "population": settings["population"],
    }


def flat_settings(settings: Config) -> dict[str, Any]:
    """The part of a method's settings that a flat search depends on."""
    own = dict(settings["flat"])
    if own["algorithm"] not in SPARSE_ALGORITHMS:
        del own["score_share"]
    return {
        **searching_settings(settings),
        **{key: settings[key] for key in PUBLISHING},
        **own,
        **{key: settings[key] for key in ("evaluations", "population")},
    }


def allocation_settings(settings: Config) -> dict[str, Any]:
    """The part of a method's settings that an allocation baseline depends on."""
    own = ("importance", "allocation", "ladder", *PUBLISHING)
    return {**searching_settings(settings), **{key: settings[key] for key in own}}
