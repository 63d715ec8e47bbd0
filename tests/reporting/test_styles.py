"""Styles: told apart, and the same in every figure."""

import pytest
from paretoprune.reporting.styles import MOST_SHOWN, comparison_styles, method_styles

NAMES = [f"method_{i:02d}" for i in range(15)]


def test_at_most_as_many_methods_as_can_be_told_apart() -> None:
    styles = comparison_styles(NAMES[:MOST_SHOWN])
    for attribute in ("color", "dashes", "marker"):
        assert len({str(getattr(style, attribute)) for style in styles.values()}) == MOST_SHOWN
    widths = [style.width for style in styles.values()]
    assert widths[0] > max(widths[1:])
    with pytest.raises(ValueError, match="expected at most 5 methods to draw, found 15; choose"):
        comparison_styles(NAMES)


def test_every_method_looks_different() -> None:
    kinds = {"a": "two_phase", "b": "two_phase", **dict.fromkeys("cd", "flat"), **dict.fromkeys("efghij", "allocation")}
    styles = method_styles(kinds)
    assert len({(style.color, str(style.dashes)) for style in styles.values()}) == len(kinds)
    assert method_styles({"a": "two_phase"})["a"] == styles["a"]
