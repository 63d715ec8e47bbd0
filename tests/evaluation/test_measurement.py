"""The measurement of a front: one complete row per member, and per member and layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.measurement import (
    FRONT_COLUMNS,
    LAYER_COLUMNS,
    front_columns,
    front_rows,
    layer_rows,
    measure_errors,
)
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from small_networks import digits, magnitude_mask, trained

LAYOUT = WeightUnits.of(trained("foreign"))


def some_front() -> Front:
    masks = [magnitude_mask(trained("foreign"), LAYOUT, density) for density in (0.1, 0.4, 0.8)]
    objectives = np.array([[0.5, 0.1], [0.3, 0.4], [0.1, 0.8]])
    return Front(PackedMasks.pack(np.array(masks)), objectives, ["start", "phase1", "phase2"])


def test_every_member_has_a_complete_row_in_the_order_of_the_front() -> None:
    front = some_front()
    rows = front_rows(front, np.array([0.6, 0.25, 0.125]))
    assert all(tuple(row) == FRONT_COLUMNS for row in rows)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["stage"] for row in rows] == ["start", "phase1", "phase2"]
    # The objectives are those of the search; only the test error is measured here.
    assert [row["search_error"] for row in rows] == [0.5, 0.3, 0.1]
    assert [row["density"] for row in rows] == [0.1, 0.4, 0.8]
    assert [row["sparsity"] for row in rows] == [1 - 0.1, 1 - 0.4, 1 - 0.8]
    assert [row["test_error"] for row in rows] == [0.6, 0.25, 0.125]
    assert all(isinstance(row[key], float) for row in rows for key in ("density", "search_error", "test_error"))


def test_layer_rows_count_every_weight_once() -> None:
    front, layout = some_front(), LAYOUT
    rows = layer_rows(front, layout, [])
    assert all(tuple(row) == LAYER_COLUMNS for row in rows)
    assert [(row["id"], row["layer"]) for row in rows] == [(i, name) for i in range(3) for name in layout.names]
    for i in range(3):
        own = [row for row in rows if row["id"] == i]
        assert sum(row["n_weights"] for row in own) == layout.n_weights
        for row, part in zip(own, layout.split(front.masks.unpack(i)).values(), strict=True):
            assert (row["n_weights"], row["n_kept"]) == (part.size, int(part.sum()))
            assert isinstance(row["n_kept"], int)


def test_layer_rows_of_smaller_networks_are_what_they_hold() -> None:
    front, names = replace(some_front(), units="channels"), LAYOUT.names
    states = [{names[0]: torch.zeros(2, 3)}, {names[1]: torch.zeros(5)}, {}]
    rows = layer_rows(front, LAYOUT, states)
    assert [row["n_kept"] for row in rows if row["layer"] == names[0]] == [6, 0, 0]
    assert [row["n_kept"] for row in rows if row["layer"] == names[1]] == [0, 5, 0]
    assert [row["n_weights"] for row in rows if row["id"] == 0] == LAYOUT.sizes.tolist()


def test_an_empty_front_has_no_rows() -> None:
    empty = Front.empty(LAYOUT.n_weights)
    assert front_rows(empty, np.array([])) == []
    assert layer_rows(empty, LAYOUT, []) == []


@pytest.mark.parametrize("n_workers", [1, 2])
def test_errors_are_those_of_each_network_by_itself_in_any_number_of_processes(n_workers: int) -> None:
    images, labels = digits()
    evaluated = LabelledImages(images[1000:1300], labels[1000:1300])
    networks = [trained("foreign"), trained("foreign"), trained("foreign")]
    for network, share in zip(networks[1:], (0.5, 0.9), strict=True):
        for parameter in network.parameters():
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < share] = 0
    states = [network.state_dict() for network in networks]
    found = measure_errors(trained("foreign"), states, evaluated, torch.device("cpu"), n_workers)
    expected = [top1_error(predict(network, evaluated.images, 50), evaluated.labels) for network in networks]
    assert found.dtype == np.float64
    assert found.tolist() == expected
    assert expected[0] < expected[2]


def test_no_networks_have_no_errors() -> None:
    images, labels = digits()
    evaluated = LabelledImages(images[:10], labels[:10])
    assert measure_errors(trained("foreign"), [], evaluated, torch.device("cpu")).shape == (0,)


def test_costs_that_are_not_the_density_have_columns_of_their_own() -> None:
    front = some_front()
    other = Front(
        front.masks, np.column_stack([front.objectives, [0.2, 0.5, 0.9]]), front.stages, ("error", "density", "macs")
    )
    assert front_columns(front) == FRONT_COLUMNS
    assert front_columns(other) == (*FRONT_COLUMNS, "macs")
    rows = front_rows(other, np.zeros(3))
    assert [row["macs"] for row in rows] == [0.2, 0.5, 0.9]
    assert all(tuple(row) == front_columns(other) for row in rows)
