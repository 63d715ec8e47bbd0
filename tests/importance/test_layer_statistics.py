"""Layer statistics: unfolded inputs against torch's own layers, moments against float64, how much outputs matter."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, made
from hypothesis import given
from hypothesis import strategies as st
from paretoprune.importance.layer_statistics import (
    LayerStatistics,
    Moments,
    collect_statistics,
    gram,
    im2col,
    load_statistics,
    output_matrix,
    prunable_modules,
    save_statistics,
    some_positions,
    weight_matrix,
)
from paretoprune.masks.units import WeightUnits
from small_networks import calibration, digits, n_hooks, states_equal, trained
from torch import Tensor, nn
from torch.nn import functional


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def collected(network: nn.Module, images: Tensor | None = None, **options: Any) -> dict[str, LayerStatistics]:
    settings: dict[str, Any] = {"seed": 0} | options
    return collect_statistics(network, WeightUnits.of(network), calibration() if images is None else images, **settings)


# What a layer sees

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 5, 3), (2, 3, 7, 6)),
    "padded": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 7, 6)),
    "strided": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 7, 8)),
    "strided one way": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(3, 1), padding=(0, 1)), (2, 3, 8, 6)),
    "dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=2), (2, 3, 7, 8)),
    "dilated one way, strided": (lambda: nn.Conv2d(3, 5, (2, 3), dilation=(3, 2), stride=2), (2, 3, 9, 9)),
    "same": (lambda: nn.Conv2d(3, 5, (3, 5), padding="same"), (2, 3, 7, 6)),
    "valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 7, 6)),
    "circular": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 7, 6)),
    "reflecting": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 6)),
    "replicating, same": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="replicate"), (2, 3, 7, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 6, 5)),
    "depthwise, doubling": (lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4, bias=False), (2, 4, 6, 7)),
    "one pixel": (lambda: nn.Conv2d(3, 5, 1, bias=False), (2, 3, 4, 4)),
    "line": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (3, 4, 9)),
    "volume": (lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 6, 5)),
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 2, 5, 6)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def layer_and_input(kind: str) -> tuple[Any, Tensor]:
    make, shape = LAYERS[kind]
    return seeded(make).double(), noise(*shape).double()


@each_layer
def test_columns_times_weights_are_the_layer_s_own_outputs(kind: str) -> None:
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        y = layer(x)
        bias = torch.zeros(y.shape[-1] if isinstance(layer, nn.Linear) else y.shape[1]).double()
        bias = bias if layer.bias is None else layer.bias
        seen, weight = im2col(layer, x), weight_matrix(layer, layer.weight)
        found = seen @ weight.mT + bias.view(len(weight), 1, -1)
    assert seen.shape[2] == weight[0, 0].numel() == layer.weight[0].numel()
    torch.testing.assert_close(found, output_matrix(layer, y), rtol=0, atol=1e-12)


@each_layer
def test_some_positions_are_those_of_all_columns_and_rows(kind: str) -> None:
    layer, x = layer_and_input(kind)
    y = layer(x)
    at = some_positions(layer, y, 4, torch.Generator().manual_seed(1))
    if isinstance(layer, nn.Linear):
        assert at is None
        return
    assert at is not None
    assert at.tolist() == sorted(set(at.tolist()))
    assert len(at) == 4
    n_all = y[0, 0].numel()
    assert 0 <= int(at.min()) <= int(at.max()) < n_all
    for whole, part in (
        (im2col(layer, x), im2col(layer, x, at)),
        (output_matrix(layer, y), output_matrix(layer, y, at)),
    ):
        expected = whole.view(layer.groups, len(x), n_all, -1)[:, :, at].flatten(1, 2)
        assert torch.equal(part, expected)


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": 2}, {"dilation": 2, "padding": 1}])
def test_columns_are_those_of_torch_s_unfold(options: dict[str, int]) -> None:
    layer, x = nn.Conv2d(3, 5, 3, **options), noise(2, 3, 8, 7)  # type: ignore[arg-type]
    expected = functional.unfold(x, 3, **options).transpose(1, 2).flatten(0, 1)
    assert torch.equal(im2col(layer, x)[0], expected)


def test_where_few_positions_are_all_nothing_is_drawn() -> None:
    layer, generator = nn.Conv2d(1, 1, 3), torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert some_positions(layer, torch.zeros(2, 1, 3, 3), 9, generator) is None
    assert some_positions(layer, torch.zeros(2, 1, 3, 3), None, generator) is None
    assert torch.equal(generator.get_state(), state)


# Moments


@given(n=st.lists(st.integers(1, 40), min_size=1, max_size=4), groups=st.integers(1, 3), seed=st.integers(0, 1000))
def test_moments_added_up_by_batches_are_those_of_everything_at_once(n: Sequence[int], groups: int, seed: int) -> None:
    x, y = 2 + noise(groups, sum(n), 5, seed=seed), noise(groups, sum(n), 3, seed=seed + 1) - 1
    moments = Moments()
    for part, targets in zip(x.split(list(n), 1), y.split(list(n), 1), strict=True):
        moments.add(part, targets)
    x, y = x.double(), y.double()
    apart, off = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    expected = {
        "mean": (moments.mean, x.mean(1)),
        "target mean": (moments.target_mean, y.mean(1)),
        "second": (moments.second(about_mean=False), x.mT @ x / x.shape[1]),
        "covariance": (moments.second(about_mean=True), apart.mT @ apart / x.shape[1]),
        "cross": (moments.cross(about_mean=False), y.mT @ x / x.shape[1]),
        "cross covariance": (moments.cross(about_mean=True), off.mT @ apart / x.shape[1]),
    }
    for name, (found, wanted) in expected.items():
        assert found.dtype == torch.float64
        # Products of size ten, each sum of up to forty rounded to float32.
        assert float((found - wanted).abs().max()) <= 2e-5, name
    assert moments.n == sum(n)


def test_many_batches_lose_no_digits() -> None:
    moments = Moments()
    batches = [3 + noise(1, 64, 4, seed=i) for i in range(2000)]
    for batch in batches:
        moments.add(batch)
    x = torch.cat(batches, 1)[0].double()
    # Float32 sums of 64 are good to 1e-6; were the 2000 batches added in float32 too, it would be a hundred times that.
    torch.testing.assert_close(moments.second(about_mean=True)[0], x.T.cov(correction=0), rtol=0, atol=5e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, 1000.0])
def test_small_variations_about_a_large_mean_are_resolved(level: float) -> None:
    x = torch.stack([level + 0.01 * noise(1, 640, seed=1), torch.full((1, 640), level + 0.1)], 2)
    moments = Moments()
    for batch in x.split(64, 1):
        moments.add(batch)
    covariance = moments.second(about_mean=True)[0]
    expected = x[0].double().T.cov(correction=0)
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-12)
    # A column that never changes has exactly no variance.
    assert covariance[1].tolist() == [0, 0]


# Statistics of a network


def naive_moments(network: nn.Module, name: str, images: Tensor, *, free: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and curvature of a tensor's columns over all images at once, all positions, in float64."""
    network = copy.deepcopy(network).eval().double()
    layout = WeightUnits.of(network)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(im2col(module, inputs[0])))
        for _, module in prunable_modules(network, layout)[name]
    ]
    with torch.no_grad():
        network(images.double())
    for handle in handles:
        handle.remove()
    x = torch.cat(seen, 1)
    apart = x - x.mean(1, keepdim=True)
    return x.mean(1), apart.mT @ apart / x.shape[1], (apart if free else x).mT @ (apart if free else x) / x.shape[1]


