"""The configuration: what ships passes the schema, and every mistake is named with its place and remedy."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.search import sparse_ea as sparse
from paretoprune.search.algorithms import ALGORITHMS
from paretoprune.settings import SPARSE_ALGORITHMS, ComparedMethod
from paretoprune.workflow import configuration
from paretoprune.workflow.configuration import ConfigurationError, check_configuration, merge, method_of, with_new_names
from paretoprune.workflow.schema import configuration_schema

ROOT = Path(__file__).parents[2]
SCHEMA = configuration_schema()
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
EXPERIMENTS = sorted([*(ROOT / "experiments").glob("*.yaml"), ROOT / "tests" / "tiny.yaml"])


def problems(override: Mapping[str, Any], base: Mapping[str, Any] = DEFAULT) -> list[str]:
    """The problems found in `base` with `override` laid over it."""
    try:
        check_configuration(merge(base, override), SCHEMA)
    except ConfigurationError as error:
        head, *lines = str(error).splitlines()
        assert head == f"the configuration has {len(lines)} problem(s):"
        assert all(line.startswith("  - ") for line in lines)
        return [line.removeprefix("  - ") for line in lines]
    return []


def of_method(name: str = "two_phase_nsga2", **change: Any) -> ComparedMethod:
    """A method of the default configuration with some settings changed."""
    return method_of(merge(DEFAULT, {"method_settings": {name: change}}), name)


def only_problem(override: Mapping[str, Any], base: Mapping[str, Any] = DEFAULT) -> str:
    found = problems(override, base)
    assert len(found) == 1, found
    return found[0]


def method(name: str, **settings: Any) -> dict[str, Any]:
    """A configuration that compares one more method."""
    return {"methods": [*DEFAULT["methods"], name], "method_settings": {name: settings}}


# What ships


def test_the_default_configuration_has_no_problems() -> None:
    assert problems({}) == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_laid_over_the_default_have_no_problems(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = problems(yaml.safe_load(path.read_text(encoding="utf-8")))
    missing = [line for line in found if re.search(r"(path|checkpoint): expected '.*', found nothing", line)]
    assert found == missing
    if missing:
        pytest.skip("the data of this experiment is not here: " + "; ".join(missing))


def described(schema: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Every property in a schema by path, and whether it or the definition that it refers to has a description."""
    for name, rule in schema.get("properties", {}).items():
        definition: Any = SCHEMA if "$ref" in rule else {}
        for key in rule.get("$ref", "").split("/")[1:]:
            definition = definition[key]
        yield name, bool(rule.get("description") or definition.get("description"))
        yield from ((f"{name}.{inner}", known) for inner, known in described(rule))
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            yield from ((f"*.{inner}", known) for inner, known in described(schema[key]))


def test_every_property_of_the_schema_has_a_description() -> None:
    found = dict(described(SCHEMA))
    some = {"seeds", "search.phase2.guides", "datasets.*.augmentation.crop", "runs.*.network", "runs.*.seeds"}
    assert some <= found.keys()
    assert len(found) > 100
    assert [path for path, has_description in found.items() if not has_description] == []


def test_every_object_of_the_schema_refuses_unknown_keys() -> None:
    def closed(schema: Any) -> Iterator[bool]:
        for part in schema.values() if isinstance(schema, Mapping) else schema:
            if isinstance(part, Mapping) and part.get("type") == "object" and "properties" in part:
                yield part.get("additionalProperties") is False
            if isinstance(part, Mapping | list):
                yield from closed(part)

    found = list(closed({"root": SCHEMA}))
    assert len(found) > 15
    assert all(found)


# Mistakes that the schema finds


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"search": {"populaton": 10}}, "unknown key 'search.populaton'; did you mean 'population'?"),
        ({"search": {"phase1": {"shares": 0.5}}}, "unknown key 'search.phase1.shares'; did you mean 'share'?"),
        ({"datasets": {"digits": {"serach": 9}}}, "unknown key 'datasets.digits.serach'; did you mean 'search'?"),
        ({"networks": {"resnet8": {"training": {"epoch": 3}}}}, "'networks.resnet8.training.epoch'; did you mean 'ep"),
        ({"method_settings": {"lamp": {"kinds": "flat"}}}, "'method_settings.lamp.kinds'; did you mean 'kind'?"),
    ],
)
def test_a_misspelt_key_suggests_the_right_one(override: dict[str, Any], expected: str) -> None:
    assert expected in only_problem(override)


def test_a_key_like_none_lists_what_is_known() -> None:
    assert only_problem({"importance": {"zzz": 1}}) == "unknown key 'importance.zzz'; known here: images, positions"


@pytest.mark.parametrize("search", [{"precision": p} for p in ("auto", "float32", "bfloat16")])
def test_every_precision_is_accepted(search: dict[str, Any]) -> None:
    assert problems({"search": search}) == []


@pytest.mark.parametrize("batch_size", ["auto", 1, 64])
def test_batches_are_of_a_given_size_or_of_one_chosen_by_the_images(batch_size: object) -> None:
    assert problems({"search": {"batch_size": batch_size}}) == []


def test_keys_that_are_no_text_are_named_as_well() -> None:
    # YAML reads `20:` as a number and `on:` as true.
    found = problems({"importance": {20: 1, True: 2, "zzz": 3}})
    assert [line.split(";")[0] for line in found] == [
        f"unknown key 'importance.{key}'" for key in sorted(("20", "True", "zzz"))
    ]


