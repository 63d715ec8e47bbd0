"""The closed-form re-fit against torch.linalg.lstsq on explicit data, and its costs against solving again."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, made
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.importance.curvature import damped
from paretoprune.importance.layer_statistics import LayerStatistics, collect_statistics, output_matrix, prunable_modules
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Refit, refit, refitted_costs
from small_networks import calibration, digits, magnitude_mask, some_masks, states_equal, trained
from torch import Tensor, nn

SEEDS = st.integers(0, 1000)
DAMPING = 0.01


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(groups: int, n: int, n_columns: int, seed: int) -> Tensor:
    """Correlated columns with a mean, float64 (groups, n, n_columns)."""
    mixed = noise(groups, n_columns, n_columns, seed=seed) / n_columns**0.5
    return noise(groups, n, n_columns, seed=seed + 1) @ (mixed + torch.eye(n_columns)) + 0.5


def some_kept(groups: int, n_rows: int, n_columns: int, seed: int) -> Tensor:
    """Rows that keep everything, nothing, one weight, and any share."""
    rng = np.random.default_rng(seed)
    kept = rng.random((groups, n_rows, n_columns)) < rng.random((groups, n_rows, 1))
    kept[:, 0], kept[:, -1] = True, False
    if n_rows > 2:
        kept[:, 1] = np.arange(n_columns) == rng.integers(n_columns)
    return torch.from_numpy(kept)


def least_squares(x: Tensor, y: Tensor, kept: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """One row by torch.linalg.lstsq: fit y from the kept columns of x, and all weights to the trained ones a little.

    Args:
        x: (n, n_columns).
        y: (n,).
        kept: bool (n_columns,).
        weight: (n_columns,), what the additional rows aim at.
        ridge: Their weight, squared.
    """
    pulled = ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    a = torch.cat([x / len(x) ** 0.5, pulled])[:, kept]
    b = torch.cat([y / len(x) ** 0.5, ridge**0.5 * weight])
    found = torch.zeros_like(weight)
    if bool(kept.any()):
        found[kept] = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return found


def damping_of(moment: Tensor) -> list[float]:
    return (DAMPING * moment.diagonal(dim1=1, dim2=2).mean(1)).tolist()


@pytest.mark.parametrize("about_mean", [True, False])
@given(
    groups=st.integers(1, 3), n_rows=st.integers(1, 5), n_columns=st.integers(1, 20), n=st.integers(2, 60), seed=SEEDS
)
def test_re_fitted_rows_are_the_least_squares_of_explicit_data(
    about_mean: bool, groups: int, n_rows: int, n_columns: int, n: int, seed: int
) -> None:
    x, weight = inputs(groups, n, n_columns, seed), noise(groups, n_rows, n_columns, seed=seed + 2)
    x = x - x.mean(1, keepdim=True) if about_mean else x
    moment = x.mT @ x / n
    kept = some_kept(groups, n_rows, n_columns, seed)
    h = damped(moment, DAMPING)
    for inverse in (None, torch.linalg.inv(h)):
        found = refit(weight, kept, h, inverse=inverse)
        assert not bool(found[~kept].any())
        for group, row in np.ndindex(groups, n_rows):
            own = kept[group, row], weight[group, row]
            expected = least_squares(x[group], x[group] @ own[1], *own, damping_of(moment)[group])
            torch.testing.assert_close(found[group, row], expected, rtol=0, atol=1e-8)
        # Nothing is lost: nothing changes.
        torch.testing.assert_close(found[:, 0][kept[:, 0]], weight[:, 0][kept[:, 0]], rtol=0, atol=1e-8)


@given(groups=st.integers(1, 2), n_rows=st.integers(1, 4), n_columns=st.integers(1, 15), seed=SEEDS)
def test_an_explicit_target_is_fitted_from_other_inputs(groups: int, n_rows: int, n_columns: int, seed: int) -> None:
    x, y = inputs(groups, 50, n_columns, seed), noise(groups, 50, n_rows, seed=seed + 3)
    weight, kept = noise(groups, n_rows, n_columns, seed=seed + 2), some_kept(groups, n_rows, n_columns, seed)
    moment, cross = x.mT @ x / 50, y.mT @ x / 50
    ridge = torch.tensor(damping_of(moment), dtype=torch.float64)[:, None, None]
    # A known inverse is of no use here, and must not be used.
    inverse = torch.linalg.inv(damped(moment, DAMPING))
    found = refit(weight, kept, damped(moment, DAMPING), cross + ridge * weight, inverse)
    for group, row in np.ndindex(groups, n_rows):
        own = kept[group, row], weight[group, row]
        expected = least_squares(x[group], y[group, :, row], *own, damping_of(moment)[group])
        torch.testing.assert_close(found[group, row], expected, rtol=0, atol=1e-8)


def by_rows(weight: Tensor, kept: Tensor, h: Tensor) -> Tensor:
    """Every row by itself, in float64."""
    found = torch.zeros_like(weight).double()
    for group, row in np.ndindex(*weight.shape[:2]):
        at = kept[group, row].nonzero()[:, 0]
        block, aim = h[group].double()[at][:, at], (h[group].double() @ weight[group, row].double())[at]
        found[group, row, at] = torch.linalg.solve(block, aim)
    return found


@pytest.mark.parametrize("entries", [1, 2000, 2**24])
@pytest.mark.parametrize("with_inverse", [True, False])
def test_rows_of_very_different_sizes_are_solved_as_each_by_itself(with_inverse: bool, entries: int) -> None:
    # However many rows fit into memory at a time.
    n_columns = 90
    x, weight = inputs(2, 400, n_columns, 0).float(), noise(2, 40, n_columns, seed=1).float()
    sizes = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 34, 44, 45, 46, 55, 80, 89, 90] + [30] * 12 + [60] * 12)
    order = torch.rand(2, 40, n_columns, generator=torch.Generator().manual_seed(2)).argsort(2).argsort(2)
    kept = order < sizes[None, :, None]
    h = damped(x.mT @ x / 400)
    inverse = torch.linalg.inv(h.double()).float() if with_inverse else None
    found = refit(weight, kept, h, inverse=inverse, block_entries=entries)
    assert found.dtype == torch.float32
    assert not bool(found[~kept].any())
    # The curvature's condition is about a thousand, so float32 is good to about 1e-4.
    torch.testing.assert_close(found.double(), by_rows(weight, kept, h), rtol=0, atol=1e-3)


@pytest.mark.parametrize("n_samples", [1, 5, 200])
def test_nothing_is_ever_nan(n_samples: int) -> None:
    x = inputs(1, n_samples, 30, 0).float()
    x[:, :, 3], x[:, :, 4], x[:, :, 5] = 0, 1, x[:, :, 6]
    weight, kept = noise(1, 8, 30).float(), some_kept(1, 8, 30, 0)
    for moment in (x.mT @ x / n_samples, torch.zeros(1, 30, 30), 1e12 * (x.mT @ x), 1e-12 * (x.mT @ x)):
        h = damped(moment)
        for inverse in (None, torch.linalg.inv(h.double()).float()):
            found = refit(weight, kept, h, inverse=inverse)
            assert bool(torch.isfinite(found).all())
            # What cannot be told from the samples stays near the trained weights.
            assert float(found.norm()) < 20 * float(weight.norm())
            costs = refitted_costs(kept[0], weight[0], found[0], h[0])
            assert bool(torch.isfinite(costs).all())
            assert bool((costs >= 0).all())


# What a drop costs and a grow gains


def row_error(w: np.ndarray, h: np.ndarray, kept: np.ndarray) -> float:
    v = np.zeros_like(w)
    at = np.flatnonzero(kept)
    v[at] = np.linalg.solve(h[np.ix_(at, at)], h[at] @ w)
    return float((w - v) @ h @ (w - v))


@given(n_rows=st.integers(1, 5), n_columns=st.integers(1, 12), seed=SEEDS)
def test_costs_are_what_solving_again_finds(n_rows: int, n_columns: int, seed: int) -> None:
    x, weight = inputs(1, 60, n_columns, seed), noise(1, n_rows, n_columns, seed=seed + 2)
    kept, h = some_kept(1, n_rows, n_columns, seed), damped(x.mT @ x / 60)
    found = refitted_costs(kept[0], weight[0], refit(weight, kept, h)[0], h[0])
    for row, column in np.ndindex(n_rows, n_columns):
        w, own, matrix = weight[0, row].numpy(), kept[0, row].numpy(), h[0].numpy()
        changed = own.copy()
        changed[column] ^= True
        expected = abs(row_error(w, matrix, changed) - row_error(w, matrix, own))
        assert found[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("entries", [1, 40 * 30])
def test_costs_do_not_depend_on_how_many_rows_fit_into_memory(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, kept = inputs(1, 60, 30, 0), noise(1, 20, 30), some_kept(1, 20, 30, 0)
    h = damped(x.mT @ x / 60)
    arguments = kept[0], weight[0], refit(weight, kept, h)[0], h[0]
    expected = refitted_costs(*arguments)
    sizes: list[int] = []
    factor = torch.linalg.cholesky

    def watched(blocks: Tensor) -> Tensor:
        # Beside the blocks, as many columns of the whole matrix are gathered.
        sizes.append(len(blocks) * blocks.shape[1] * 30)
        return factor(blocks)

    monkeypatch.setattr(torch.linalg, "cholesky", watched)
    torch.testing.assert_close(refitted_costs(*arguments, block_entries=entries), expected, rtol=1e-9, atol=1e-12)
    assert max(sizes) <= max(entries, 30 * 30)


# Whole networks

NAMES = ("residual", "foreign", "OddGeometry", "PreActivation", "BiasAndNorm", "UsedTwice", "Linear")


def network_of(name: str) -> nn.Module:
    return trained(name) if name in ("residual", "foreign") else made(ARCHITECTURES[name])


def prepared(network: nn.Module, **options: Any) -> tuple[Refit, dict[str, LayerStatistics]]:
    layout = WeightUnits.of(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0, positions=None)
    return Refit(network, layout, statistics, **options), statistics


def parts_of(layout: WeightUnits, mask: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(part.copy()) for name, part in layout.split(mask).items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_a_network_is_re_fitted_to_its_own_outputs(name: str) -> None:
    network = network_of(name)
    reconstruction, statistics = prepared(network)
    layout = reconstruction.layout
    for i in (0, 1, 2, 3, 5, 6, 7):
        mask = some_masks(network).unpack(i)
        found = reconstruction(torch.from_numpy(mask))
        assert tuple(found) == layout.names
        for tensor, kept in parts_of(layout, mask).items():
            dense = network.get_parameter(tensor).detach()
            assert found[tensor].shape == dense.shape
            assert bool(torch.isfinite(found[tensor]).all())
            assert not bool(found[tensor][~kept].any())
            if bool(kept.all()) or tensor not in statistics:
                assert torch.equal(found[tensor], torch.where(kept, dense, 0.0))
                continue
            h = damped(statistics[tensor].curvature)
            grouped = (len(h), len(dense) // len(h), -1)
            expected = by_rows(dense.reshape(grouped), kept.reshape(grouped), h).reshape(dense.shape)
            torch.testing.assert_close(found[tensor].double(), expected, rtol=0, atol=2e-3 * float(dense.abs().max()))


@pytest.mark.parametrize("name", ["residual", "foreign"])
def test_outputs_of_re_fitted_layers_are_nearer_than_those_of_masked_ones(name: str) -> None:
    network = network_of(name)
    reconstruction, statistics = prepared(network)
    layout = reconstruction.layout
    mask = magnitude_mask(network, layout, 0.4)
    found = reconstruction(torch.from_numpy(mask))
    for tensor, kept in parts_of(layout, mask).items():
        if tensor not in statistics:
            continue
        dense = network.get_parameter(tensor).detach()
        h = statistics[tensor].curvature

        def error(weight: Tensor, dense: Tensor = dense, h: Tensor = h) -> float:
            off = (dense - weight).reshape(len(h), len(dense) // len(h), -1)
            return float(((off @ h) * off).sum())

        assert error(found[tensor]) < 0.9 * error(dense * kept), tensor


@pytest.mark.parametrize("name", ["foreign", "BiasAndNorm"])
def test_corrected_biases_keep_the_mean_outputs_of_the_dense_layer(name: str) -> None:
    network = network_of(name)
    reconstruction, _ = prepared(network)
    layout = reconstruction.layout
    weights = reconstruction(torch.from_numpy(magnitude_mask(network, layout, 0.4)))
    biases = reconstruction.bias(weights)
    seen: dict[str, Tensor] = {}
    held = {
        module_name: (name, layer)
        for name, all_ in prunable_modules(network, layout).items()
        for module_name, layer in all_
    }
    handles = [
        layer.register_forward_pre_hook(lambda _, x, at=at: seen.__setitem__(at, x[0]))
        for at, (_, layer) in held.items()
    ]
    with torch.no_grad():
        network(calibration())
    for handle in handles:
        handle.remove()
    single = {
        at
        for at, (tensor, layer) in held.items()
        if layer.bias is not None and len(prunable_modules(network, layout)[tensor]) == 1
    }
    assert single <= set(biases)
    assert len(single) >= 2
    for at in single:
        tensor, layer = held[at]
        with torch.no_grad():
            before = output_matrix(layer, layer(seen[at])).mean(1)
            state = {"weight": weights[tensor], "bias": biases[at]}
            after = output_matrix(layer, torch.func.functional_call(layer, state, (seen[at],))).mean(1)
            masked = output_matrix(
                layer,
                torch.func.functional_call(layer, state | {"bias": network.get_parameter(f"{at}.bias")}, (seen[at],)),
            ).mean(1)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
        assert float((masked - before).abs().max()) > 1e-3


def test_biases_are_left_alone_where_a_layer_may_not_shift_and_where_its_weights_are_not_given() -> None:
    network = trained("foreign")
    layout = WeightUnits.of(network)
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    reconstruction = Refit(network, layout, statistics)
    weights = reconstruction(torch.zeros(layout.n_weights, dtype=torch.bool))
    assert set(reconstruction.bias(weights)) == {"stem", "depthwise", "down", "line", "first", "second", "head"}
    assert set(reconstruction.bias({"head.weight": weights["head.weight"]})) == {"head"}
    full = reconstruction(torch.ones(layout.n_weights, dtype=torch.bool))
    for at, bias in reconstruction.bias(full).items():
        assert torch.equal(bias, network.get_parameter(f"{at}.bias"))


@pytest.mark.parametrize("name", ["residual", "foreign", "OddGeometry"])
def test_costs_of_layers_are_those_of_their_groups(name: str) -> None:
    network = network_of(name)
    reconstruction, statistics = prepared(network, exact_width=10_000)
    for tensor, kept in parts_of(reconstruction.layout, magnitude_mask(network, reconstruction.layout, 0.4)).items():
        dense, found = network.get_parameter(tensor).detach(), reconstruction.costs(tensor, kept)
        assert found.shape == dense.shape
        if tensor not in statistics:
            assert torch.equal(found, dense.square())
            continue
        h = damped(statistics[tensor].curvature).double()
        grouped = dense.double().reshape(len(h), len(dense) // len(h), -1)
        mask = kept.reshape(grouped.shape)
        fitted = refit(grouped, mask, h)
        expected = torch.stack([refitted_costs(*part) for part in zip(mask, grouped, fitted, h, strict=True)])
        torch.testing.assert_close(
            found.double(), expected.reshape(found.shape), rtol=0.02, atol=1e-4 * float(expected.max())
        )


def test_layers_are_solved_once_and_forgotten_when_memory_runs_out() -> None:
    network = trained("residual")
    reconstruction, _ = prepared(network)
    layout = reconstruction.layout
    masks = [torch.from_numpy(magnitude_mask(network, layout, density)) for density in (0.2, 0.4, 0.6, 0.8)]
    first = [reconstruction(mask) for mask in masks]
    assert (reconstruction.n_solved, reconstruction.n_reused) == (4 * layout.n_groups, 0)
    again = [reconstruction(mask) for mask in masks]
    assert (reconstruction.n_solved, reconstruction.n_reused) == (4 * layout.n_groups, 4 * layout.n_groups)
    assert all(a[name] is b[name] for a, b in zip(first, again, strict=True) for name in layout.names)
    # A layer of its own changes, and is the only one that is solved.
    other = masks[0].clone()
    other[:5] ^= True
    reconstruction(other)
    assert reconstruction.n_solved == 4 * layout.n_groups + 1

    none, _ = prepared(network, cache_mb=0)
    for mask, expected in zip(masks * 2, first * 2, strict=True):
        found = none(mask)
        assert all(torch.equal(found[name], expected[name]) for name in layout.names)
        assert len(none._known) == 1
    assert none.n_reused == 0
    assert none._held == sum(v.nbytes + len(k[1]) for k, v in none._known.items())


def test_what_was_used_last_is_forgotten_last() -> None:
    network = trained("residual")
    name = "linear.weight"
    shape = network.get_parameter(name).shape
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(4)]
    size = shape.numel() * 5
    reconstruction, _ = prepared(network, cache_mb=3 * size / 2**20)
    for i in (0, 1, 2, 0, 3):
        reconstruction.layer(name, masks[i])
    assert reconstruction._held == 3 * size
    for i, solved in ((0, 4), (2, 4), (3, 4), (1, 5)):
        reconstruction.layer(name, masks[i])
        assert reconstruction.n_solved == solved


def test_layers_that_are_not_needed_are_skipped() -> None:
    reconstruction, _ = prepared(trained("residual"))
    layout = reconstruction.layout
    found = reconstruction(torch.ones(layout.n_weights, dtype=torch.bool), frozenset(layout.names[:3]))
    assert tuple(found) == layout.names[3:]


def test_the_network_is_left_as_it_is() -> None:
    network, before = trained("foreign"), trained("foreign")
    reconstruction, _ = prepared(network)
    found = reconstruction(torch.from_numpy(some_masks(network).unpack(5)))
    reconstruction.bias(found)
    assert states_equal(network, before)


def test_statistics_of_another_network_are_refused() -> None:
    network = trained("residual")
    layout = WeightUnits.of(network)
    wide = LayerStatistics(torch.eye(10)[None], torch.zeros(1, 10), torch.ones(6), 100, True)
    with pytest.raises(ValueError, match=r"the statistics of 'conv1.weight' are for 6 x 10 weights, found 54; compute"):
        Refit(network, layout, {"conv1.weight": wide})
    # Those of layers that are not pruned are of no use, and no harm.
    assert Refit(network, layout, {"other.weight": wide}).layout is layout


@pytest.mark.parametrize("name", ["residual", "foreign"])
def test_a_re_fitted_network_answers_more_like_the_dense_one_than_a_masked_one(name: str) -> None:
    network = network_of(name)
    reconstruction, _ = prepared(network)
    layout, images = reconstruction.layout, digits()[0][1000:1300]
    mask = torch.from_numpy(magnitude_mask(network, layout, 0.5))

    def plain(repair: str, with_: Refit | None) -> LayerwiseNetwork:
        return LayerwiseNetwork(
            network, layout, images[:2], repair=repair, calibration_images=calibration(), refit=with_
        )

    errors = {}
    with torch.inference_mode():
        dense = network(images)
        for repair, with_ in (("none", None), ("batchnorm", None), ("reconstruct", reconstruction)):
            pruned = plain(repair, with_)
            pruned.prepare(mask)
            errors[repair] = float((pruned.answer(images) - dense).square().mean())
    assert errors["reconstruct"] < 0.7 * errors["batchnorm"]
    assert errors["reconstruct"] < 0.7 * errors["none"]


def test_gains_in_wide_rows_are_bounded_from_above_and_costs_stay_exact() -> None:
    network = network_of("residual")
    reconstruction, statistics = prepared(network)
    name = reconstruction.layout.names[1]
    kept = parts_of(reconstruction.layout, magnitude_mask(network, reconstruction.layout, 0.4))[name]
    h = damped(statistics[name].curvature)[0].double()
    weight = network.get_parameter(name).detach().double().flatten(1)
    mask = kept.flatten(1)
    assert int(mask.sum(dim=1).max()) > 4
    fitted = refit(weight[None], mask[None], h[None])[0]
    exact = refitted_costs(mask, weight, fitted, h)
    bound = refitted_costs(mask, weight, fitted, h, torch.linalg.inv(h), exact_width=4)
    torch.testing.assert_close(bound[mask], exact[mask])
    assert bool((bound[~mask] >= exact[~mask] * (1 - 1e-9)).all())
    assert bool((bound[~mask] > exact[~mask] * 1.01).any())
