"""Shared by the tests: how hypothesis runs, a layout whose masks do not fill their last word, an analytic loss."""

import pytest
from hypothesis import settings
from paretoprune.masks.units import WeightUnits
from paretoprune.search.recorder import SearchResult
from searches import Analytic, thresholds

# The same examples in every run, so that a red test is about the change at hand; no deadline, as machines differ.
settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")


# A file runs in one process: the longest first, or one process works on its last file while the others have ended.
LONGEST = ("test_workflow.py", "test_api.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def layout() -> WeightUnits:
    """Three layers of 108, 216 and 70 weights; 394 in all, 10 bits into the seventh word."""
    return WeightUnits(("conv1.weight", "conv2.weight", "linear.weight"), ((4, 3, 3, 3), (6, 4, 3, 3), (10, 7)))


@pytest.fixture
def evaluate(layout: WeightUnits) -> Analytic:
    return Analytic(layout)


@pytest.fixture(scope="module")
def phase1(layout: WeightUnits) -> SearchResult:
    return thresholds(Analytic(layout))