@pytest.mark.parametrize(
    ("override", "path", "found"),
    [
        ({"seeds": []}, "seeds", "[]"),
        ({"seeds": [1, 1]}, "seeds", "[1, 1]"),
        ({"seeds": [-1]}, "seeds.0", "-1"),
        ({"gpus_per_job": 2}, "gpus_per_job", "2"),
        ({"threads_per_search": 0}, "threads_per_search", "0"),
        ({"prefix_cache_mb": -1}, "prefix_cache_mb", "-1"),
        ({"runs": []}, "runs", "[]"),
        ({"datasets": {"digits": {"source": "mnist"}}}, "datasets.digits.source", "'mnist'"),
        ({"datasets": {"digits": {"search": 1.5}}}, "datasets.digits.search", "1.5"),
        ({"datasets": {"digits": {"search": 0}}}, "datasets.digits.search", "0"),
        ({"datasets": {"digits": {"augmentation": {"crop": -1}}}}, "datasets.digits.augmentation.crop", "-1"),
        ({"networks": {"resnet8": {"checkpoint": 3}}}, "networks.resnet8.checkpoint", "3"),
        ({"training": {"momentum": 1.0}}, "training.momentum", "1.0"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", "0"),
        ({"search": {"population": 3}}, "search.population", "3"),
        ({"search": {"importance": "snip"}}, "search.importance", "'snip'"),
        ({"runs": [{"dataset": "digits", "network": "resnet8", "seeds": []}]}, "runs.0.seeds", "[]"),
        ({"runs": [{"dataset": "digits", "network": "resnet8", "seeds": [-1]}]}, "runs.0.seeds.0", "-1"),
        ({"importance": {"positions": 0}}, "importance.positions", "0"),
        ({"search": {"importance": "refit"}}, "search.importance", "'refit'"),
        ({"search": {"repair": "refit"}}, "search.repair", "'refit'"),
        ({"search": {"repair": None}}, "search.repair", "None"),
        ({"search": {"search_repair": "refit"}}, "search.search_repair", "'refit'"),
        ({"search": {"candidate_images": 0}}, "search.candidate_images", "0"),
        ({"search": {"repair_images": 0}}, "search.repair_images", "0"),
        ({"search": {"damping": 0}}, "search.damping", "0"),
        ({"search": {"damping": 1.5}}, "search.damping", "1.5"),
        ({"search": {"sequential_refit": 1}}, "search.sequential_refit", "1"),
        ({"search": {"objectives": ["loss", "density"]}}, "search.objectives.0", "'loss'"),
        ({"search": {"objectives": ["error", "watts"]}}, "search.objectives.1", "'watts'"),
        ({"search": {"objectives": ["error", "divergence"]}}, "search.objectives.1", "'divergence'"),
        ({"search": {"objectives": ["density", "macs"]}}, "search.objectives.0", "'density'"),
        ({"search": {"objectives": ["error"]}}, "search.objectives", "['error']"),
        ({"search": {"objectives": ["error", "macs", "macs"]}}, "search.objectives", "['error', 'macs', 'macs']"),
        ({"search": {"objectives": ["error", "macs", "bytes", "density"]}}, "search.objectives", "'bytes'"),
        ({"search": {"objectives": "error"}}, "search.objectives", "'error'"),
        ({"search": {"densities": {"size": 1}}}, "search.densities.size", "1"),
        ({"search": {"empty_layers": "never"}}, "search.empty_layers", "'never'"),
        ({"search": {"front_size": 1}}, "search.front_size", "1"),
        ({"search": {"sparsities": [0.5, 90]}}, "search.sparsities.1", "90"),
        ({"search": {"precision": "float16"}}, "search.precision", "'float16'"),
        ({"search": {"batch_size": 0}}, "search.batch_size", "0"),
        ({"search": {"batch_size": "large"}}, "search.batch_size", "'large'"),
        ({"search": {"phase1": {"share": 0}}}, "search.phase1.share", "0"),
        ({"search": {"phase1": {"share": 1.1}}}, "search.phase1.share", "1.1"),
        ({"search": {"phase1": {"rungs": 1}}}, "search.phase1.rungs", "1"),
        ({"search": {"phase1": {"level_switches": 2}}}, "search.phase1.level_switches", "2"),
        ({"search": {"phase1": {"n_reselected": -1}}}, "search.phase1.n_reselected", "-1"),
        ({"search": {"phase1": {"starts": ["fisher"]}}}, "search.phase1.starts.0", "'fisher'"),
        ({"search": {"anchors": {"corridors": -1}}}, "search.anchors.corridors", "-1"),
        ({"search": {"phase2": {"adaptive": "no"}}}, "search.phase2.adaptive", "'no'"),
        ({"search": {"phase2": {"guides": ["reconstruct"]}}}, "search.phase2.guides.0", "'reconstruct'"),
        ({"search": {"phase1": {"start_densities": [0.5, 80]}}}, "search.phase1.start_densities.1", "80"),
        ({"search": {"phase2": {"crossover_probability": 1.2}}}, "search.phase2.crossover_probability", "1.2"),
        ({"search": {"phase2": {"guides": []}}}, "search.phase2.guides", "[]"),
        ({"search": {"flat": {"flip_rate": 0}}}, "search.flat.flip_rate", "0"),
        ({"search": {"flat": {"score_share": 1}}}, "search.flat.score_share", "1"),
        ({"search": {"flat": {"algorithm": "sparseea"}}}, "search.flat.algorithm", "'sparseea'"),
        ({"method_settings": {"lamp": {"kind": "prune"}}}, "method_settings.lamp.kind", "'prune'"),
        ({"method_settings": {"lamp": {"population": 2}}}, "method_settings.lamp.population", "2"),
        ({"finetune": {"sparsities": [90]}}, "finetune.sparsities.0", "90"),
        ({"finetune": {"temperature": 0}}, "finetune.temperature", "0"),
        ({"results_directory": ""}, "results_directory", "''"),
        ({"latency": {"runtime": "tflite"}}, "latency.runtime", "'tflite'"),
        ({"latency": {"batch_size": 0}}, "latency.batch_size", "0"),
        ({"latency": {"threads": 0}}, "latency.threads", "0"),
        ({"latency": {"bound": 0}}, "latency.bound", "0"),
        ({"latency": {"repeats": 1}}, "latency.repeats", "1"),
        ({"latency": {"checked": 0}}, "latency.checked", "0"),
        ({"latency": {"measure": "yes"}}, "latency.measure", "'yes'"),
        ({"search": {"objectives": ["latency", "macs"]}}, "search.objectives.0", "'latency'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_path(override: dict[str, Any], path: str, found: str) -> None:
    problem = only_problem(override)
    assert problem.startswith(f"{path}: ")
    assert found in problem


def test_a_value_out_of_range_is_told_with_its_meaning() -> None:
    problem = only_problem({"search": {"population": 3}})
    assert problem == "search.population: 3 is less than the minimum of 4 (candidates in a population)"


@pytest.mark.parametrize("name", ["data", "logs", "report", "dense", "importance", "a/b", "", "..", "-x", "a b"])
@pytest.mark.parametrize("part", ["datasets", "networks", "method_settings"])
def test_a_name_that_cannot_be_a_folder_is_refused(part: str, name: str) -> None:
    known = {"datasets": "digits", "networks": "resnet8", "method_settings": "lamp"}[part]
    problem = only_problem({part: {name: DEFAULT[part][known]}})
    assert problem.startswith(f"{part}: '{name}'")


@pytest.mark.parametrize("wildcard", ["dataset", "network", "method"])
@pytest.mark.parametrize("name", ["two_phase", "resnet-20", "v1.5", "A0", "_"])
def test_a_name_that_the_schema_allows_is_one_that_the_rules_match(wildcard: str, name: str) -> None:
    part = {"dataset": "datasets", "network": "networks", "method": "method_settings"}[wildcard]
    rules = (ROOT / "workflow/rules/common.smk").read_text(encoding="utf-8")
    constraint = re.search(rf'^    {wildcard}="(.+)",$', rules, re.MULTILINE)
    assert constraint is not None
    allowed = problems({part: {name: next(iter(DEFAULT[part].values()))}}) == []
    assert not allowed or re.fullmatch(constraint[1], name)


def test_an_imagefolder_without_a_path_is_refused() -> None:
    assert only_problem({"datasets": {"digits": {"source": "imagefolder"}}}) == (
        "datasets.digits: 'path' is a required property"
    )


def test_settings_of_an_imagefolder_are_refused_elsewhere() -> None:
    problem = only_problem({"datasets": {"digits": {"path": "mine", "channels": 1}}})
    assert problem == "datasets.digits: path, channels do not fit source 'digits' (for imagefolder); remove"


FOLDER = {"source": "imagefolder", "path": "mine"}


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ({"source": "npz"}, "datasets.digits: 'path' is a required property"),
        ({"source": "safetensors"}, "datasets.digits: 'path' is a required property"),
        ({"source": "npz", "path": "a.npz", "image_size": 32}, "image_size do not fit source 'npz' (for imagefolder)"),
        ({"layout": "grey", **FOLDER}, "layout do not fit source 'imagefolder' (for npz, safetensors); remove"),
        ({"layout": "flat", "source": "npz", "path": "a.npz"}, "datasets.digits.layout: 'flat' is not one of"),
        ({"orientation": "up", **FOLDER}, "datasets.digits.orientation: 'up' is not one of ['keep', 'apply']"),
        ({"resize": 256, **FOLDER}, "resize 256 needs an image_size that is no larger, found None; set it"),
        ({"resize": 99, "image_size": 100, **FOLDER}, "resize 99 needs an image_size that is no larger, found 100"),
        ({"value_range": [255, 0], **FOLDER}, "expected value_range [black, white] to grow, found [255, 0]"),
        ({"value_range": "auto", **FOLDER}, "datasets.digits.value_range: 'auto' is not valid"),
        ({"value_range": [1], **FOLDER}, "datasets.digits.value_range: [1] is not valid"),
    ],
)
def test_how_a_dataset_is_read_must_fit_together(dataset: dict[str, Any], problem: str) -> None:
    assert problem in only_problem({"datasets": {"digits": dataset}})


@pytest.mark.parametrize(
    ("normalisation", "fits"),
    [
        ("imagenet", True),
        ("cifar10", True),
        ("cifar100", True),
        (None, True),
        ({"mean": [0.5], "std": [0.5]}, True),
        ("imagenette", False),
        ({"mean": [0.5]}, False),
        (0.5, False),
    ],
)
def test_a_normalisation_is_a_name_or_numbers(normalisation: Any, fits: bool) -> None:
    found = problems({"networks": {"resnet8": {"normalisation": normalisation}}})
    assert (found == []) == fits
    assert all(problem.startswith("networks.resnet8.normalisation: ") for problem in found)


def test_what_is_missing_is_named() -> None:
    without = {key: value for key, value in DEFAULT.items() if key != "seeds"}
    assert only_problem({}, without) == "configuration: 'seeds' is a required property"


def test_several_problems_are_listed_at_once() -> None:
    found = problems({"seed": [1], "search": {"population": 3, "repair": "all"}, "finetune": {"sparsities": [90]}})
    assert len(found) == 4
    for text in ("'seed'", "search.population", "search.repair", "finetune.sparsities.0"):
        assert sum(text in line for line in found) == 1


# References between parts


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            {"runs": [{"dataset": "digit", "network": "resnet8"}]},
            "runs: no dataset 'digit' under `datasets`; did you mean 'digits'?",
        ),
        (
            {"runs": [{"dataset": "digits", "network": "vgg"}]},
            "runs: no network 'vgg' under `networks`; defined: resnet8",
        ),
        (
            {"methods": ["lamb", *DEFAULT["methods"]]},
            "methods: no method 'lamb' under `method_settings`; did you mean 'lamp'?",
        ),
        (
            {"finetune": {"methods": ["two_phase_nsga"]}},
            "methods: no method 'two_phase_nsga' under `method_settings`; did you mean 'two_phase_nsga2'?",
        ),
        (
            {"methods": ["lamp"], "finetune": {"methods": ["lamp", "random"]}},
            "finetune.methods: 'random' is not among `methods`; add it there or remove it here",
        ),
        (
            {"report": {"reference": "two_phase_nsga"}},
            "report.reference: expected one of `methods`, found 'two_phase_nsga'; did you mean 'two_phase_nsga2'?",
        ),
        (
            # Defined, but not compared.
            {"methods": ["lamp"], "finetune": {"methods": []}, "report": {"reference": "random"}},
            "report.reference: expected one of `methods`, found 'random'; defined: lamp",
        ),
    ],
)
def test_a_name_that_is_not_defined_is_told_with_what_is(override: dict[str, Any], expected: str) -> None:
    assert only_problem(override) == expected