@pytest.mark.parametrize("name", ["residual", "foreign", "OddGeometry", "SqueezeExcite", "UsedTwice"])
def test_statistics_are_those_of_one_float64_pass(name: str) -> None:
    network = trained(name) if name in ("residual", "foreign") else made(ARCHITECTURES[name])
    images = digits()[0][:150]
    found = collected(network, images, positions=None)
    for tensor, layer in found.items():
        mean, covariance, curvature = naive_moments(network, tensor, images, free=layer.shifts_freely)
        scale = float(covariance.diagonal(dim1=1, dim2=2).max() + mean.square().max())
        torch.testing.assert_close(layer.mean.double(), mean, rtol=0, atol=3e-5 * scale**0.5)
        torch.testing.assert_close(layer.covariance.double(), covariance, rtol=0, atol=3e-5 * scale)
        torch.testing.assert_close(layer.curvature.double(), curvature, rtol=0, atol=3e-5 * scale)
        assert layer.covariance.dtype == layer.mean.dtype == layer.sensitivity.dtype == torch.float32


def test_few_positions_estimate_what_all_say_and_are_fixed_by_the_seed() -> None:
    network = trained("residual")
    whole, some, again, other = (
        collected(network, positions=positions, seed=seed) for positions, seed in ((None, 0), (16, 0), (16, 0), (16, 1))
    )
    for name, layer in whole.items():
        if layer.n_samples == 64 * 200:
            assert some[name].n_samples == 16 * 200
            assert not torch.equal(some[name].covariance, other[name].covariance)
        assert torch.equal(some[name].covariance, again[name].covariance)
        assert torch.equal(some[name].sensitivity, again[name].sensitivity)
        error = torch.linalg.matrix_norm(some[name].covariance - layer.covariance)
        # A sixth of the positions at worst, of 200 images.
        assert bool((error < 0.35 * torch.linalg.matrix_norm(layer.covariance)).all())


