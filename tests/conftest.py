"""Shared by the tests: how hypothesis runs, and a small layout whose masks do not fill their last word."""

import pytest
from hypothesis import settings
from paretoprune.masks.units import WeightUnits

# The same examples in every run, so that a red test is about the change at hand; no deadline, as machines differ.
settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def layout() -> WeightUnits:
    """Three layers of 108, 216 and 70 weights; 394 in all, 10 bits into the seventh word."""
    return WeightUnits(("conv1.weight", "conv2.weight", "linear.weight"), ((4, 3, 3, 3), (6, 4, 3, 3), (10, 7)))
