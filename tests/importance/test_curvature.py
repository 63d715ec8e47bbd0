"""Importance by curvature against brute force: every weight left out once, and every system solved anew."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.importance.curvature import curvature_scores, damped, eliminate_row, elimination_losses, single_losses
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics
from paretoprune.masks.units import WeightUnits
from small_networks import calibration, trained
from torch import Tensor

SEEDS = st.integers(0, 1000)


def problem(
    groups: int,
    n_rows: int,
    n_columns: int,
    seed: int,
    n_samples: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Weights (groups, n_rows, n_columns) and a damped curvature of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, n_rows, n_columns, generator=generator, dtype=torch.float64)
    mixed = torch.randn(groups, n_columns, n_columns, generator=generator, dtype=torch.float64) / n_columns**0.5
    x = torch.randn(groups, n_samples or 2 * n_columns, n_columns, generator=generator, dtype=torch.float64) @ mixed
    h = damped(x.mT @ x / x.shape[1])
    return weight.to(dtype), h.to(dtype)


def best(w: np.ndarray, h: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights of one row, at their best over what is kept, and their squared error; by the pseudo-inverse."""
    v = np.zeros_like(w)
    at = np.flatnonzero(kept)
    v[at] = np.linalg.lstsq(h[np.ix_(at, at)], h[at] @ w, rcond=None)[0]
    return v, float((w - v) @ h @ (w - v))