def test_outputs_may_shift_where_a_batch_norm_or_a_bias_takes_it_up() -> None:
    found = collected(trained("foreign"))
    assert {name: layer.shifts_freely for name, layer in found.items()} == dict.fromkeys(found, True)
    free = {name: layer.shifts_freely for name, layer in collected(trained("residual")).items()}
    assert all(free.values())
    # Its only batch norms come before the convolutions, and after the last sum.
    before = {name: layer.shifts_freely for name, layer in collected(made(architectures.PreActivation)).items()}
    assert before == {"stem.weight": True, "a.weight": True, "b.weight": False, "head.weight": True}
    summed = {name: layer.shifts_freely for name, layer in collected(made(architectures.SumOfInput)).items()}
    assert summed == {"stem.weight": True, "a.weight": True, "b.weight": False, "head.weight": True}


def test_a_layer_that_once_runs_without_a_batch_norm_may_not_shift() -> None:
    # Its third run is not normalised.
    assert not collected(made(architectures.UsedTwice))["a.weight"].shifts_freely
    assert collected(made(architectures.NormUsedTwice))["a.weight"].shifts_freely


def test_a_relu_in_place_before_the_batch_norm_keeps_a_layer_from_shifting() -> None:
    for inplace in (False, True):
        relu = nn.ReLU(inplace=inplace)
        layers = [nn.Conv2d(1, 4, 3, bias=False), relu, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)]
        assert not collected(nn.Sequential(*layers).eval())["0.weight"].shifts_freely


def test_a_shared_weight_has_the_moments_of_all_its_layers() -> None:
    network = trained("foreign")
    layer = collected(network, positions=None)["first.weight"]
    assert layer.n_samples == 2 * 8 * 200
    mean, covariance, _ = naive_moments(network, "first.weight", calibration(), free=True)
    torch.testing.assert_close(layer.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.covariance.double(), covariance, rtol=1e-4, atol=1e-4)


def test_transposed_convolutions_and_idle_layers_have_no_statistics() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.idle = trained("foreign"), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    layout = WeightUnits.of(Idle())
    assert {"inner.up.weight", "idle.weight"} <= set(layout.names)
    assert set(layout.names) - set(collected(Idle())) == {"inner.up.weight", "idle.weight"}
    assert "inner.up.weight" not in prunable_modules(Idle(), layout)


def test_layers_that_are_excluded_have_no_statistics() -> None:
    network = trained("residual")
    layout = WeightUnits.of(network, ["conv1.weight", "layer2.*"])
    assert set(collect_statistics(network, layout, calibration(), seed=0)) == set(layout.names)


