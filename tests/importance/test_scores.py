"""Importance scores against finite differences, autograd and quadratic loops, and their errors."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paretoprune.importance.curvature import curvature_scores
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.importance.registry import SCORE_NEEDS
from paretoprune.importance.scores import SCORES, Score, compute_importance, flat_scores
from paretoprune.masks.units import WeightUnits
from small_networks import Foreign, digits, n_hooks, states_equal, trained
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional


def some_images(n: int = 12) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[1000 : 1000 + n], labels[1000 : 1000 + n]


def small_network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(108, 4),
            nn.Tanh(),
            nn.Linear(4, 10),
        ).eval()


def scores_of(
    name: str, network: nn.Module, images: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
) -> dict[str, Tensor]:
    found, answers = some_images()
    return compute_importance(
        name,
        network,
        WeightUnits.of(network),
        found if images is None else images,
        answers if labels is None else labels,
        seed,
    )


def test_magnitude_is_the_absolute_weight() -> None:
    network = trained("foreign")
    scores = scores_of("magnitude", network)
    for name, score in scores.items():
        assert torch.equal(score, network.get_parameter(name).detach().abs())


def test_taylor_agrees_with_finite_differences_of_the_loss() -> None:
    network = small_network().double()
    images, labels = some_images()
    images = images.double()
    scores = scores_of("taylor", network, images)
    step = 1e-5
    rng = np.random.default_rng(0)
    for name, score in scores.items():
        weight = network.get_parameter(name).detach().view(-1)
        for i in rng.choice(len(weight), size=min(20, len(weight)), replace=False).tolist():
            original = weight[i].item()
            losses = []
            for shifted in (original + step, original - step):
                weight[i] = shifted
                with torch.no_grad():
                    losses.append(functional.cross_entropy(network(images), labels).item())
            weight[i] = original
            slope = (losses[0] - losses[1]) / (2 * step)
            # Central differences in float64 are good to about 1e-9; the score itself is float32.
            assert score.view(-1)[i].item() == pytest.approx(abs(original * slope), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("make", [small_network, Foreign])
def test_fisher_agrees_with_gradients_taken_image_by_image(make: type[nn.Module]) -> None:
    network = make().eval()
    images, labels = some_images()
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(network, values, (image[None],)), label[None])

    gradients = [grad(loss)(parameters, image, label) for image, label in zip(images, labels, strict=True)]
    fisher, taylor = scores_of("fisher", network), scores_of("taylor", network)
    for name in fisher:
        each = torch.stack([g[name] for g in gradients])
        # float32 throughout, summed in another order.
        torch.testing.assert_close(fisher[name], parameters[name] ** 2 * (each**2).mean(0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(taylor[name], (parameters[name] * each.mean(0)).abs(), rtol=1e-3, atol=1e-7)


def test_gradients_are_those_of_the_network_in_evaluation_mode() -> None:
    network = trained("residual")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            scores_of("fisher", network).values(),
            scores_of("fisher", copy.deepcopy(network).train()).values(),
            strict=True,
        )
    )


def quadratic_lamp(weights: list[float]) -> list[float]:
    """Equation 3 by two loops; of equal weights the earlier counts as the larger."""
    scores = []
    for i, own in enumerate(weights):
        at_least = [w * w for j, w in enumerate(weights) if abs(w) > abs(own) or (abs(w) == abs(own) and j <= i)]
        scores.append(own * own / sum(at_least) if own else 0.0)
    return scores


def test_lamp_agrees_with_a_quadratic_loop() -> None:
    network = small_network()
    network[0].weight.data = torch.tensor([3.0, -1.0, 2.0, 1.0, -3.0, 0.0, 0.5, 1.0, 0.0] * 3).view(3, 1, 3, 3)
    for name, score in scores_of("lamp", network).items():
        expected = quadratic_lamp(network.get_parameter(name).detach().double().flatten().tolist())
        # float32 results of float64 sums.
        torch.testing.assert_close(score.flatten(), torch.tensor(expected), rtol=1e-6, atol=0)
        assert score.max() == 1


def test_lamp_by_hand() -> None:
    network = nn.Linear(4, 1, bias=False)
    network.weight.data = torch.tensor([[2.0, -1.0, 4.0, 2.0]])
    scores = scores_of("lamp", network)["weight"].flatten().tolist()
    # Squares in falling order: 16, 4 (first), 4 (second), 1.
    assert scores == pytest.approx([4 / 20, 1 / 25, 16 / 16, 4 / 24])


def test_lamp_of_a_layer_of_zeros_is_zero() -> None:
    network = nn.Linear(4, 2)
    network.weight.data.zero_()
    assert scores_of("lamp", network)["weight"].flatten().tolist() == [0.0] * 8


def test_lamp_does_not_change_when_a_layer_is_scaled() -> None:
    network = small_network()
    before = scores_of("lamp", network)
    network.get_parameter("4.weight").data *= 1e-3
    torch.testing.assert_close(scores_of("lamp", network)["4.weight"], before["4.weight"], rtol=1e-5, atol=0)


def test_random_scores_depend_on_the_seed_only() -> None:
    first = scores_of("random", trained("residual"), seed=1)
    torch.rand(1)
    other_weights = trained("residual")
    for parameter in other_weights.parameters():
        parameter.data += 1
    second = scores_of("random", other_weights, images=digits()[0][:3], labels=digits()[1][:3], seed=1)
    third = scores_of("random", trained("residual"), seed=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)
    tensors = list(first.values())
    assert not torch.equal(tensors[0].flatten()[:20], tensors[1].flatten()[:20])


@pytest.mark.parametrize("name", list(SCORES))
def test_every_score_covers_every_prunable_weight_and_changes_nothing(name: str) -> None:
    network = trained("foreign").train()
    before, layout, state = copy.deepcopy(network), WeightUnits.of(network), torch.get_rng_state()
    scores = scores_of(name, network)
    assert tuple(scores) == layout.names
    for tensor, shape in zip(scores.values(), layout.shapes, strict=True):
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert bool((tensor >= 0).all())
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_a_parameter_that_the_network_does_not_use_scores_zero(name: str) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 10), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1))

    scores = scores_of(name, Idle())
    assert scores["unused.weight"].abs().sum() == 0
    assert scores["used.weight"].abs().sum() > 0


def test_scores_of_frozen_weights_are_those_of_trainable_ones() -> None:
    network = small_network()
    expected = scores_of("taylor", network)
    found = scores_of("taylor", network.requires_grad_(False))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["magnitude", "taylor", "fisher"])
def test_scores_that_are_not_finite_name_the_tensor(name: str) -> None:
    network = small_network()
    network.get_parameter("4.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"importance '{name}' is not finite in '[04]\.weight'"):
        scores_of(name, network)


def test_an_infinite_weight_is_found_in_its_own_tensor() -> None:
    network = small_network()
    network.get_parameter("6.weight").data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"importance 'magnitude' is not finite in '6\.weight'; check the checkpoint"):
        scores_of("magnitude", network)


def test_an_unknown_score_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected an importance score among magnitude, taylor, .*, found 'hessian'"):
        scores_of("hessian", small_network())


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_gradients_without_images_are_an_error(name: str) -> None:
    images, labels = some_images(0)
    with pytest.raises(ValueError, match=r"gradients need images, found none; raise `importance\.images`"):
        scores_of(name, small_network(), images, labels)


class ByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.maximum(x.numpy(), 0))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("kind", [ByNumpy, Detached])
@pytest.mark.parametrize("name", ["fisher", "taylor"])
def test_a_network_without_derivatives_is_refused_with_the_remedy(kind: type[nn.Module], name: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), kind())
    with pytest.raises(ValueError, match=r"has no derivatives \(.*\); let its forward compute with torch alone"):
        compute_importance(name, network, WeightUnits.of(network), digits()[0][:3], digits()[1][:3], 0)


def test_scores_that_need_no_gradients_need_no_images() -> None:
    images, labels = some_images(0)
    assert len(scores_of("magnitude", small_network(), images, labels)) == 3


def test_flat_scores_lie_in_mask_order() -> None:
    network = trained("foreign")
    layout = WeightUnits.of(network)
    scores = scores_of("magnitude", network)
    flat = flat_scores(dict(reversed(scores.items())), layout)
    assert flat.dtype == np.float32
    assert flat.shape == (layout.n_weights,)
    for name, part in layout.split(flat).items():
        assert np.array_equal(part, scores[name].numpy())


@pytest.mark.parametrize("name", ["curvature", "elimination"])
def test_scores_by_curvature_are_those_of_the_layer_statistics(name: str) -> None:
    network = trained("foreign")
    layout, (images, labels) = WeightUnits.of(network), some_images(100)
    statistics = collect_statistics(network, layout, images, seed=3)
    given = compute_importance(name, network, layout, images[:0], labels[:0], 0, statistics)
    collected = compute_importance(name, network, layout, images, labels, 3)
    weights = {tensor: network.get_parameter(tensor) for tensor in layout.names}
    expected = curvature_scores(weights, statistics, exact=name == "elimination")
    assert tuple(given) == tuple(collected) == layout.names
    for tensor, score in expected.items():
        assert torch.equal(given[tensor], score)
        assert torch.equal(collected[tensor], score)


def test_a_weight_that_others_can_stand_in_for_matters_less_by_curvature_than_by_size() -> None:
    # The second input is the first one again, but for a little noise; the third stands alone.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator)
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    network = nn.Linear(3, 2)
    network.weight.data = torch.tensor([[1.0, 1.0, 0.5], [1.0, -1.0, 0.5]])
    statistics = collect_statistics(network, WeightUnits.of(network), x, seed=0)
    for name in ("curvature", "elimination"):
        scores = compute_importance(
            name, network, WeightUnits.of(network), x, torch.zeros(500, dtype=torch.long), 0, statistics
        )["weight"]
        assert scores[0, :2].min() < 0.1 * scores[0, 2]
        if name == "elimination":
            # Once its twin is gone, a weight is worth what both were.
            assert scores[0, :2].max() > 5 * scores[0, 2]


@pytest.mark.parametrize("name", ["curvature", "elimination"])
def test_scores_by_curvature_change_nothing(name: str) -> None:
    network = trained("foreign").train()
    before, layout, state = copy.deepcopy(network), WeightUnits.of(network), torch.get_rng_state()
    scores = scores_of(name, network)
    assert tuple(scores) == layout.names
    for tensor, shape in zip(scores.values(), layout.shapes, strict=True):
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == torch.float32
        assert bool((tensor >= 0).all())
    assert states_equal(network, before)
    assert network.training
    assert n_hooks(network) == 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["curvature", "elimination"])
def test_scores_by_curvature_need_images_and_name_what_is_not_finite(name: str) -> None:
    images, labels = some_images(0)
    with pytest.raises(ValueError, match="layer statistics need calibration images"):
        scores_of(name, small_network(), images, labels)
    network = small_network()
    statistics = collect_statistics(network, WeightUnits.of(network), some_images()[0], seed=0)
    network.get_parameter("4.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"importance '{name}' is not finite in '4\.weight'"):
        compute_importance(name, network, WeightUnits.of(network), images, labels, 0, statistics)


def test_the_registry_names_every_score_and_what_it_needs() -> None:
    assert {name: score.needs for name, score in SCORES.items()} == SCORE_NEEDS
    assert list(SCORES) == list(SCORE_NEEDS)
    assert frozenset().union(*SCORE_NEEDS.values()) == {"gradients", "statistics"}


@pytest.mark.parametrize("name", list(SCORES))
def test_a_score_looks_at_what_it_says_it_needs_and_at_nothing_else(name: str) -> None:
    network, (images, labels) = trained("residual"), some_images()
    layout = WeightUnits.of(network)
    statistics = collect_statistics(network, layout, images, seed=0)
    full = compute_importance(name, network, layout, images, labels, 0, statistics)
    without: dict[str, Callable[[], dict[str, Tensor]]] = {
        "gradients": lambda: compute_importance(name, network, layout, images[:0], labels[:0], 0, statistics),
        "statistics": lambda: compute_importance(name, network, layout, images, labels, 0, {}),
    }
    for need, compute in without.items():
        if need not in SCORES[name].needs:
            assert all(torch.equal(compute()[key], scores) for key, scores in full.items())
        elif need == "gradients":
            with pytest.raises(ValueError, match="gradients need images, found none"):
                compute()
        else:
            assert not any(torch.equal(compute()[key], scores) for key, scores in full.items())


def test_a_score_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (images, labels) = trained("residual"), some_images()
    halved = Score(lambda evidence: {name: weight.abs() / 2 for name, weight in evidence.weights.items()})
    monkeypatch.setitem(SCORES, "halved", halved)
    layout = WeightUnits.of(network)
    found, expected = (compute_importance(name, network, layout, images, labels, 0) for name in ("halved", "magnitude"))
    assert all(torch.equal(2 * found[name], scores) for name, scores in expected.items())