def test_the_reference_is_the_first_method_unless_another_is_named() -> None:
    named = merge(DEFAULT, {"report": {"reference": "lamp"}})
    assert problems({"report": {"reference": "lamp"}}) == []
    assert configuration.reference_method(named) == "lamp"
    assert configuration.reference_method(DEFAULT) == DEFAULT["methods"][0]
    without = {key: value for key, value in DEFAULT.items() if key != "report"}
    assert problems({}, without) == []
    assert configuration.reference_method(without) == DEFAULT["methods"][0]


def test_several_broken_references_are_listed_at_once() -> None:
    found = problems({"runs": [{"dataset": "a", "network": "b"}], "methods": ["c"], "finetune": {"methods": ["c"]}})
    assert [re.findall(r"no (\w+) '(\w)'", line) for line in found] == [
        [("dataset", "a")],
        [("network", "b")],
        [("method", "c")],
    ]


def test_a_search_over_channels_pays_for_its_starts_and_repairs_candidates_as_they_ship() -> None:
    def channels(**own: Any) -> dict[str, Any]:
        return method("other", kind="channels", population=10, **own)

    # 24 allocations and both ends, and a population, for half of the budget.
    for repair in ("reconstruct", "batchnorm", "none"):
        assert problems(channels(repair=repair, evaluations=72)) == []
        assert "expected at least 36 " in only_problem(channels(repair=repair, evaluations=70))
    assert "set it to null" in only_problem(channels(repair="reconstruct", search_repair="none", evaluations=100))
    assert problems(channels(repair="reconstruct", search_repair="reconstruct", evaluations=100)) == []