@given(groups=st.integers(1, 3), n_columns=st.integers(1, 12), seed=SEEDS)
def test_single_losses_are_the_errors_of_rows_without_one_weight(groups: int, n_columns: int, seed: int) -> None:
    weight, h = problem(groups, 2, n_columns, seed)
    found = single_losses(weight, h)
    assert found.dtype == torch.float32
    for group, row, column in np.ndindex(*weight.shape):
        kept = np.arange(n_columns) != column
        expected = best(weight[group, row].numpy(), h[group].numpy(), kept)[1]
        assert found[group, row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def naive_elimination(w: np.ndarray, h: np.ndarray) -> tuple[list[int], list[float]]:
    """Greedy removal that inverts the kept block anew at each step, in float64."""
    kept = np.ones(len(w), dtype=bool)
    v, order, losses = w, [], []
    while kept.any():
        at = np.flatnonzero(kept)
        each = v[at] ** 2 / np.linalg.inv(h[np.ix_(at, at)]).diagonal()
        q = int(at[each.argmin()])
        order.append(q)
        losses.append(float(each.min()))
        kept[q] = False
        v, _ = best(w, h, kept)
    return order, losses


def eliminated(w: Tensor, h: Tensor) -> tuple[np.ndarray, np.ndarray]:
    inverse = torch.linalg.inv(h).float().numpy()
    before = inverse.copy()
    found = eliminate_row(w.float().numpy(), inverse)
    np.testing.assert_array_equal(inverse, before)
    return found


# 64 columns are dropped from the inverse at a time.
@pytest.mark.parametrize("n_columns", [1, 2, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("seed", [0, 1])
def test_elimination_is_the_greedy_loop_that_inverts_anew(n_columns: int, seed: int) -> None:
    weight, h = problem(1, 1, n_columns, seed)
    w = weight[0, 0].numpy()
    order, losses = eliminated(weight[0, 0], h[0])
    expected_order, expected = naive_elimination(w, h[0].numpy())
    # Float32, and each step's inverse from the last one's.
    np.testing.assert_allclose(losses, expected, rtol=2e-3, atol=1e-6)
    # Two weights with all but equal losses may change places.
    assert np.mean(order == np.array(expected_order)) > 0.9
    assert sorted(order.tolist()) == list(range(n_columns))


@pytest.mark.parametrize("n_columns", [9, 70, 130])
def test_losses_add_up_to_the_error_after_re_fitting_what_is_left(n_columns: int) -> None:
    weight, h = problem(1, 1, n_columns, 3)
    w = weight[0, 0].numpy()
    order, losses = eliminated(weight[0, 0], h[0])
    for n_gone in {1, n_columns // 3, n_columns // 2, n_columns - 1, n_columns}:
        kept = np.ones(n_columns, dtype=bool)
        kept[order[:n_gone]] = False
        assert losses[:n_gone].sum() == pytest.approx(best(w, h[0].numpy(), kept)[1], rel=1e-3)


def test_elimination_beats_the_order_of_magnitudes_and_of_single_losses() -> None:
    weight, h = problem(1, 1, 40, 0)
    w = weight[0, 0].numpy()
    orders = {
        "elimination": eliminated(weight[0, 0], h[0])[0],
        "single": single_losses(weight, h)[0, 0].numpy().argsort(),
        "magnitude": np.abs(w).argsort(),
    }
    errors = {}
    for name, order in orders.items():
        kept = np.ones(40, dtype=bool)
        kept[order[:24]] = False
        errors[name] = best(w, h[0].numpy(), kept)[1]
    assert errors["elimination"] < errors["single"]
    assert errors["elimination"] < errors["magnitude"]


@given(n_columns=st.integers(1, 80), n_samples=st.integers(1, 60), seed=SEEDS)
def test_elimination_losses_rise_within_a_row_in_the_order_of_elimination(
    n_columns: int, n_samples: int, seed: int
) -> None:
    weight, h = problem(2, 2, n_columns, seed, n_samples, torch.float32)
    found = elimination_losses(weight, h)
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert bool((found >= 0).all())
    for group, row in np.ndindex(2, 2):
        order, losses = eliminate_row(weight[group, row].numpy(), torch.linalg.inv(h[group].double()).float().numpy())
        along = found[group, row].numpy()[order]
        assert np.all(np.diff(along) >= 0)
        np.testing.assert_allclose(along, np.maximum.accumulate(losses), rtol=1e-5, atol=1e-7)


def test_a_weight_of_zero_and_one_on_a_dead_input_go_first() -> None:
    weight, h = problem(1, 1, 10, 0)
    x = torch.linalg.cholesky(h).mT.clone()
    x[:, :, 3] = 0
    weight[0, 0, 7] = 0
    h = damped(x.mT @ x)
    order, losses = eliminated(weight[0, 0], h[0])
    assert set(order[:2].tolist()) <= {3, 7}
    assert losses[:1].tolist() == [0]


# Damping


def test_damping_adds_a_share_of_the_mean_diagonal_of_each_group() -> None:
    h = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
    found = damped(h, 0.1)
    assert torch.allclose(found - h, torch.diag_embed(torch.tensor([[0.2] * 3, [2.0] * 3])), atol=1e-6)


def test_without_any_signal_the_curvature_is_the_identity() -> None:
    assert torch.equal(damped(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))
    one_dead = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    assert torch.equal(damped(one_dead, 0.5), torch.stack([torch.eye(3), 1.5 * torch.eye(3)]))
    weight = torch.tensor([[[1.0, -2.0, 3.0]]])
    assert elimination_losses(weight, damped(torch.zeros(1, 3, 3))).flatten().tolist() == pytest.approx([1, 4, 9])


# Whole layers


def statistics_of(weight: Tensor, h: Tensor, sensitivity: Tensor) -> LayerStatistics:
    groups, _, n_columns = weight.shape
    return LayerStatistics(h, torch.zeros(groups, n_columns), sensitivity, 1000, True)


@pytest.mark.parametrize("exact", [True, False])
def test_scores_are_losses_times_the_sensitivity_of_their_row(exact: bool) -> None:
    weight, h = problem(2, 3, 12, 0, dtype=torch.float32)
    sensitivity = torch.tensor([1.0, 0.0, 2.0, 0.5, 4.0, 8.0])
    layer = statistics_of(weight, h, sensitivity)
    shaped = weight.reshape(6, 3, 2, 2)
    found = curvature_scores({"a": shaped}, {"a": layer}, exact=exact, damping=0.3)["a"]
    losses = (elimination_losses if exact else single_losses)(weight, damped(h, 0.3))
    expected = losses.reshape(6, 12) * sensitivity[:, None]
    assert found.shape == shaped.shape
    torch.testing.assert_close(found.reshape(6, 12), expected, rtol=1e-6, atol=0)


def test_very_wide_layers_take_the_order_of_single_losses_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    weight, h = problem(1, 3, 12, 0, dtype=torch.float32)
    layer = statistics_of(weight, h, torch.ones(3))
    exact, single = (curvature_scores({"a": weight[0]}, {"a": layer}, exact=exact)["a"] for exact in (True, False))
    assert not torch.equal(exact, single)
    with caplog.at_level(logging.INFO, "paretoprune"):
        found = curvature_scores({"a": weight[0]}, {"a": layer}, exact=True, max_columns=11)["a"]
    assert torch.equal(found, single)
    assert caplog.messages[0].startswith("'a' has 12 inputs: its weights are taken in the order of their single losses")


def test_a_tensor_without_statistics_is_scored_by_its_squares_and_named(caplog: pytest.LogCaptureFixture) -> None:
    found = curvature_scores({"up": torch.tensor([[1.0, -2.0]])}, {}, exact=True)["up"]
    assert found.tolist() == [[1.0, 4.0]]
    assert caplog.messages == ["'up' has no statistics; its weights are scored by their squares"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_scores_of_trained_networks_are_finite_and_fit_their_tensors(kind: str, exact: bool) -> None:
    network = trained(kind)
    layout = WeightUnits.of(network)
    # So few images that no layer is determined by them.
    for images in (calibration(), calibration()[:3]):
        statistics = collect_statistics(network, layout, images, seed=0)
        weights = {name: network.get_parameter(name) for name in layout.names}
        scores = curvature_scores(weights, statistics, exact=exact)
        assert tuple(scores) == layout.names
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            assert tuple(scores[name].shape) == shape
            assert scores[name].dtype == torch.float32
            assert not scores[name].requires_grad
            assert bool(torch.isfinite(scores[name]).all())
            assert bool((scores[name] >= 0).all())
