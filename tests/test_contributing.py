"""What CONTRIBUTING.md says of adding something: each of its code blocks is run, and what it adds is used."""

# Until the registries are there that some blocks add to.
# mypy: disable-error-code="import-not-found, attr-defined, call-arg"

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.importance.allocation import ALLOCATIONS, allocate
from paretoprune.masks.packed import PackedMasks
from small_networks import digits, trained

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def built(module: str) -> bool:
    """Whether the package has a module, looked for without importing what it imports."""
    return all(find_spec(module.rsplit(".", n)[0]) for n in range(module.count("."), -1, -1))


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip where the registry that a block adds to is not there yet."""
    return pytest.mark.skipif(not all(map(built, modules)), reason=f"needs {', '.join(modules)}")


def block_under(heading: str) -> str:
    """The Python code under a heading of the page."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section, heading
    blocks = re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, heading
    return str(blocks[0])


def add(heading: str) -> dict[str, Any]:
    """Run the block under a heading and return the names that it defines."""
    # Classes look up the module that they are defined in, so it has a name.
    names: dict[str, Any] = {"__name__": "contributed"}
    exec(compile(block_under(heading), f"CONTRIBUTING.md, {heading}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _registries_as_they_were() -> Iterator[None]:
    """What a block adds is taken out again."""
    found = [registry for name, module in REGISTRIES.items() if built(module) for registry in [_registry(module, name)]]
    before = [dict(registry) for registry in found]
    yield
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


REGISTRIES = {
    "ALLOCATIONS": "paretoprune.importance.allocation",
    "SCORES": "paretoprune.importance.scores",
    "SCORE_NEEDS": "paretoprune.importance.registry",
    "REPAIRS": "paretoprune.repair.repairs",
    "REPAIR_REFITS": "paretoprune.repair.registry",
    "ALGORITHMS": "paretoprune.search.algorithms",
    "COSTS": "paretoprune.networks.costs",
}


def _registry(module: str, name: str) -> dict[str, Any]:
    registry = getattr(__import__(module, fromlist=[name]), name)
    assert isinstance(registry, dict), f"{module}.{name}"
    return registry


def test_every_way_to_add_something_is_tested() -> None:
    how_to = PAGE.read_text(encoding="utf-8").partition("## How to add something")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.*)$", how_to, re.MULTILINE)
    assert headings == ["An allocation", "A score", "A repair", "An algorithm", "A unit", "An objective"]
    for heading in headings:
        compile(block_under(heading), heading, "exec")


def test_an_allocation(layout: Any) -> None:
    add("An allocation")
    assert "smallest_first" in ALLOCATIONS
    scores = np.zeros(layout.n_weights)
    # Layers of 108, 216 and 70 weights: the last comes first.
    assert allocate("smallest_first", scores, layout, 100 / 394).tolist() == [30, 0, 70]
    assert allocate("smallest_first", scores, layout, 1.0).tolist() == [108, 216, 70]
    assert allocate("smallest_first", scores, layout, 0.0).dtype == np.int64


def test_a_score() -> None:
    add("A score")
    from paretoprune.importance.scores import compute_importance
    from paretoprune.masks.units import WeightUnits

    network = trained("residual")
    units = WeightUnits.of(network)
    scores = compute_importance("relative", network, units, *digits(), 0)
    for name, shape in zip(units.names, units.shapes, strict=True):
        assert tuple(scores[name].shape) == shape
        assert 0 <= float(scores[name].min()) < float(scores[name].max()) == 1


@needs("paretoprune.repair.repairs")
def test_a_repair() -> None:
    add("A repair")
    from paretoprune.repair.repairs import make_repair

    network, pruned, images = trained("residual"), trained("residual"), digits()[0][:200]
    with torch.no_grad():
        pruned.get_parameter("conv1.weight")[:2] = 0
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        make_repair("fresh", network, images)(pruned)
        pruned.get_submodule("bn1").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        pruned(images)
    norm = pruned.get_submodule("bn1")
    assert not norm.training
    torch.testing.assert_close(norm.get_buffer("running_mean"), seen[0].mean(dim=(0, 2, 3)))


@needs("paretoprune.repair.repairs", "paretoprune.evaluation.task")
def test_candidates_are_evaluated_under_a_repair_that_was_added() -> None:
    add("A repair")
    from paretoprune.evaluation.evaluator import PopulationEvaluator
    from paretoprune.evaluation.task import Task
    from paretoprune.masks.units import WeightUnits
    from paretoprune.settings import Compute, Evaluating

    network, (images, labels) = trained("residual"), digits()
    units = WeightUnits.of(network)
    task = Task(network, units, images[1000:1200], labels[1000:1200], images[:200])
    rng = np.random.default_rng(0)
    masks = PackedMasks.pack(rng.random((2, units.n_weights)) < 0.9)
    losses = [
        PopulationEvaluator(task, Evaluating(repair=repair), Compute(precision="float32"))(masks)
        for repair in ("none", "fresh")
    ]
    assert np.all(losses[1] < losses[0])


@needs("paretoprune.search.algorithms")
def test_an_algorithm() -> None:
    add("An algorithm")
    result = search("sms_emoa", _plain_units())
    assert result.history[-1]["evaluations"] == 60
    assert len(result.front) > 1


@needs("paretoprune.search.problem")
def test_a_unit(layout: Any) -> None:
    units = add("A unit")["FilterUnits"](layout.names, layout.shapes)
    assert (units.n_units, units.n_groups) == (20, 3)
    bits = np.zeros(20, dtype=bool)
    bits[[0, 19]] = True
    weights = layout.split(units.to_weights(bits))
    assert [int(part.sum()) for part in weights.values()] == [27, 0, 7]
    assert weights["conv1.weight"][0].all()
    assert search("nsga2", units).front.masks.n_units == 20


@needs("paretoprune.networks.costs")
def test_an_objective() -> None:
    add("An objective")
    from paretoprune.masks.units import WeightUnits
    from paretoprune.networks.costs import Priced, make_costs

    network, images = trained("residual"), digits()[0]
    units = WeightUnits.of(network)
    (cost,) = make_costs(["layer_density"], Priced(network, units, images[:1]))
    half = np.ones(units.n_weights, dtype=bool)
    half[: units.sizes[0]] = False
    masks = PackedMasks.pack(np.array([np.ones(units.n_weights, dtype=bool), half]))
    np.testing.assert_allclose(cost.of(masks), [1.0, 1 - 1 / units.n_groups], rtol=1e-12, atol=0)


def _plain_units() -> Any:
    from paretoprune.masks.units import PlainUnits

    return PlainUnits(("first", "second"), (20, 30))


def search(algorithm: str, units: Any) -> Any:
    """A flat search for masks that keep the first bits of all."""
    from paretoprune.search.flat import search_flat
    from paretoprune.search.problem import Effort, Problem
    from paretoprune.settings import Flat

    worth = np.linspace(1, 0, units.n_units)

    def evaluate(masks: PackedMasks) -> np.ndarray:
        return np.array([1 - worth[masks.unpack(i)].sum() / worth.sum() for i in range(len(masks))])

    return search_flat(Problem(units, evaluate), Flat(algorithm=algorithm, flip_rate=0.05), Effort(60, 10, 0))