def test_a_method_of_kind_allocation_needs_its_rule() -> None:
    assert only_problem(method("other", kind="allocation")) == (
        "method_settings.other: a method of kind 'allocation' needs `allocation`, the rule"
    )


def test_too_few_evaluations_are_refused_before_anything_starts() -> None:
    too_few = {"evaluations": 119, "population": 30, "phase1": {"starts": []}}
    assert only_problem(method("other", kind="two_phase", **too_few)) == (
        "method_settings.other: evaluations is 119, expected at least 120 for a population of 30; raise `evaluations` "
        "or lower `population`"
    )
    assert problems(method("other", kind="two_phase", **too_few | {"evaluations": 120})) == []
    assert "evaluations is 29, expected at least 30" in only_problem(method("other", kind="flat", evaluations=29))
    assert problems(method("other", kind="flat", evaluations=30)) == []
    assert problems(method("other", kind="allocation", allocation="uniform", evaluations=1)) == []


@pytest.mark.parametrize("algorithm", ["sparse_ea", "mskea"])
def test_a_sparse_algorithm_must_get_enough_for_scores_and_a_population(algorithm: str) -> None:
    def other(evaluations: int, share: float) -> dict[str, Any]:
        flat = {"algorithm": algorithm, "score_share": share}
        return method("other", kind="flat", evaluations=evaluations, population=30, flat=flat)

    assert problems(other(32, 0.01)) == problems(other(60, 0.5)) == []
    assert only_problem(other(58, 0.5)) == (
        "method_settings.other: evaluations is 58, expected at least 59 (29 groups of weights to score and a "
        "population of 30); raise `evaluations`, or lower `population` or `flat.score_share`"
    )
    assert "expected at least 32 (2 groups" in only_problem(other(31, 0.01))


@pytest.mark.parametrize("evaluations", [32, 57, 100, 290, 600])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.15, 0.29, 0.49, 0.9])
def test_the_configuration_counts_groups_as_the_search_does(evaluations: int, share: float) -> None:
    flat = {"algorithm": "mskea", "score_share": share}
    fits = evaluations >= sparse.n_groups_within(evaluations, share) + 30
    assert (problems(method("other", kind="flat", evaluations=evaluations, flat=flat)) == []) is fits


def test_only_the_flat_search_knows_sparse_algorithms() -> None:
    assert "'mskea' is not one of" in only_problem({"search": {"phase2": {"algorithm": "mskea"}}})
    flat = SCHEMA["properties"]["search"]["properties"]["flat"]["properties"]["algorithm"]["enum"]
    assert flat == [*ALGORITHMS, *SPARSE_ALGORITHMS]


def test_algorithms_that_have_no_scores_do_not_depend_on_the_share_for_them() -> None:
    for name, has in (("flat_nsga2", False), ("sparse_ea", True), ("mskea", True)):
        step = of_method(name, flat={"score_share": 0.123}).flat_step
        assert (step.flat.score_share == 0.123) is has
        assert (step == of_method(name).flat_step) is not has
        assert step.flat.algorithm == ("nsga2" if name == "flat_nsga2" else name)


def test_phase_1_must_get_enough_for_its_starts_and_a_population() -> None:
    # The default has 4 starts at 12 densities and a population of 30; half of the evaluations are Phase 1's.
    assert problems(method("other", kind="two_phase", evaluations=156)) == []
    problem = only_problem(method("other", kind="two_phase", evaluations=154))
    assert problem == (
        "method_settings.other: Phase 1 gets 77 evaluations, expected at least 78 (48 starting allocations, a "
        "population of 30 and 0 members chosen anew); raise `evaluations` or `phase1.share`, or start from fewer "
        "densities"
    )


def test_phase_1_must_get_enough_for_members_chosen_anew() -> None:
    def other(n_reselected: int) -> dict[str, Any]:
        phase1 = {"n_reselected": n_reselected}
        return method("other", kind="two_phase", evaluations=176, repair="reconstruct", phase1=phase1)

    assert problems(other(10)) == []
    problem = only_problem(other(11))
    assert (
        "Phase 1 gets 88 evaluations, expected at least 89 (48 starting allocations, a population of 30 and 11 me"
        in (problem)
    )


