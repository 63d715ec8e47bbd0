"""Costs of pruned networks, against counts by hand."""

import numpy as np
import pytest
import torch
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.costs import COSTS, Priced, count_uses, make_costs
from small_networks import digits, trained
from torch import Tensor, nn


class Tiny(nn.Module):
    """Every kind of layer once, one of them run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)  # 36 weights at 8 x 8 positions
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)  # 72 weights at 4 x 4 positions, 4 biases
        self.norm = nn.BatchNorm2d(4)  # 8 parameters, 8 statistics
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)  # 32 weights from 4 x 4 positions
        self.twice = nn.Linear(8, 8, bias=False)  # 64 weights, 2 x 8 rows, twice
        self.head = nn.Linear(128, 10)  # 1280 weights, 10 biases

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.grouped(self.conv(x))))
        return self.head(self.twice(self.twice(x)).flatten(1))


def tiny() -> tuple[Tiny, Tensor]:
    return Tiny().eval(), torch.zeros(1, 1, 8, 8)


USES = {"conv.weight": 64, "grouped.weight": 16, "up.weight": 16, "twice.weight": 32, "head.weight": 1}
SIZES = {"conv.weight": 36, "grouped.weight": 72, "up.weight": 32, "twice.weight": 64, "head.weight": 1280}


def masks_of(units: WeightUnits) -> tuple[PackedMasks, np.ndarray]:
    """Everything, nothing and something, and how much of each tensor they keep."""
    masks = np.random.default_rng(0).random((3, units.n_units)) < 0.4
    masks[0], masks[1] = True, False
    kept = np.array([[part.sum() for part in units.split(mask).values()] for mask in masks])
    return PackedMasks.pack(masks), kept


def test_uses_of_each_weight_are_those_counted_by_hand() -> None:
    network, image = tiny()
    assert count_uses(network, image) == USES
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("exclude", [[], ["head.weight", "conv.weight"]])
def test_costs_are_those_counted_by_hand(exclude: list[str]) -> None:
    network, image = tiny()
    units = WeightUnits.of(network, exclude)
    masks, kept = masks_of(units)
    prunable, other = sum(SIZES[name] for name in units.names), sum(SIZES[name] for name in exclude) + 4 + 8 + 10
    uses = np.array([USES[name] for name in units.names])
    fixed_macs = sum(SIZES[name] * USES[name] for name in exclude)
    of = {cost.name: cost.of(masks) for cost in make_costs(list(COSTS), Priced(network, units, image))}
    np.testing.assert_array_equal(of["density"], kept.sum(axis=1) / prunable)
    np.testing.assert_allclose(of["parameters"], (kept.sum(axis=1) + other) / (prunable + other), rtol=1e-14)
    total = fixed_macs + sum(SIZES[name] * USES[name] for name in units.names)
    np.testing.assert_allclose(of["macs"], (kept @ uses + fixed_macs) / total, rtol=1e-14)
    fixed = 4 * (other + 8) + prunable / 8
    np.testing.assert_allclose(of["bytes"], (fixed + 4 * kept.sum(axis=1)) / (fixed + 4 * prunable), rtol=1e-14)
    for costs in of.values():
        assert costs[0] == 1
        assert 0 <= costs[1] < costs[2] < 1


def test_a_weight_that_two_layers_share_counts_in_both() -> None:
    network, (images, _) = trained("foreign"), digits()
    uses = count_uses(network, images[:1])
    assert set(uses) == set(WeightUnits.of(network).names)
    # 8 rows go through `first` and, with the same weight, through `second`.
    assert uses["first.weight"] == 16


def test_an_unknown_cost_is_refused() -> None:
    network, image = tiny()
    with pytest.raises(ValueError, match="among density, parameters, macs, bytes, found watts"):
        make_costs(["density", "watts"], Priced(network, WeightUnits.of(network), image))
