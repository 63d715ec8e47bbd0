"""What a report is about, checked before anything is read."""

from pathlib import Path

import pytest
from paretoprune.objectives import reference_point
from paretoprune.reporting.subject import Run
from result_files import ERRORS, KINDS, report_on, settings, write_hand_computed


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results tree of one run, for tests that spoil it."""
    write_hand_computed(tmp_path / "results", ERRORS, "error")
    return tmp_path / "results"


def test_unknown_method_kind_is_refused(results: Path) -> None:
    with pytest.raises(ValueError, match=r"kind of method 'nsga2' to be one of .*, found 'greedy'; correct"):
        report_on(results, settings=settings({**KINDS, "nsga2": "greedy"}))
    with pytest.raises(ValueError, match=r"kind of method 'lamp' to be one of .*, found None; correct"):
        report_on(results, ["lamp"])


@pytest.mark.parametrize("name", ["runs", "seeds", "methods"])
def test_report_on_nothing_is_refused(results: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"expected at least one of {name}, found none; name"):
        report_on(results, **{name: []})


def test_an_unknown_reference_is_refused_before_anything_is_written(results: Path) -> None:
    with pytest.raises(ValueError, match=r"settings\['reference'\] to be one of pareto, .*, found 'lamp'; correct"):
        report_on(results, settings=settings() | {"reference": "lamp"})
    assert not (results.parent / "report").exists()


def test_an_unknown_objective_is_refused(results: Path) -> None:
    with pytest.raises(ValueError, match="digits/resnet8: expected objective 'error' or 'divergence', found 'loss'"):
        report_on(results, runs=[ERRORS | {"objective": "loss"}])
    assert not (results.parent / "report").exists()


def test_the_reference_point_is_1_for_the_error_and_beyond_it_for_costs() -> None:
    assert reference_point(["error", "density"]) == (1.0, 1.0)
    assert reference_point(["error", "macs"]) == (1.0, 1.1)
    assert reference_point(["error", "density", "bytes"]) == (1.0, 1.1, 1.1)
    assert Run("digits", "resnet8", (0,), "error").largest_hypervolume == 1
    assert Run("digits", "resnet8", (0,), "error", ("density", "macs")).largest_hypervolume == pytest.approx(1.21)


@pytest.mark.parametrize(
    ("costs", "found"),
    [((), "none"), (("macs", "macs"), "macs, macs"), (("density", "seed"), "density, seed")],
)
def test_costs_without_names_of_their_own_are_refused(costs: tuple[str, ...], found: str) -> None:
    with pytest.raises(ValueError, match=f"digits/resnet8: expected costs with names .* found {found}; name"):
        Run("digits", "resnet8", (0,), "error", costs)