def test_phase_1_may_have_all_evaluations_but_not_by_rounding() -> None:
    assert problems(method("other", kind="two_phase", phase1={"share": 1})) == []
    assert problems(method("other", kind="two_phase", phase1={"share": 0.999})) == []
    assert only_problem(method("other", kind="two_phase", phase1={"share": 0.9999})) == (
        "method_settings.other: phase1.share leaves Phase 2 no evaluations; lower it, or 1 for none at all"
    )


# What only makes sense where candidates are re-fitted

REFITTED_ONLY = (
    ({"phase2": {"guides": ["magnitude", "refit"]}}, "guide 'refit' needs repair reconstruct during the search"),
    ({"phase1": {"n_reselected": 4}}, "phase1.n_reselected needs repair reconstruct during the search; set it to 0"),
)


@pytest.mark.parametrize(("settings", "message"), REFITTED_ONLY)
@pytest.mark.parametrize(
    ("repairs", "right"),
    [
        ({"repair": "batchnorm"}, False),
        ({"repair": "none"}, False),
        ({"repair": "reconstruct", "search_repair": "none"}, False),
        ({"repair": "reconstruct"}, True),
        ({"repair": "reconstruct", "search_repair": "reconstruct"}, True),
        ({"repair": "none", "search_repair": "reconstruct"}, True),
    ],
)
def test_settings_for_re_fitted_candidates_are_refused_where_the_search_re_fits_none(
    settings: dict[str, Any], message: str, repairs: dict[str, str], right: bool
) -> None:
    override = method("other", kind="two_phase", **repairs, **settings)
    if right:
        assert problems(override) == []
    else:
        assert only_problem(override).startswith(f"method_settings.other: {message}")


@pytest.mark.parametrize("guides", [["refit"], ["refit", "magnitude"]])
def test_the_first_guide_must_be_a_score(guides: list[str]) -> None:
    assert only_problem(method("other", kind="two_phase", repair="reconstruct", phase2={"guides": guides})) == (
        "method_settings.other: the first guide shapes the first population and must be a score; reorder them"
    )


def test_other_kinds_of_methods_take_no_notice_of_what_two_phases_need() -> None:
    common = {
        "search": {"repair": "reconstruct", "phase1": {"n_reselected": 4}, "phase2": {"guides": ["lamp", "refit"]}}
    }
    flat = {"methods": ["flat_nsga2", "lamp"], "finetune": {"methods": []}}
    bare = {"method_settings": {name: {"repair": "none"} for name in ("flat_nsga2", "lamp")}}
    assert problems(merge(merge(common, flat), bare)) == []


def test_a_method_re_fits_where_its_search_or_its_networks_are() -> None:
    for settings, expected, in_search in (
        ({"repair": "batchnorm", "search_repair": None}, False, False),
        ({"repair": "batchnorm", "search_repair": "batchnorm"}, False, False),
        ({"repair": "reconstruct", "search_repair": None}, True, True),
        ({"repair": "reconstruct", "search_repair": "none"}, True, False),
        ({"repair": "none", "search_repair": "reconstruct"}, True, True),
    ):
        method = of_method(**settings)
        assert (configuration.refits(method), REPAIR_REFITS[method.repair_in_search]) == (expected, in_search)


def test_a_guide_by_re_fits_is_no_score() -> None:
    found = of_method(phase2={"guides": ["elimination", "refit"]}).corridor_step.phase2
    assert (found.scores, found.follows_refits) == (["elimination"], True)
    assert of_method().corridor_step.phase2.follows_refits is False


# Latency

ONLY_CHANNELS = {"methods": ["channels"], "finetune": {"methods": []}}


@pytest.mark.parametrize(
    ("objectives", "cost"),
    [
        (["auto", "latency"], "latency"),
        (["error", "latency", "macs"], "latency"),
        (["auto", "memory"], "memory"),
        (["divergence", "macs", "memory"], "memory"),
    ],
)
def test_memory_and_latency_are_costs_of_networks_that_are_cut(objectives: list[str], cost: str) -> None:
    search = {"search": {"objectives": objectives}}
    assert problems(merge(ONLY_CHANNELS, search)) == []
    found = problems(merge(search, {"methods": ["channels", "lamp"], "finetune": {"methods": []}}))
    assert found == [
        f"method_settings.lamp: {cost} is a cost of networks that get smaller (kind channels), found kind "
        f"'allocation'; compare methods of kind channels alone, or remove {cost} from search.objectives"
    ]


def test_a_method_has_no_latency_of_its_own() -> None:
    override = {"method_settings": {"channels": {"objectives": ["auto", "latency"]}}}
    assert "set search.objectives" in only_problem(merge(ONLY_CHANNELS, override))


def test_the_most_repeats_are_no_fewer_than_the_first() -> None:
    assert problems({"latency": {"repeats": 30, "most_repeats": 30}}) == []
    assert only_problem({"latency": {"repeats": 30, "most_repeats": 29}}) == (
        "latency: expected most_repeats of at least the 30 repeats, found 29; raise it or lower `repeats`"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({}, []),
        ({"latency": {"measure": True}}, ["channels"]),
        ({"latency": {"measure": True}, "methods": ["lamp"]}, []),
        ({"search": {"objectives": ["error", "latency"]}, "methods": ["channels"]}, ["channels"]),
    ],
)
def test_members_are_timed_where_they_are_smaller_and_somebody_asks(
    override: dict[str, Any], expected: list[str]
) -> None:
    assert configuration.timed_methods(merge(DEFAULT, override)) == expected


def test_a_configuration_without_a_section_on_latency_times_nothing() -> None:
    without = {key: value for key, value in DEFAULT.items() if key != "latency"}
    assert problems({}, without) == []
    assert configuration.timed_methods(without) == []


