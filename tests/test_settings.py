"""Settings: from plain values and back, and one place for each default, range and meaning."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from paretoprune import settings
from paretoprune.deployment import runtimes, timing
from paretoprune.importance.registry import SCORE_NEEDS
from paretoprune.importance.scores import SCORES
from paretoprune.networks.costs import COSTS
from paretoprune.repair.registry import REPAIR_REFITS
from paretoprune.repair.repairs import REPAIRS
from paretoprune.search.algorithms import ALGORITHMS
from paretoprune.settings import (
    AllocationStep,
    AnchorStep,
    Budget,
    ComparedMethod,
    Compute,
    CorridorStep,
    Evaluating,
    Flat,
    FlatStep,
    Method,
    Moves,
    Phase1,
    Phase2,
    Publishing,
    Settings,
    ThresholdStep,
    Timing,
)
from paretoprune.structured.units import SLIM_COSTS
from paretoprune.training.loop import Recipe
from paretoprune.workflow import schema
from paretoprune.workflow.sections import Augmentation, Configuration, Finetune, Training

ROOT = Path(__file__).parents[1]
STEPS = (ThresholdStep, AnchorStep, CorridorStep, FlatStep, AllocationStep)


def steps_of(method: ComparedMethod) -> list[Settings]:
    return [
        method.threshold_step,
        method.anchor_step,
        method.corridor_step,
        method.flat_step,
        method.allocation_step,
    ]


def compared(**changed: Any) -> ComparedMethod:
    return ComparedMethod(kind="two_phase", allocation="uniform", **changed)


# Plain values


def test_settings_come_from_plain_values_and_what_is_missing_has_its_default() -> None:
    found = Method.of({"repair": "none", "sparsities": [0.5], "phase2": {"guides": ["lamp"]}, "unknown": 3})
    assert found == Method(repair="none", sparsities=(0.5,), phase2=Phase2(guides=("lamp",)))
    assert found.phase2.softness == Phase2().softness
    assert Method.of({}) == Method()


@pytest.mark.parametrize("kind", [Evaluating, Compute, Publishing, Method, Phase1, Phase2, Flat])
def test_plain_values_are_lists_and_mappings_that_lead_back(kind: type[Settings]) -> None:
    plain = kind().plain()
    assert kind.of(plain) == kind()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert list(plain) == [one.name for one in fields(kind)]


@pytest.mark.parametrize("i", range(len(STEPS)), ids=[kind.__name__ for kind in STEPS])
def test_what_a_step_depends_on_reaches_its_script_as_plain_values(i: int) -> None:
    step = steps_of(compared(front_size=None, search_repair="none"))[i]
    assert type(step) is STEPS[i]
    assert STEPS[i].of(yaml.safe_load(yaml.safe_dump(step.plain()))) == step


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Evaluating().repair = "none"  # type: ignore[misc]


def test_a_part_has_the_values_that_both_hold_and_defaults_for_the_rest() -> None:
    phase2 = Phase2(softness=0.3, algorithm="moead")
    assert phase2.part(Moves) == Moves(softness=0.3)
    assert phase2.part(Moves, adaptive=False) == Moves(softness=0.3, adaptive=False)
    assert Evaluating(damping=0.2).part(Compute) == Compute()


# What the parts of a method say


@pytest.mark.parametrize(
    ("repair", "search_repair", "in_search"),
    [("reconstruct", None, "reconstruct"), ("reconstruct", "none", "none"), ("none", "batchnorm", "batchnorm")],
)
def test_candidates_are_put_right_by_the_repair_of_the_search_and_networks_by_the_other(
    repair: str, search_repair: str | None, in_search: str
) -> None:
    step = compared(repair=repair, search_repair=search_repair, objectives=("divergence", "macs")).flat_step
    assert step.evaluating == Evaluating(repair=repair, objective="divergence")
    assert step.search_evaluating == Evaluating(repair=in_search, objective="divergence")
    assert step.costs == ("macs",)


def test_a_step_computes_with_what_it_was_granted() -> None:
    step = compared(precision="bfloat16", batch_size=7).corridor_step
    assert step.compute("cuda", 3, 100) == Compute("bfloat16", 7, "cuda", 3, 100)


@pytest.mark.parametrize("total", [600, 601, 155, 3])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.999, 1, 1.0])
def test_phase_2_gets_what_phase_1_left_unless_there_is_no_phase_2(total: int, share: float) -> None:
    budget = Budget(total, share)
    assert budget.phase1 == round(total * share)
    for spent in (budget.phase1, budget.phase1 - 1):
        assert budget.phase2(spent) == (total - spent if budget.phase1 < total else 0)


# Registries


def test_tables_of_names_say_what_the_registries_do() -> None:
    assert {name: repair.refits for name, repair in REPAIRS.items()} == REPAIR_REFITS
    assert {name: score.needs for name, score in SCORES.items()} == SCORE_NEEDS
    assert tuple(ALGORITHMS) == settings.ALGORITHMS
    assert tuple(COSTS) == settings.COSTS
    assert {*settings.COSTS, *settings.CHANNEL_COSTS} == {*SLIM_COSTS, settings.LATENCY}
    assert not {*COSTS} & {*settings.CHANNEL_COSTS}
    assert REPAIR_REFITS == {"none": False, "batchnorm": False, "reconstruct": True}


def test_networks_are_timed_in_the_workflow_as_in_the_library() -> None:
    found, runtime = Timing(), runtimes.Runtime()
    assert (found.runtime, found.batch_size, found.threads) == (runtime.name, runtime.batch_size, runtime.threads)
    assert (found.repeats, found.bound, found.most_repeats) == (timing.REPEATS, timing.BOUND, timing.MOST_REPEATS)


def test_a_configuration_is_checked_without_torch() -> None:
    code = "import sys, paretoprune.workflow.schema; print(sorted({'torch', 'pymoo', 'pandas'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(ROOT / "workflow" / "scripts")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# One place for each default, range and meaning


def all_fields(kind: type[Settings], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain key below a class by path, without groups that have names of the user's choice."""
    types = get_type_hints(kind)
    for one in fields(kind):
        inner = types[one.name]
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from all_fields(inner, f"{path}{one.name}.")
        else:
            yield f"{path}{one.name}", one


