"""Networks of layers that are no convolutions: attention, recurrent and bilinear ones, from the layout to the front."""

from functools import lru_cache

import pytest
import torch
from paretoprune import pareto_prune
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.costs import count_uses
from small_networks import digits, fit
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence


class Attends(nn.Module):
    """The rows of an image as words, each of which looks at all others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).flatten(1))


class Crosses(nn.Module):
    """Attention with queries, keys and values of three widths, called by names."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        halves = x.reshape(len(x), 16, 4)
        return self.head(self.attention(query=x, key=halves, value=halves[..., :2])[0].flatten(1))


class Remembers(nn.Module):
    """A recurrent network in both directions, then a cell, then a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(24, 16)
        self.pairs = nn.Bilinear(16, 24, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.flatten(1, 2))
        last = states[:, -1]
        return self.pairs(self.cell(last), last)


NETWORKS = {"attention": Attends, "cross-attention": Crosses, "recurrent": Remembers}
PRUNABLE = {
    "attention": {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"},
    "cross-attention": {
        *(f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")),
        "head.weight",
    },
    "recurrent": {
        *(f"lstm.weight_{kind}_l0{way}" for kind in ("ih", "hh") for way in ("", "_reverse")),
        *(f"cell.weight_{kind}" for kind in ("ih", "hh")),
        "pairs.weight",
    },
}
# Multiplications with each weight for one image of 8 rows, by hand.
USES = {
    "attention": {
        "embed.weight": 8,
        "attention.in_proj_weight": 8,
        "attention.out_proj.weight": 8,
        "head.weight": 1,
    },
    "cross-attention": {
        "attention.q_proj_weight": 8,
        "attention.k_proj_weight": 16,
        "attention.v_proj_weight": 16,
        "attention.out_proj.weight": 8,
        "head.weight": 1,
    },
    "recurrent": dict.fromkeys(PRUNABLE["recurrent"], 8)
    | {"cell.weight_ih": 1, "cell.weight_hh": 1, "pairs.weight": 1},
}


@lru_cache
def trained(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[kind]()
    images, labels = digits()
    return fit(network, images[:1000], labels[:1000], epochs=4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_their_matrices_are_prunable_and_their_uses_are_those_counted_by_hand(kind: str) -> None:
    network = trained(kind)
    assert set(WeightUnits.of(network).names) == PRUNABLE[kind]
    assert count_uses(network, digits()[0][:1]) == USES[kind]


def test_a_packed_sequence_counts_its_steps() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows: Tensor = self.rnn(pack_sequence([x[0, 0], x[0, 0, :3]]))[1]
            return rows[0, :1]

    assert count_uses(Packed().eval(), digits()[0][:1]) == {"rnn.weight_ih_l0": 11, "rnn.weight_hh_l0": 11}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_front_is_as_sparse_as_it_says(kind: str) -> None:
    images, labels = digits()
    network = trained(kind)
    front = pareto_prune(
        network,
        images[:400],
        labels[:400],
        search_images=images[1000:1200],
        search_labels=labels[1000:1200],
        evaluations=80,
        device="cpu",
        workers=1,
        progress=False,
        objectives=("error", "density", "macs"),
    )
    assert len(front) > 2
    assert front.error.min() < 0.4
    units = WeightUnits.of(network)
    pruned: set[str] = set()
    for i in range(len(front)):
        weights = dict(front.network(i).named_parameters())
        n_zero = {name: int((weights[name] == 0).sum()) for name in units.names}
        assert front.sparsity[i] == pytest.approx(sum(n_zero.values()) / units.n_units, abs=1e-12)
        n_all = sum(parameter.numel() for parameter in network.parameters())
        assert front.sparsity_of_parameters[i] == pytest.approx(sum(n_zero.values()) / n_all, abs=1e-12)
        pruned.update(name for name, n in n_zero.items() if n)
    assert pruned == PRUNABLE[kind]