def test_steps_that_time_depend_on_what_they_use_alone() -> None:
    def changed(**latency: Any) -> tuple[bool, bool]:
        found, plain = (configuration.latency_of(merge(DEFAULT, {"latency": own})) for own in (latency, {}))
        return found.timing != plain.timing, found.tabulating != plain.tabulating

    assert changed(batch_size=8) == changed(runtime="torch") == changed(bound=0.1) == (True, True)
    assert changed(checked=7) == (False, True)
    assert changed(measure=True) == (False, False)


# Seeds


def test_a_run_has_its_own_seeds_or_those_of_all() -> None:
    config = {"seeds": [4, 2]}
    assert configuration.seeds_of(config, {"dataset": "a", "network": "b"}) == [4, 2]
    assert configuration.seeds_of(config, {"dataset": "a", "network": "b", "seeds": [7]}) == [7]
    assert problems({"runs": [{"dataset": "digits", "network": "resnet8", "seeds": [5, 6]}]}) == []


def test_a_run_that_is_listed_twice_with_other_seeds_is_refused() -> None:
    run = {"dataset": "digits", "network": "resnet8"}
    assert only_problem({"runs": [run, {**run, "seeds": [5]}]}) == (
        "runs: dataset 'digits' and network 'resnet8' are listed twice; join their `seeds` in one run"
    )


def test_the_seeds_that_come_back_may_be_changed() -> None:
    config = {"seeds": [4, 2]}
    configuration.seeds_of(config, {}).append(9)
    assert config == {"seeds": [4, 2]}


@pytest.mark.parametrize(("light", "heavy", "right"), [(0.1, 0.2, True), (0.2, 0.2, False), (0.3, 0.2, False)])
def test_the_light_tolerance_must_be_the_smaller_one(light: float, heavy: float, right: bool) -> None:
    anchors = {"light_tolerance": light, "heavy_tolerance": heavy}
    found = problems(method("other", kind="two_phase", anchors=anchors))
    assert found == (
        [] if right else ["method_settings.other: anchors.light_tolerance must be smaller than anchors.heavy_tolerance"]
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "flat", "phase1_from": "two_phase_nsga2"}, "phase1_from joins methods of kind two_phase"),
        ({"kind": "two_phase", "phase1_from": "flat_nsga2"}, "phase1_from joins methods of kind two_phase"),
        ({"kind": "two_phase", "phase1_from": "nowhere"}, "'nowhere'"),
        ({"kind": "two_phase", "phase1_from": "two_phase_moead"}, "takes its own Phase 1 from elsewhere"),
        ({"kind": "two_phase", "phase1_from": "other"}, "takes its own Phase 1 from elsewhere"),
    ],
)
def test_phase_1_can_only_be_taken_from_a_method_that_has_one(settings: dict[str, Any], expected: str) -> None:
    problem = only_problem(method("other", **settings))
    assert problem.startswith("method_settings.other: phase1_from")
    assert expected in problem


@pytest.mark.parametrize(
    "difference",
    [
        {"importance": "fisher"},
        {"evaluations": 700},
        {"population": 32},
        {"repair": "none"},
        {"search_repair": "none"},
        {"repair_images": 100},
        {"damping": 0.1},
        {"empty_layers": "forbid"},
        {"precision": "bfloat16"},
        {"phase1": {"share": 0.6}},
        {"phase1": {"rungs": 24}},
        {"phase1": {"level_switches": 0.5}},
        {"phase1": {"starts": ["lamp"]}},
        {"phase1": {"start_densities": [0.5]}},
    ],
)
def test_methods_that_share_phase_1_must_agree_on_it(difference: dict[str, Any]) -> None:
    problem = only_problem(method("other", kind="two_phase", phase1_from="two_phase_nsga2", **difference))
    assert "takes Phase 1 from 'two_phase_nsga2', but the two differ in settings that Phase 1 depends on" in problem


@pytest.mark.parametrize(
    "difference",
    [
        {"anchors": {"heavy_tolerance": 0.5}},
        {"anchors": {"corridors": 3}},
        {"phase2": {"adaptive": False}},
        {"phase2": {"algorithm": "moead", "guides": ["lamp"], "softness": 0.1}},
        {"front_size": None},
        {"densities": {"size": 3}},
    ],
)
def test_methods_that_share_phase_1_may_differ_in_what_follows(difference: dict[str, Any]) -> None:
    assert problems(method("other", kind="two_phase", phase1_from="two_phase_nsga2", **difference)) == []


def test_a_method_may_not_minimise_something_else_than_the_others() -> None:
    for settings in ({"objective": "divergence"}, {"objectives": ["divergence", "density"]}):
        problem = only_problem(method("other", kind="flat", **settings))
        assert "hypervolumes on different objectives cannot be compared; set search.objectives" in problem


# Old names


def test_old_names_of_settings_go_on_working_and_go_before_what_they_are_laid_over() -> None:
    old = {
        "search": {"refine": False, "objective": "error", "ladder": {"size": 7}},
        "method_settings": {"lamp": {"ladder": {"lowest": 0.1}, "refine": True}},
    }
    given = merge(DEFAULT, old)
    before = copy.deepcopy(given)
    config = with_new_names(given)
    assert given == before
    assert config == merge(
        DEFAULT,
        {
            "search": {"sequential_refit": False, "objectives": ["error", "density"], "densities": {"size": 7}},
            "method_settings": {"lamp": {"densities": {"lowest": 0.1}, "sequential_refit": True}},
        },
    )
    assert problems(old) == []
    assert with_new_names(config) == config


def test_values_under_old_names_are_checked_as_those_under_new_ones() -> None:
    assert only_problem({"search": {"refine": 1}}).startswith("search.sequential_refit: 1 is not of type 'boolean'")
    assert only_problem({"search": {"objective": "loss"}}).startswith("search.objectives.0: 'loss'")
    assert "densities.lowest must be smaller" in problems({"search": {"ladder": {"lowest": 0.95}}})[0]
    assert only_problem({"search": {"ladder": 3}}).startswith("search.densities: 3 is not of type 'object'")


@pytest.mark.parametrize("broken", [{"search": None}, {"method_settings": [1]}, {"method_settings": {"lamp": "x"}}])
def test_a_configuration_of_the_wrong_shape_keeps_it_for_the_check(broken: dict[str, Any]) -> None:
    assert with_new_names(broken) == broken
    (part,) = broken
    assert all(line.startswith(part) for line in problems(broken))
    assert problems(broken)