def test_the_configuration_that_ships_has_the_defaults_of_the_classes() -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))

    def value(path: str) -> Any:
        found: Any = config
        for key in path.split("."):
            found = found[key]
        return found

    declared = {path: schema.default_of(one) for path, one in all_fields(Configuration)}
    without = {path for path, default in declared.items() if default is MISSING}
    assert without == {"runs", "datasets", "networks", "methods", "method_settings", "finetune.methods"}
    assert len(declared) > 60
    assert {path: value(path) for path in declared.keys() - without} == {
        path: default for path, default in declared.items() if path not in without
    }


def test_a_recipe_is_what_the_configuration_says_of_training_and_of_images() -> None:
    """`training.loop` does not import the settings, so that a word changed there trains nothing again."""
    augmentation = {one.name for one in fields(Augmentation)}
    finetuning = {one.name for one in fields(Finetune)} - {"methods", "sparsities", "knee"}
    assert {one.name for one in fields(Recipe)} == finetuning | augmentation
    assert {one.name for one in fields(Training)} < finetuning


@pytest.mark.parametrize(
    ("file", "text"),
    [(schema.SCHEMA_FILE, schema.schema_text), (schema.REFERENCE_FILE, schema.reference_text)],
    ids=["schema", "reference"],
)
def test_what_is_written_from_the_classes_is_up_to_date(file: Path, text: Any) -> None:
    assert (ROOT / file).read_text(encoding="utf-8") == text(), "run make schema"


def test_the_files_are_written_where_they_are_expected(tmp_path: Path) -> None:
    for file in (schema.SCHEMA_FILE, schema.REFERENCE_FILE):
        (tmp_path / file).parent.mkdir(parents=True)
    schema.main(tmp_path)
    assert yaml.safe_load((tmp_path / schema.SCHEMA_FILE).read_text(encoding="utf-8")) == schema.configuration_schema()
    assert (tmp_path / schema.REFERENCE_FILE).read_text(encoding="utf-8") == schema.reference_text()


def test_the_reference_has_a_line_for_every_key() -> None:
    text = schema.reference_text()
    for path, one in all_fields(Configuration):
        if path not in ("runs", "datasets", "networks", "method_settings"):
            (line,) = [line for line in text.splitlines() if line.startswith(f"| `{path}` |")]
            assert line.endswith(f"| {one.metadata['description']} |")
    assert "| `search.population` | `30` | whole number ≥ 4 | candidates in a population |" in text
    assert "| `search.front_size` | `60` | whole number ≥ 2 or null |" in text
    assert "| `datasets.<name>.path` |  | text | of an imagefolder" in text
    assert "| `method_settings.<name>.kind` |  | two_phase, flat, allocation, channels |" in text
    assert "| `ladder` | `densities` |" in text
