"""Tables of the page that are more than formatted columns."""

from pathlib import Path

from paretoprune.reporting.read_results import read_run
from paretoprune.reporting.subject import Run
from paretoprune.reporting.tables import costs_table
from result_files import ERRORS, KINDS, write_hand_computed, write_macs


def test_members_are_listed_with_every_cost_sparsest_first(tmp_path: Path) -> None:
    write_hand_computed(tmp_path, ERRORS, "error")
    run = Run("digits", "resnet8", (1, 0), "error", ("density", "macs"))
    table = costs_table(read_run(write_macs(tmp_path), run, KINDS, []))
    assert table.head == ["method", "member", "density (%)", "macs (%)", "search error (%)", "test error (%)"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["pareto", "1", "20.00", "30.00", "30.00", "28.00"],
        ["pareto", "0", "50.00", "60.00", "10.00", "12.00"],
        ["nsga2", "0", "40.00", "50.00", "50.00", "50.00"],
        ["uniform", "1", "90.00", "100.00", "20.00", "11.00"],
        ["uniform", "0", "100.00", "110.00", "10.00", "10.00"],
    ]


def test_the_density_is_listed_where_it_is_no_cost(tmp_path: Path) -> None:
    write_hand_computed(tmp_path, ERRORS, "error")
    run = Run("digits", "resnet8", (0,), "error", ("macs",))
    assert costs_table(read_run(write_macs(tmp_path), run, KINDS, [])).head[2:4] == ["density (%)", "macs (%)"]
