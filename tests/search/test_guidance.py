"""Guidance by curvature: the order of a candidate's bits against solving each change anew, and moves that follow it."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from paretoprune.importance.curvature import damped
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.masks.genomes import Genome
from paretoprune.masks.packed import pack_rows, unpack_row
from paretoprune.masks.units import WeightUnits
from paretoprune.repair.refit import Refit, RefitCosts
from paretoprune.search.adaptive import AdaptiveVariation
from paretoprune.search.corridor import Corridor
from paretoprune.search.guidance import CandidateGuide
from paretoprune.search.moves import Moves
from small_networks import calibration, magnitude_mask, trained
from torch import nn


class Guided:
    """A network, its guide, and a random corridor that leaves some layers out."""

    def __init__(self, network: nn.Module, *, everything: bool = False) -> None:
        self.network, self.layout = network, WeightUnits.of(network)
        self.statistics = collect_statistics(network, self.layout, calibration(), seed=0)
        self.reconstruction = Refit(network, self.layout, self.statistics)
        rng = np.random.default_rng(0)
        searched = rng.random(self.layout.n_weights) < 0.5
        searched[self.layout.offsets[1] : self.layout.offsets[2]] = False
        self.corridor = Corridor.between(searched, np.zeros_like(searched), self.layout)
        if everything:
            self.corridor = Corridor.everything(self.layout)
        self.groups = self.corridor.groups
        names = {int(start): name for start, name in zip(self.layout.offsets[:-1], self.layout.names, strict=True)}
        self.names = [names[group.start] for group in self.groups]
        self.guide = CandidateGuide(RefitCosts(self.reconstruction), self.layout, self.groups)

    def bits(self, k: int, order: np.ndarray) -> np.ndarray:
        """Positions in the whole mask."""
        return order + self.groups[k].word_slice.start * 64

    def error(self, name: str, mask: np.ndarray) -> float:
        """The error of a layer after re-fitting, weighted by the sensitivity of its outputs, in float64."""
        dense = self.network.get_parameter(name).detach().double()
        layer = self.statistics[name]
        h = damped(layer.curvature).double()
        w = dense.reshape(len(h), len(dense) // len(h), -1)
        kept = torch.from_numpy(self.layout.split(mask)[name].copy()).reshape(w.shape)
        weigh = layer.sensitivity.double().reshape(w.shape[:2])
        total = 0.0
        for group, row in np.ndindex(*w.shape[:2]):
            at = kept[group, row].nonzero()[:, 0]
            v = torch.zeros_like(w[group, row])
            v[at] = torch.linalg.solve(h[group][at][:, at], (h[group] @ w[group, row])[at])
            off = w[group, row] - v
            total += float(weigh[group, row] * (off @ h[group] @ off))
        return total


@lru_cache
def guided(kind: str, *, everything: bool = False) -> Guided:
    return Guided(trained(kind), everything=everything)


@pytest.mark.parametrize("kind", ["residual", "foreign"])
def test_the_order_is_that_of_solving_every_change_anew(kind: str) -> None:
    space = guided(kind)
    mask = magnitude_mask(space.network, space.layout, 0.4)
    words = pack_rows(mask[None])[0]
    chosen = [k for k, name in enumerate(space.names) if name in space.statistics][:3]
    orders = space.guide(words, chosen)
    assert list(orders) == chosen
    for k in chosen:
        name, bits = space.names[k], space.bits(k, orders[k])
        assert (
            sorted(bits.tolist())
            == np.flatnonzero(
                unpack_row(space.corridor.searched, space.layout.n_weights)
                & (space.layout.group_of == space.layout.names.index(name))
            ).tolist()
        )
        some = bits[:: max(1, len(bits) // 12)]
        before, changes = space.error(name, mask), []
        for bit in some:
            other = mask.copy()
            other[bit] ^= True
            changes.append(abs(space.error(name, other) - before))
        # Least first; in float32, costs are accurate to about a thousandth.
        assert np.all(np.diff(changes) > -2e-3 * np.array(changes[1:]) - 1e-9), name


def test_layers_without_statistics_go_by_magnitude() -> None:
    space = guided("foreign")
    k = space.names.index("up.weight")
    order = space.guide(pack_rows(np.ones((1, space.layout.n_weights), dtype=bool))[0], [k])[k]
    sizes = space.layout.flatten({n: space.network.get_parameter(n).detach().abs().numpy() for n in space.layout.names})
    assert np.all(np.diff(sizes[space.bits(k, order)]) >= 0)


def test_only_the_layer_s_own_bits_decide_and_are_remembered() -> None:
    space = Guided(trained("residual"))
    mask = magnitude_mask(space.network, space.layout, 0.4)
    first = space.guide(pack_rows(mask[None])[0], [0, 2])
    solved = space.reconstruction.n_solved + space.reconstruction.n_reused
    other = mask.copy()
    other[space.groups[2].start :] ^= True
    again = space.guide(pack_rows(other[None])[0], [0, 2])
    assert again[0] is first[0]
    assert not np.array_equal(again[2], first[2])
    assert space.reconstruction.n_solved + space.reconstruction.n_reused == solved + 1


def test_only_so_many_layers_are_remembered() -> None:
    space, asked = guided("residual"), list[str]()

    def costs(name: str, kept: np.ndarray) -> np.ndarray:
        asked.append(name)
        return np.arange(len(kept), dtype=np.float32)

    guide = CandidateGuide(costs, space.layout, space.groups, cache_size=2)
    words = pack_rows(magnitude_mask(space.network, space.layout, 0.4)[None])[0]
    orders = guide(words, [0, 1, 2])
    assert guide(words, [1, 2])[2] is orders[2]
    assert asked == space.names[:3]
    assert np.array_equal(guide(words, [0])[0], orders[0])
    assert asked == [*space.names[:3], space.names[0]]


@pytest.mark.parametrize("softness", [0.0, 0.05])
def test_moves_along_the_guide_harm_less_than_moves_against_it(softness: float) -> None:
    space = guided("residual", everything=True)
    mask = magnitude_mask(space.network, space.layout, 0.4)
    words, k = pack_rows(mask[None])[0], 2
    name = space.names[k]
    order = space.guide(words, [k])
    before = space.error(name, mask)

    def after(orders: dict[int, np.ndarray], move: str) -> float:
        changed = words.copy()
        rng, moves = np.random.default_rng(0), Moves(space.groups, orders, softness)
        if move == "swap":
            assert moves.swap(changed, [k], [k], 20, rng) == 20
        else:
            assert (moves.drop if move == "drop" else moves.grow)(changed, [k], 20, rng) == 20
        return space.error(name, unpack_row(changed, space.layout.n_weights))

    against = {k: order[k][::-1]}
    # Costs are those of single changes and do not add up for twenty at once, but the two directions differ clearly.
    assert before < after(order, "drop") < 0.5 * after(against, "drop") + 0.5 * before
    assert after(order, "grow") < after(against, "grow") < before
    assert after(order, "swap") < after(against, "swap")


def test_the_variation_asks_the_guide_for_the_genome_s_own_order_of_the_layers_it_touches() -> None:
    space = guided("residual")
    asked: list[tuple[bytes, list[int]]] = []

    def watching(words: np.ndarray, chosen: Sequence[int]) -> dict[int, np.ndarray]:
        asked.append((words.tobytes(), list(chosen)))
        return space.guide(words, chosen)

    variation = AdaptiveVariation(space.groups, [watching])
    rng = np.random.default_rng(1)
    masks = rng.random((30, space.layout.n_weights)) < 0.5
    genomes = [Genome(row) for row in pack_rows(masks)]
    children = variation.vary(genomes, rng)
    assert len(asked) == 30
    n = space.layout.n_weights
    searched = unpack_row(space.corridor.searched, n)
    bounds = {k: space.layout.names.index(name) for k, name in enumerate(space.names)}
    for genome, child, (words, chosen) in zip(genomes, children, asked, strict=True):
        assert words == genome.words.tobytes()
        changed = unpack_row(genome.words ^ child.words, n)
        assert changed.any()
        assert not np.any(changed & ~searched)
        assert set(space.layout.group_of[changed]) <= {bounds[k] for k in chosen}
