"""The measurement of a front: one complete row per member, and per member and layer."""

import numpy as np
from paretoprune.evaluation import PopulationEvaluator
from paretoprune.fronts import Front
from paretoprune.masks import MaskLayout, PackedMasks
from paretoprune.measurement import FRONT_COLUMNS, LAYER_COLUMNS, front_rows, layer_rows
from small_networks import digits, magnitude_mask, trained


def judge() -> PopulationEvaluator:
    network, (images, labels) = trained("foreign"), digits()
    return PopulationEvaluator(
        network,
        MaskLayout.of(network),
        images[1000:1300],
        labels[1000:1300],
        repair="batchnorm",
        calibration_images=images[:100],
    )


def some_front(evaluate: PopulationEvaluator) -> Front:
    masks = [magnitude_mask(trained("foreign"), evaluate.layout, density) for density in (0.1, 0.4, 0.8)]
    objectives = np.array([[0.5, 0.1], [0.3, 0.4], [0.1, 0.8]])
    return Front(PackedMasks.pack(np.array(masks)), objectives, ["start", "phase1", "phase2"])


def test_every_member_has_a_complete_row_in_the_order_of_the_front() -> None:
    evaluate = judge()
    front = some_front(evaluate)
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
    evaluate = judge()
    front, layout = some_front(evaluate), evaluate.layout
    rows = layer_rows(front, layout)
    assert all(tuple(row) == LAYER_COLUMNS for row in rows)
    assert [(row["id"], row["layer"]) for row in rows] == [(i, name) for i in range(3) for name in layout.names]
    for i in range(3):
        own = [row for row in rows if row["id"] == i]
        assert sum(row["n_weights"] for row in own) == layout.n_weights
        for row, part in zip(own, layout.split(front.masks.unpack(i)).values(), strict=True):
            assert (row["n_weights"], row["n_kept"]) == (part.size, int(part.sum()))
            assert isinstance(row["n_kept"], int)


def test_an_empty_front_has_no_rows() -> None:
    evaluate = judge()
    empty = Front.empty(evaluate.layout.n_weights)
    assert front_rows(empty, np.array([])) == []
    assert layer_rows(empty, evaluate.layout) == []