def test_a_layer_that_the_images_do_not_reach_has_no_sensitivity() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 10), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            # What comes from a constant needs no gradient with respect to the images.
            return self.head(x.flatten(1)) + self.embed(torch.ones(len(x), 4))

    found = collected(seeded(Constant))
    assert not found["embed.weight"].sensitivity.any()
    assert bool(found["head.weight"].sensitivity.all())


# How much outputs matter


def test_sensitivity_of_a_linear_network_is_known_exactly() -> None:
    # One of n classes: a random sign vector without its mean has E[c cᵀ] = I - 1/n.
    network = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False)))
    head = network.get_parameter("1.weight").detach().double()
    about = torch.eye(3) - 1 / 3
    draws = [collected(network, noise(200, 6, seed=seed), seed=seed) for seed in range(20)]
    for name, expected in (("0.weight", torch.diagonal(head.T @ about.double() @ head)), ("1.weight", about.diag())):
        found = torch.stack([draw[name].sensitivity for draw in draws]).mean(0)
        # 4000 draws of squares whose deviation is about their mean.
        torch.testing.assert_close(found, expected.float(), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["residual", "foreign", "Downsampled", "SqueezeExcite"])
def test_sensitivity_is_the_expected_square_of_the_jacobian(name: str) -> None:
    network = trained(name) if name in ("residual", "foreign") else made(ARCHITECTURES[name])
    images = digits()[0][:40]
    layout = WeightUnits.of(network)
    draws = [collected(network, images, seed=seed) for seed in range(12)]
    plain = copy.deepcopy(network)
    made_by: dict[str, list[Tensor]] = {}

    def shift(tensor: str, output: Tensor) -> Tensor:
        made_by.setdefault(tensor, []).append(torch.zeros_like(output, requires_grad=True))
        return output + made_by[tensor][-1]

    for tensor, held in prunable_modules(plain, layout).items():
        for _, module in held:
            module.register_forward_hook(lambda module, inputs, output, tensor=tensor: shift(tensor, output))
    logits = plain(images)
    shifts = [(tensor, output) for tensor, outputs in made_by.items() for output in outputs]
    jacobian = [
        torch.autograd.grad(logits[:, k].sum(), [s for _, s in shifts], retain_graph=True, allow_unused=True)
        for k in range(10)
    ]
    expected: dict[str, Tensor] = {}
    for i, (tensor, output) in enumerate(shifts):
        each = torch.stack([torch.zeros_like(output) if row[i] is None else row[i] for row in jacobian]).double()
        square = (each - each.mean(0)).square().sum(0)
        linear = isinstance(prunable_modules(plain, layout)[tensor][0][1], nn.Linear)
        along = square.flatten(0, -2).sum(0) if linear else square.flatten(2).sum((0, 2))
        expected[tensor] = expected.get(tensor, 0) + along / len(images)
    for tensor, wanted in expected.items():
        found = torch.stack([draw[tensor].sensitivity for draw in draws]).mean(0).double()
        # 480 draws; what each says of a row deviates by about as much as it is.
        assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=0.2), tensor
        torch.testing.assert_close(found, wanted, rtol=0.5, atol=0.1 * float(wanted.mean()))


def test_a_relu_in_place_does_not_hide_which_outputs_it_cuts_off() -> None:
    def network(inplace: bool) -> nn.Module:
        relu = nn.ReLU(inplace=inplace)
        return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), relu, nn.Flatten(), nn.Linear(144, 10)))

    apart, in_place = (collected(network(inplace), digits()[0][:50]) for inplace in (False, True))
    for name, layer in apart.items():
        assert torch.equal(in_place[name].covariance, layer.covariance)
        torch.testing.assert_close(in_place[name].sensitivity, layer.sensitivity, rtol=1e-6, atol=0)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


# Bad input, and what stays as it was


def test_without_images_there_are_no_statistics() -> None:
    with pytest.raises(ValueError, match="layer statistics need calibration images, found none; raise `calibration`"):
        collected(trained("residual"), calibration()[:0])


class ByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.maximum(x.numpy(), 0))


class IntoItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return torch.mul(x, 2.0, out=x)


@pytest.mark.parametrize(
    "kind",
    [
        architectures.InPlace,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Detached()),
        lambda: nn.Sequential(ByNumpy(), nn.Flatten(), nn.Linear(64, 10)),
        lambda: nn.Sequential(IntoItself(), nn.Flatten(), nn.Linear(64, 10)),
    ],
)
def test_a_network_without_derivatives_is_refused_with_the_reason(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"has no derivatives \(.*\); let its forward compute with torch alone"):
        collected(made(kind))


@pytest.mark.parametrize("where", ["image", "weight"])
def test_inputs_that_are_not_finite_name_the_first_layer_they_reach(where: str) -> None:
    network, images = trained("residual"), calibration().clone()
    if where == "image":
        images[3, 0, 4, 4] = torch.nan
    else:
        network.get_parameter("conv1.weight").data[0, 0, 1, 1] = torch.inf
    # An infinite weight makes infinite outputs; what its own layer is given is finite, its derivatives are not.
    with pytest.raises(ValueError, match=r"the statistics of '[a-z0-9.]+' are not finite: .* check the checkpoint"):
        collected(network, images)


def test_too_few_samples_are_warned_about_by_name(caplog: pytest.LogCaptureFixture) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)))
    with caplog.at_level(logging.WARNING, "paretoprune"):
        collected(network, calibration()[:100])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'2.weight' has 144 inputs, but the calibration images give only 100 samples of them" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "paretoprune"):
        collected(network, calibration()[:145])
    assert caplog.messages == []


def test_dead_inputs_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    images = digits()[0].clone()
    images[:, :, :, 0] = 0.7
    with caplog.at_level(logging.INFO, "paretoprune"):
        layer = collected(network, images)["1.weight"]
    # A column of pixels, and what is blank in all digits anyway: with a bias, constant is dead.
    expected = int((images.flatten(1).std(0) == 0).sum())
    assert layer.n_dead == expected >= 8
    assert f"{expected} of 64 inputs of '1.weight' are dead" in caplog.text
    # Without one, constant inputs count as long as they are not 0.
    raw = replace(layer, shifts_freely=False)
    assert raw.n_dead == 0


@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_the_network_and_its_images_are_left_as_they_are(kind: str) -> None:
    network = trained(kind).train()
    before, images, state = copy.deepcopy(network), calibration().clone(), torch.get_rng_state()
    numbers = np.random.get_state(legacy=False)  # noqa: NPY002
    collected(network, images)
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(images, calibration())
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_equal(np.random.get_state(legacy=False), numbers)  # noqa: NPY002


def test_more_images_than_sensitivity_looks_at_still_count_for_the_moments() -> None:
    network, images = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), digits()[0][:600]
    layer = collected(network, images)["1.weight"]
    assert layer.n_samples == 600
    torch.testing.assert_close(layer.mean[0], images.flatten(1).mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.sensitivity, torch.full((10,), 0.9), rtol=0.3, atol=0)


@pytest.mark.parametrize("n_columns", [1, 192, 193, 384, 450])
@pytest.mark.parametrize("groups", [1, 2])
def test_half_of_the_products_of_columns_mirrors_the_other(groups: int, n_columns: int) -> None:
    x = torch.randn(groups, 70, n_columns, generator=torch.Generator().manual_seed(0))
    found = gram(x)
    torch.testing.assert_close(found, x.mT @ x, rtol=1e-5, atol=1e-4)
    if n_columns > 192:
        assert torch.equal(found, found.mT)


def test_statistics_read_back_as_they_were_written(tmp_path: Path) -> None:
    found = collected(made(architectures.PreActivation))
    save_statistics(tmp_path / "statistics.safetensors", found)
    again = load_statistics(tmp_path / "statistics.safetensors")
    assert set(again) == set(found)
    for name, layer in found.items():
        for part in fields(layer):
            value, read = getattr(layer, part.name), getattr(again[name], part.name)
            assert type(read) is type(value)
            assert torch.equal(value, read) if isinstance(value, Tensor) else value == read
