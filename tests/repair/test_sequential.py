"""Refined networks: nearer to the dense one than stitched re-fits, their masks kept exactly, and never NaN."""

import copy
from collections.abc import Callable
from functools import lru_cache

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Small, conv, made
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.units import MaskLayout
from paretoprune.networks.tracing import NotTraceableError
from paretoprune.repair.refit import Refit
from paretoprune.repair.sequential import Refined, SequentialRefit
from small_networks import calibration, digits, magnitude_mask, n_hooks, some_masks, states_equal, trained
from torch import Tensor, nn
from torch.nn import functional

# What changes in place what a derivative needs has no statistics.
NAMES = ("residual", "foreign", *(name for name in ARCHITECTURES if name != "InPlace"))


class Biased(Small):
    """Convolutions with a bias and no batch norm at all, one of them on a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_norm = nn.Identity()  # type: ignore[assignment]

    def body(self) -> None:
        self.a, self.b = conv(8, 8, bias=True), conv(8, 8, bias=True)
        self.tokens = nn.Linear(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b(functional.relu(self.a(x))) + x)
        return self.tokens(x.transpose(1, 3)).transpose(1, 3)


class Bare(Small):
    """Neither biases nor batch norms."""

    def body(self) -> None:
        self.a, self.b = conv(8, 8), conv(8, 8)
        self.last = nn.Linear(8, 8, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b(functional.relu(self.a(x))) + x)
        return self.last(x.mean((2, 3)))[:, :, None, None]


class Flat(Small):
    """One pixel is left, so that a layer whose inputs are constant sees nothing else."""

    def body(self) -> None:
        self.a, self.a_norm = nn.Conv2d(8, 8, 8, bias=False), nn.BatchNorm2d(8)
        self.b, self.b_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.c = nn.Linear(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b_norm(self.b(functional.relu(self.a_norm(self.a(x))))))
        return self.c(x.flatten(1))[:, :, None, None]


OWN: dict[str, Callable[[], nn.Module]] = {kind.__name__: kind for kind in (Biased, Bare, Flat)}


def network_of(name: str) -> nn.Module:
    return trained(name) if name in ("residual", "foreign") else made((ARCHITECTURES | OWN)[name])


class Refiner:
    """A network with all that refining it needs."""

    def __init__(self, network: nn.Module, images: Tensor | None = None) -> None:
        self.network, self.layout = network, MaskLayout.of(network)
        self.images = calibration() if images is None else images
        self.statistics = collect_statistics(network, self.layout, self.images, seed=0)
        self.reconstruction = Refit(network, self.layout, self.statistics)
        self.refinement = SequentialRefit(network, self.reconstruction, self.images)

    def refined(self, mask: np.ndarray, *, reselect: bool = False) -> Refined:
        return self.refinement(torch.from_numpy(mask), reselect=reselect)

    def stitched(self, mask: np.ndarray) -> LayerwiseNetwork:
        plain = LayerwiseNetwork(
            self.network,
            self.layout,
            self.images[:2],
            repair="reconstruct",
            calibration_images=self.images,
            refit=self.reconstruction,
        )
        plain.prepare(torch.from_numpy(mask))
        return plain

    def off(self, network: Callable[[Tensor], Tensor], images: Tensor | None = None) -> float:
        """Mean squared error of the logits, relative to how much the dense ones differ between images."""
        images = self.images if images is None else images
        with torch.inference_mode():
            dense = self.network(images)
            return float((network(images) - dense).square().mean() / (dense - dense.mean(0)).square().mean())


@lru_cache
def refiner_of(name: str) -> Refiner:
    return Refiner(network_of(name))


def weights_of(layout: MaskLayout, network: nn.Module) -> dict[str, Tensor]:
    return {name: network.get_parameter(name).detach() for name in layout.names}


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_a_dense_mask_changes_nothing(name: str) -> None:
    refiner = refiner_of(name)
    for reselect in (False, True):
        found = refiner.refined(np.ones(refiner.layout.n_weights, dtype=bool), reselect=reselect)
        assert bool(found.kept.all())
        for tensor, weight in weights_of(refiner.layout, found.network).items():
            dense = refiner.network.get_parameter(tensor).detach()
            # The damped system is solved in float64 from moments summed in float32.
            torch.testing.assert_close(weight, dense, rtol=0, atol=1e-3 * float(dense.abs().max()))
        assert refiner.off(found.network) < 1e-6


# A layer that runs several times cannot be fitted to all its runs at once; then the stitched re-fit stays.
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_refined_networks_are_nearer_to_the_dense_one_than_stitched_ones(name: str) -> None:
    refiner = refiner_of(name)
    refined, stitched = [], []
    for density in (0.6, 0.3):
        mask = magnitude_mask(refiner.network, refiner.layout, density)
        refined.append(refiner.off(refiner.refined(mask).network))
        stitched.append(refiner.off(refiner.stitched(mask).answer))
    assert all(np.isfinite(refined))
    # Layer by layer is not all at once, so a single network may lose; on the whole none may.
    assert np.mean(np.log(refined)) <= np.mean(np.log(stitched)) + 0.05, (refined, stitched)


@pytest.mark.parametrize(
    ("name", "gain"), [("residual", 0.8), ("foreign", 0.8), ("Biased", 0.8), ("PreActivation", 0.9)]
)
def test_refinement_carries_over_to_images_it_has_not_seen(name: str, gain: float) -> None:
    refiner, images = Refiner(network_of(name), digits()[0][:1000]), digits()[0][1000:1500]
    ratios = []
    for density in (0.6, 0.4, 0.2):
        mask = magnitude_mask(refiner.network, refiner.layout, density)
        refined, stitched = refiner.refined(mask).network, refiner.stitched(mask).answer
        ratios.append(refiner.off(refined, images) / refiner.off(stitched, images))
    assert np.exp(np.mean(np.log(ratios))) < gain, ratios


@pytest.mark.parametrize(
    ("name", "reselect"),
    [(name, False) for name in (*NAMES, *OWN)]
    + [(name, True) for name in ("residual", "foreign", "OddGeometry", "UsedTwice", *OWN)],
)
def test_masks_are_kept_exactly_and_nothing_is_nan_even_where_layers_are_emptied(name: str, reselect: bool) -> None:
    refiner = refiner_of(name)
    masks, layout = some_masks(refiner.network), refiner.layout
    for i in (1, 6, 7):
        mask = masks.unpack(i)
        found = refiner.refined(mask, reselect=reselect)
        assert found.kept.dtype == torch.bool
        if not reselect:
            assert np.array_equal(found.kept.numpy(), mask)
        kept = layout.split(found.kept.numpy())
        for tensor, weight in weights_of(layout, found.network).items():
            assert kept[tensor].sum() == layout.split(mask)[tensor].sum()
            assert not bool(weight[~torch.from_numpy(kept[tensor])].any())
        assert all(bool(torch.isfinite(value).all()) for value in found.network.state_dict().values())
        with torch.no_grad():
            assert bool(torch.isfinite(found.network(digits()[0][:300])).all())


@pytest.mark.parametrize("name", ["residual", "foreign", "Biased"])
def test_weights_chosen_anew_beat_random_ones(name: str) -> None:
    refiner = refiner_of(name)
    rng = np.random.default_rng(0)
    mask = rng.random(refiner.layout.n_weights) < 0.4
    found = refiner.refined(mask, reselect=True)
    assert not np.array_equal(found.kept.numpy(), mask)
    assert refiner.off(found.network) < 0.5 * refiner.off(refiner.refined(mask).network)


def test_only_a_layer_that_loses_weights_is_chosen_anew() -> None:
    refiner = refiner_of("residual")
    layout = refiner.layout
    mask = np.ones(layout.n_weights, dtype=bool)
    start, stop = layout.offsets[3], layout.offsets[4]
    mask[start:stop] = np.random.default_rng(0).random(stop - start) < 0.5
    found = refiner.refined(mask, reselect=True).kept.numpy()
    assert np.array_equal(np.delete(found, np.arange(start, stop)), np.delete(mask, np.arange(start, stop)))
    assert not np.array_equal(found[start:stop], mask[start:stop])


def test_a_linear_layer_is_the_ridge_regression_of_the_dense_outputs_on_the_pruned_inputs() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).eval()
    refiner = Refiner(network)
    mask = np.ones(refiner.layout.n_weights, dtype=bool)
    mask[: 64 * 6] = np.random.default_rng(0).random(64 * 6) < 0.3
    mask[64 * 6 :: 7] = False
    found = refiner.refined(mask).network
    with torch.no_grad():
        x, y = found[:3](refiner.images).double(), network(refiner.images).double()  # type: ignore[index]
        weight, trained_weight = found.get_parameter("3.weight").double(), network.get_parameter("3.weight").double()
        kept = torch.from_numpy(refiner.layout.split(mask)["3.weight"])
        centred, ridge = x - x.mean(0), 0.01 * x.var(0, correction=0).mean()
        for row in range(10):
            at = kept[row]
            a = torch.cat([centred / len(x) ** 0.5, ridge.sqrt() * torch.eye(6)])[:, at]
            b = torch.cat([(y - y.mean(0))[:, row] / len(x) ** 0.5, ridge.sqrt() * trained_weight[row]])
            expected = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
            torch.testing.assert_close(weight[row, at], expected, rtol=0, atol=1e-4)
        # The bias takes the rest: mean answers are the dense ones.
        torch.testing.assert_close(found(refiner.images).mean(0).double(), y.mean(0), rtol=0, atol=1e-4)


class Shortcut(Bare):
    """A sum without a batch norm; everything that the stem has lost can be added again."""

    def middle(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + x


class NormedShortcut(Small):
    """The same with a batch norm, which must be corrected for what is added besides."""

    def body(self) -> None:
        self.a, self.a_norm = conv(8, 8), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return self.a_norm(self.a(x)) + x


@pytest.mark.parametrize("kind", [Shortcut, NormedShortcut])
def test_a_shortcut_s_error_is_made_up_for_by_what_is_added_to_it(kind: Callable[[], nn.Module]) -> None:
    refiner = Refiner(made(kind))
    layout = refiner.layout
    mask = np.ones(layout.n_weights, dtype=bool)
    mask[: layout.sizes[0]] = np.random.default_rng(0).random(layout.sizes[0]) < 0.3

    def sums(network: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = network.get_submodule("pool").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            network(refiner.images)
        handle.remove()
        return seen[0]

    dense = sums(refiner.network)
    refined, stitched = (
        float((sums(network) - dense).square().mean())
        for network in (refiner.refined(mask).network, refiner.stitched(mask).network)
    )
    assert refined < 0.25 * stitched


def test_a_weight_that_two_layers_share_stays_shared_and_stitched() -> None:
    refiner = refiner_of("foreign")
    mask = magnitude_mask(refiner.network, refiner.layout, 0.4)
    found = refiner.refined(mask).network
    assert found.get_parameter("first.weight") is found.get_submodule("second").weight
    with torch.inference_mode():
        expected = refiner.reconstruction(torch.from_numpy(mask))
    for name in ("first.weight", "up.weight"):
        assert torch.equal(found.get_parameter(name), expected[name])
    assert not torch.equal(found.get_parameter("down.weight"), expected["down.weight"])


@pytest.mark.parametrize("name", ["UsedTwice", "NormUsedTwice"])
def test_a_layer_that_runs_several_times_keeps_its_stitched_weights(name: str) -> None:
    refiner = refiner_of(name)
    mask = magnitude_mask(refiner.network, refiner.layout, 0.4)
    for reselect in (False, True):
        found = refiner.refined(mask, reselect=reselect)
        with torch.inference_mode():
            expected = refiner.reconstruction(torch.from_numpy(mask))
        assert torch.equal(found.network.get_parameter("a.weight"), expected["a.weight"])
        assert not torch.equal(found.network.get_parameter("stem.weight"), expected["stem.weight"])


def test_a_batch_norm_that_runs_several_times_is_corrected_at_its_first_run() -> None:
    refiner = refiner_of("NormUsedTwice")
    layout = refiner.layout
    mask, a = np.ones(layout.n_weights, dtype=bool), layout.names.index("a.weight")
    mask[layout.offsets[a] : layout.offsets[a] + layout.sizes[a] // 2] = False
    found = refiner.refined(mask).network
    seen: list[Tensor] = []
    for network in (refiner.network, found):
        handle = network.get_submodule("a_norm").register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
        with torch.no_grad():
            network(refiner.images)
        handle.remove()
    dense, pruned = (x.double().transpose(0, 1).flatten(1) for x in (seen[0], seen[3]))
    ratio = pruned.var(1, correction=0) / dense.var(1, correction=0)
    trained_mean, trained_variance = (
        refiner.network.get_buffer(f"a_norm.running_{m}").double() for m in ("mean", "var")
    )
    expected = pruned.mean(1) + (trained_mean - dense.mean(1)) * ratio.sqrt()
    torch.testing.assert_close(found.get_buffer("a_norm.running_mean").double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        found.get_buffer("a_norm.running_var").double(), trained_variance * ratio, rtol=1e-3, atol=0
    )


def test_layers_that_are_not_pruned_or_have_no_statistics_keep_their_weights() -> None:
    network = trained("residual")
    layout = MaskLayout.of(network, ["conv1.weight", "layer2.*"])
    statistics = collect_statistics(network, layout, calibration(), seed=0)
    del statistics["linear.weight"]
    kept = torch.from_numpy(magnitude_mask(network, layout, 0.4))
    refit = Refit(network, layout, statistics)
    found = SequentialRefit(network, refit, calibration())(kept).network
    for name in ("conv1.weight", "layer2.0.conv1.weight", "linear.bias"):
        assert torch.equal(found.get_parameter(name), network.get_parameter(name))
    assert torch.equal(found.get_parameter("linear.weight"), refit(kept)["linear.weight"])


def test_nothing_that_is_given_is_changed_and_nothing_is_left_for_the_next_mask() -> None:
    network, images = trained("foreign"), calibration().clone()
    refiner = Refiner(network, images)
    masks = [magnitude_mask(network, refiner.layout, density) for density in (0.3, 0.6)]
    first = refiner.refined(masks[0])
    kept = copy.deepcopy(first.network)
    refiner.refined(masks[1], reselect=True)
    assert states_equal(first.network, kept)
    assert states_equal(refiner.refined(masks[0]).network, kept)
    assert states_equal(network, trained("foreign"))
    assert torch.equal(images, calibration())
    assert n_hooks(first.network) == n_hooks(network) == 0
    assert not first.network.training


def test_a_refined_network_can_be_trained_further() -> None:
    refiner = refiner_of("residual")
    mask = magnitude_mask(refiner.network, refiner.layout, 0.4)
    for inference in (False, True):
        # Evaluators build in inference mode.
        with torch.inference_mode(inference):
            network = refiner.refined(mask).network
        network.train()
        functional.cross_entropy(network(digits()[0][:64]), digits()[1][:64]).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    network = made(architectures.Branching)
    layout = MaskLayout.of(network)
    refit = Refit(network, layout, collect_statistics(network, layout, calibration(), seed=0))
    with pytest.raises(NotTraceableError, match="control flow"):
        SequentialRefit(network, refit, calibration())