# Files


def test_a_missing_image_folder_is_named_with_the_path_that_was_tried(tmp_path: Path) -> None:
    override = {
        "data_directory": str(tmp_path),
        "datasets": {"digits": {"source": "imagefolder", "path": "mine"}},
    }
    problem = only_problem(override)
    assert problem.startswith(f"datasets.digits.path: expected '{tmp_path / 'mine'}', found nothing")
    assert "`data_directory`" in problem
    (tmp_path / "mine").mkdir()
    assert problems(override) == []


def test_an_image_archive_may_stand_where_a_folder_may(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").touch()
    override = {"datasets": {"digits": {"source": "imagefolder", "path": str(tmp_path / "mine.tar")}}}
    assert problems(override) == []


def test_a_missing_checkpoint_is_named_with_the_path_that_was_tried(tmp_path: Path) -> None:
    override = {"data_directory": str(tmp_path), "networks": {"resnet8": {"checkpoint": "trained.pt"}}}
    problem = only_problem(override)
    assert problem.startswith(f"networks.resnet8.checkpoint: expected '{tmp_path / 'trained.pt'}', found nothing")
    assert "`data_directory`" in problem
    (tmp_path / "trained.pt").touch()
    assert problems(override) == []


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert "networks.resnet8.checkpoint" in only_problem({"networks": {"resnet8": {"checkpoint": str(tmp_path)}}})


def test_all_missing_files_are_listed_at_once(tmp_path: Path) -> None:
    override = {
        "data_directory": str(tmp_path),
        "datasets": {"digits": {"source": "imagefolder", "path": "mine"}},
        "networks": {"resnet8": {"checkpoint": "trained.pt"}},
    }
    assert [problem.split(":")[0] for problem in problems(override)] == [
        "datasets.digits.path",
        "networks.resnet8.checkpoint",
    ]


def test_files_may_be_missing_where_no_inputs_are_needed() -> None:
    override = {"networks": {"resnet8": {"checkpoint": "/nowhere/trained.pt"}}}
    assert len(problems(override)) == 1
    assert problems({**override, "inputs_needed": False}) == []


def test_files_of_what_is_not_run_may_be_missing() -> None:
    unused = {**DEFAULT["networks"]["resnet8"], "checkpoint": "/nowhere/trained.pt"}
    assert problems({"networks": {"unused": unused}}) == []


def test_paths_start_in_the_data_directory_unless_they_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configuration.data_path({"data_directory": "data"}, "a/b.pt") == Path("data/a/b.pt")
    assert configuration.data_path({"data_directory": "data"}, "/a/b.pt") == Path("/a/b.pt")
    assert configuration.data_path({"data_directory": "~/data"}, "b.pt") == tmp_path / "data" / "b.pt"
    assert configuration.data_path({"data_directory": "data"}, "~/b.pt") == tmp_path / "b.pt"


def test_the_state_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    states = [configuration.folder_state(folder)]
    for name, text in (("cat/1.png", "abc"), ("cat/2.png", "de"), ("cat/1.png", "abcd")):
        (folder / name).write_text(text)
        states.append(configuration.folder_state(folder))
    os.utime(folder / "cat" / "2.png", ns=(0, 2**62))
    states.append(configuration.folder_state(folder))
    (folder / "dog").mkdir()
    (folder / "cat" / "1.png").rename(folder / "dog" / "1.png")
    states.append(configuration.folder_state(folder))
    (folder / "cat" / "2.png").unlink()
    states.append(configuration.folder_state(folder))
    assert all(before != after for before, after in pairwise(states))
    assert states[-1] == configuration.folder_state(folder)


def test_the_state_of_a_folder_changes_with_what_its_links_lead_to(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
    (folder / "cat").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    before = configuration.folder_state(folder)
    (elsewhere / "1.png").write_text("abc")
    assert configuration.folder_state(folder) != before


def test_a_file_and_nothing_at_all_have_no_state_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.tar").write_text("abc")
    assert configuration.folder_state(tmp_path / "images.tar") == ""
    assert configuration.folder_state(tmp_path / "nothing") == ""


# What the parts mean together


def test_merging_goes_key_by_key_and_replaces_lists() -> None:
    base = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": 5, "f": {"g": 1}}
    override = {"a": {"c": {"d": [3]}}, "f": None, "h": {"i": 7}}
    assert merge(base, override) == {"a": {"b": 1, "c": {"d": [3]}}, "e": 5, "f": None, "h": {"i": 7}}
    assert merge({"f": None}, {"f": {"g": 2}}) == {"f": {"g": 2}}


def test_merging_changes_neither_argument_and_shares_nothing_with_them() -> None:
    base: dict[str, Any] = {"a": {"b": [1]}, "c": {"d": [2]}}
    override: dict[str, Any] = {"a": {"e": [3]}, "f": {"g": [4]}}
    before = copy.deepcopy((base, override))
    merged = merge(base, override)
    assert (base, override) == before
    for values in (merged["a"]["b"], merged["a"]["e"], merged["c"]["d"], merged["f"]["g"]):
        values.append(9)
    merged["c"]["new"] = merged["f"]["new"] = 1
    assert (base, override) == before


def test_checking_leaves_the_configuration_as_it_was() -> None:
    config = copy.deepcopy(DEFAULT)
    check_configuration(config, SCHEMA)
    assert config == DEFAULT


def test_a_methods_own_settings_go_before_the_common_ones() -> None:
    method = method_of(DEFAULT, "two_phase_moead")
    assert method.phase2.plain() == {**DEFAULT["search"]["phase2"], "algorithm": "moead"}
    assert method.population == DEFAULT["search"]["population"]
    assert (method.kind, method.phase1_from) == ("two_phase", "two_phase_nsga2")
    assert method_of(DEFAULT, "lamp").importance == "lamp"


def test_scores_of_phase_1_are_those_of_its_thresholds_and_of_its_starts() -> None:
    method = of_method(importance="fisher", phase1={"starts": ["lamp", "uniform", "elimination"]})
    assert configuration.phase1_scores(method) == ["fisher", "lamp", "magnitude", "elimination"]


def test_methods_are_found_by_kind_and_by_their_source_of_phase_1() -> None:
    assert configuration.methods_of_kind(DEFAULT, "two_phase") == ["two_phase_moead", "two_phase_nsga2"]
    assert configuration.methods_of_kind(DEFAULT, "flat") == ["flat_nsga2", "mskea", "sparse_ea"]
    assert configuration.phase1_source(DEFAULT, "two_phase_moead") == "two_phase_nsga2"
    assert configuration.phase1_source(DEFAULT, "two_phase_nsga2") == "two_phase_nsga2"


@pytest.mark.parametrize("evaluations", [600, 601, 155])
@pytest.mark.parametrize("share", [0.3, 0.5, 1, 1.0])
def test_both_phases_share_the_evaluations_without_a_remainder(evaluations: int, share: float) -> None:
    method = of_method(evaluations=evaluations, phase1={"share": share})
    first = method.threshold_step.evaluations
    assert first == round(share * evaluations)
    second = method.corridor_step.budget.phase2(spent=first)
    assert first + second == evaluations == method.flat_step.evaluations


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"anchors": {"heavy_tolerance": 0.5}}, {"anchors"}),
        ({"anchors": {"corridors": 0}}, {"anchors", "phase2"}),
        ({"phase1": {"share": 1}}, {"phase1", "phase2"}),
        ({"phase1": {"rungs": 24}}, {"phase1"}),
        ({"phase1": {"level_switches": 0.5}}, {"phase1"}),
        ({"phase1": {"n_reselected": 4}}, {"phase1"}),
        ({"phase2": {"adaptive": False}}, {"phase2"}),
        ({"phase2": {"guides": ["magnitude", "refit"]}}, {"phase2"}),
        ({"search_repair": "none"}, {"phase1", "phase2", "flat", "allocation"}),
        ({"candidate_images": 100}, {"phase1", "phase2", "flat", "allocation"}),
        ({"repair_images": 100}, {"phase1", "phase2", "flat", "allocation"}),
        ({"damping": 0.1}, {"phase1", "phase2", "flat", "allocation"}),
        ({"sequential_refit": False}, {"phase1", "phase2", "flat", "allocation"}),
        ({"empty_layers": "forbid"}, {"phase1", "phase2", "flat", "allocation"}),
        ({"densities": {"size": 3}}, {"allocation"}),
        ({"importance": "lamp"}, {"phase1", "allocation"}),
        ({"objectives": ["error", "density"]}, {"phase1", "anchors", "phase2", "flat", "allocation"}),
        ({"objectives": ["auto", "macs"]}, {"phase1", "phase2", "flat", "allocation"}),
        ({"phase1": {"start_densities": [0.5]}}, {"phase1"}),
        ({"phase2": {"softness": 0.1}}, {"phase2"}),
        ({"phase2": {"guides": ["lamp"]}}, {"phase2"}),
        ({"flat": {"flip_rate": 0.1}}, {"flat"}),
        ({"flat": {"score_share": 0.1}}, set()),
        ({"flat": {"algorithm": "sparse_ea"}}, {"flat"}),
        ({"front_size": 10}, {"phase2", "flat", "allocation"}),
        ({"sparsities": [0.9]}, {"phase2", "flat", "allocation"}),
        ({"population": 20}, {"phase1", "phase2", "flat"}),
        ({"evaluations": 800}, {"phase1", "phase2", "flat"}),
        ({"repair": "none"}, {"phase1", "phase2", "flat", "allocation"}),
    ],
)
def test_a_stage_depends_on_its_own_settings_alone(change: dict[str, Any], affected: set[str]) -> None:
    """Snakemake reruns a step whose parameters change, and only that."""
    common = merge(DEFAULT, {"method_settings": {"two_phase_nsga2": {"allocation": "uniform"}}})

    def steps(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        method = method_of(config, "two_phase_nsga2")
        return {
            "phase1": method.threshold_step.plain(),
            "anchors": method.anchor_step.plain(),
            "phase2": method.corridor_step.plain(),
            "flat": method.flat_step.plain(),
            "allocation": method.allocation_step.plain(),
        }

    before, after = steps(common), steps(merge(common, {"search": change}))
    assert {name for name in before if before[name] != after[name]} == affected


def test_wanted_sparsities_matter_to_phase_1_where_members_are_chosen_anew_only() -> None:
    for n_reselected, matter in ((0, False), (4, True)):
        one, other = (
            of_method(phase1={"n_reselected": n_reselected}, sparsities=sparsities).threshold_step
            for sparsities in ([0.5], [0.9])
        )
        assert (one != other) is matter


@pytest.mark.parametrize(
    ("network", "memorised"),
    [
        ({"checkpoint": None}, False),
        ({"checkpoint": "a.pt"}, True),
        ({"checkpoint": "a.pt", "search_held_out": False}, True),
        ({"checkpoint": "a.pt", "search_held_out": True}, False),
    ],
)
def test_auto_means_divergence_where_a_checkpoint_may_have_seen_the_search_images(
    network: dict[str, Any], memorised: bool
) -> None:
    config = merge(DEFAULT, {"networks": {"net": network}})
    assert configuration.search_is_memorised(config, "net") is memorised
    expected = "divergence" if memorised else "error"
    assert configuration.loss_of(config, "net") == expected
    assert method_of(config, "lamp", "net").objectives == (expected, "density")
    assert method_of(config, "lamp").objectives == ("auto", "density")
    for loss in ("error", "divergence"):
        named = merge(config, {"search": {"objectives": [loss, "macs", "bytes"]}})
        assert configuration.loss_of(named, "net") == loss
        assert configuration.costs_of(named) == ["macs", "bytes"]
        assert method_of(named, "lamp", "net").objectives == (loss, "macs", "bytes")
