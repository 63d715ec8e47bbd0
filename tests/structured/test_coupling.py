"""Which slices go together: small networks with couplings known by hand, real ones, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.networks.architectures import CifarResNet
from paretoprune.shapes import Emptied
from paretoprune.structured.coupling import find_couplings
from paretoprune.structured.parts import cut
from paretoprune.telling import Telling
from torch import Tensor, nn
from torch.nn import functional


class Sums(nn.Module):
    """A stem, a block beside it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(x + self.last(self.outer(functional.relu(self.norm(self.inner(x))))))
        return self.head(x.mean(dim=(2, 3)))


class Concatenates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.both = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], dim=1).relu()
        return self.head(self.both(x).relu().flatten(1))


class Mobile(nn.Module):
    """An inverted bottleneck with a gate (squeeze and excite)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x).relu()).relu()
        gate = self.excite(self.squeeze(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.project(x * gate).mean(dim=(2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.norm = nn.GroupNorm(2, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.grouped(self.first(x).relu())).relu().mean(dim=(2, 3)))


class Gated(nn.Module):
    """A gated MLP on a table."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * functional.silu(self.gate(x)))


class Heads(nn.Module):
    """Attention as it is written in most vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Heads()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(dim=1))


def seeded(kind: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = kind()
    for module in network.modules():
        # Statistics of their own, so that cutting the wrong ones would show.
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.running_mean, module.running_var = torch.linspace(-0.5, 0.5, n), torch.linspace(0.5, 2, n)
    return network.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.PReLU(5), nn.Flatten(),
        nn.Linear(5 * 16, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.ConvTranspose1d(4, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 12, 4),
    )  # fmt: skip


# Units by coupling, and those of them that may vanish.
BY_HAND: dict[str, tuple[Any, tuple[int, ...], dict[str, int], set[str]]] = {
    "a chain": (chain, (3, 8, 8), {"0": 4, "3": 5, "6": 6}, set()),
    "sums": (Sums, (3, 8, 8), {"stem": 6, "inner": 5}, {"inner"}),
    "concatenation": (Concatenates, (3, 8, 8), {"left": 4, "right": 5, "both": 6}, set()),
    "depthwise and gates": (Mobile, (3, 8, 8), {"expand": 8, "squeeze": 2, "project": 6}, {"squeeze"}),
    # Two channels of each of four groups; twelve outputs in four groups of the convolution and two of the norm.
    "groups": (Grouped, (3, 8, 8), {"first": 2, "grouped": 3}, set()),
    "gated MLP": (Gated, (5,), {"up": 7}, set()),
    "heads": (Transformer, (5, 6), {"attention": 3, "up": 10}, {"attention", "up"}),
    "signals": (signals, (2, 12), {"0": 4, "3": 5}, set()),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_units_are_those_known_by_hand(case: str) -> None:
    kind, shape, units, vanishing = BY_HAND[case]
    found = find_couplings(seeded(kind), image(*shape))
    streams = {"heads": {"attention.proj"}}.get(case, set())
    sizes = {one.name: one.n_units for one in found.couplings if one.name not in streams}
    assert sizes == units
    assert {one.name for one in found.couplings if one.may_vanish} == vanishing


def silenced(network: nn.Module, kept: dict[str, np.ndarray], readers: dict[str, tuple[str, int]]) -> nn.Module:
    """The whole network, with the columns of dropped units set to 0 by hand."""
    for name, (reader, width) in readers.items():
        weight = network.get_parameter(reader)
        with torch.no_grad():
            weight[:, torch.from_numpy(np.repeat(~kept[name], width))] = 0
    return network


@pytest.mark.parametrize(
    ("case", "readers"),
    [
        ("a chain", {"0": ("3.weight", 1), "3": ("6.weight", 16), "6": ("8.weight", 1)}),
        ("gated MLP", {"up": ("down.weight", 1)}),
        ("heads", {"attention": ("attention.proj.weight", 4), "up": ("down.weight", 1)}),
        ("depthwise and gates", {"squeeze": ("excite.weight", 1), "project": ("head.weight", 1)}),
    ],
)
def test_a_cut_network_answers_as_if_nothing_read_what_is_gone(case: str, readers: Any) -> None:
    kind, shape, units, _ = BY_HAND[case]
    network, rng = seeded(kind), np.random.default_rng(1)
    couplings = find_couplings(network, image(*shape)).couplings
    kept = {name: np.append(rng.random(units[name] - 1) < 0.5, True) for name in readers}
    small = cut(network, couplings, kept)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
    x = image(*shape).repeat(3, *[1] * len(shape)) * torch.tensor([1.0, 2, -1]).view(3, *[1] * len(shape))
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(seeded(kind), kept, readers)(x), rtol=1e-4, atol=1e-6)
    # The whole network is left as it was.
    for (name, now), then in zip(network.named_parameters(), seeded(kind).parameters(), strict=True):
        assert torch.equal(now, then), name


def test_layers_know_their_new_widths() -> None:
    network = seeded(Mobile)
    couplings = find_couplings(network, image(3, 8, 8)).couplings
    small: Any = cut(network, couplings, {"expand": np.arange(8) < 3, "squeeze": np.array([True, False])})
    assert (small.expand.out_channels, small.depthwise.groups, small.depthwise.in_channels) == (3, 3, 3)
    assert (small.depthwise.out_channels, small.squeeze.in_channels, small.squeeze.out_channels) == (3, 3, 1)
    assert (small.excite.in_channels, small.excite.out_channels, small.project.in_channels) == (1, 3, 3)
    grouped: Any = cut(
        seeded(Grouped), find_couplings(seeded(Grouped), image(3, 8, 8)).couplings, {"first": np.array([True, False])}
    )
    assert (grouped.first.out_channels, grouped.grouped.in_channels, grouped.grouped.groups) == (4, 4, 4)
    transformer: Any = cut(
        seeded(Transformer),
        find_couplings(seeded(Transformer), image(5, 6)).couplings,
        {"attention": np.array([True, False, True])},
    )
    assert (transformer.attention.num_heads, transformer.attention.qkv.out_features) == (2, 24)


def test_a_branch_that_vanishes_leaves_what_it_made_of_nothing() -> None:
    network = seeded(Sums)
    couplings = find_couplings(network, image(3, 8, 8)).couplings
    small: Any = cut(network, couplings, {"inner": np.zeros(5, dtype=bool)})
    assert isinstance(small.inner, Emptied)
    assert isinstance(small.outer, Emptied)
    assert not any(name.startswith(("inner", "norm")) for name in small.state_dict())
    silent = seeded(Sums)
    with torch.no_grad():
        silent.get_parameter("outer.weight").zero_()
        torch.testing.assert_close(small(image(3, 8, 8)), silent(image(3, 8, 8)))
    small.train()(image(3, 8, 8).repeat(4, 1, 1, 1)).sum().backward()


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 1)])
def test_what_is_left_of_a_layer_may_be_changed_in_place(layer: nn.Module) -> None:
    """As activations do it: neither do places share memory, nor is the bias itself changed."""
    left = Emptied(layer, torch.tensor([-1.0, 2.0, -3.0, 4.0]))
    for shape in ((1, 3, 1, 1), (2, 3, 4, 3)):
        with torch.no_grad():
            made = functional.relu(left(torch.ones(shape)), inplace=True)
        assert float(made.min()) == 0
        assert left.bias is not None
        assert left.bias.tolist() == [-1.0, 2.0, -3.0, 4.0]


def test_the_stream_of_a_cifar_resnet_stays_and_is_named() -> None:
    found = find_couplings(CifarResNet(20, 10, 3).eval(), image(3, 32, 32))
    assert [one.name for one in found.couplings] == [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert all(one.may_vanish for one in found.couplings)
    assert list(found.refused) == ["conv1"]


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.wide, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.second(self.first(x).relu())).relu())


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True)
        self.wide, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.lstm(self.first(x))[0][:, -1]).relu())


class Looks(nn.Module):
    """Uses the number of its channels, which the graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.second(x * x.shape[1]).relu())


@pytest.mark.parametrize(
    ("kind", "shape", "cuttable", "reasons"),
    [
        (Shares, (4,), {"wide"}, "used by several layers"),
        (Looks, (4,), {"second"}, "in ways that the graph does not show"),
    ],
)
def test_what_cannot_be_cut_is_named_and_the_rest_is_cut(
    kind: Any, shape: tuple[int, ...], cuttable: set[str], reasons: str
) -> None:
    found = find_couplings(seeded(kind), image(*shape))
    assert {one.name for one in found.couplings} == cuttable
    assert found.refused
    assert any(reasons in reason for reason in found.refused.values()), found.refused


def test_a_network_of_which_nothing_can_be_cut_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"expected channels that can be cut, found none .*units='weights'"):
        find_couplings(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), image(3, 2, 2))
    with pytest.raises(ValueError, match=r"cannot be followed \(.*no layer runs.*units='weights'"):
        find_couplings(nn.Sequential(nn.Flatten(), nn.ReLU()).eval(), image(3, 2, 2))


class Hides(nn.Module):
    """Two layers, and nothing by which a gradient could find the way back to them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).detach()


class Around(nn.Module):
    """A part that cannot be followed between parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hides, self.second = nn.Linear(5, 4), Hides(), nn.Linear(4, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.hides(self.first(x).relu())).relu())


@pytest.mark.parametrize(
    ("kind", "shape", "units", "named"),
    [
        (Around, (5,), {"second": 7}, {"hides.block.0", "first"}),
        # What an LSTM reads stays, what reads an LSTM can be cut.
        (Remembers, (5, 6), {"wide": 5}, {"first"}),
    ],
)
def test_parts_that_cannot_be_followed_are_named_and_the_others_are_cut(
    kind: Any, shape: tuple[int, ...], units: dict[str, int], named: set[str]
) -> None:
    network = seeded(kind)
    found = find_couplings(network, image(*shape))
    assert {one.name: one.n_units for one in found.couplings} == units
    assert named <= set(found.refused)
    kept = {one.name: np.arange(one.n_units) < 2 for one in found.couplings}
    small = cut(network, found.couplings, kept)
    with torch.no_grad():
        assert small(image(*shape)).shape == (1, 3)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())


def test_frozen_networks_are_followed_too() -> None:
    network = seeded(Sums).requires_grad_(requires_grad=False)
    assert {one.name for one in find_couplings(network, image(3, 8, 8)).couplings} == {"stem", "inner"}
    assert not any(parameter.requires_grad for parameter in network.parameters())


class PackedGate(nn.Module):
    """Both halves of a gated MLP come from one layer, with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 12), nn.LayerNorm(6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.head((x + self.fc2(self.norm(value * functional.silu(gate)))).mean(dim=1))


def test_both_halves_of_a_packed_gate_go_together() -> None:
    network = seeded(PackedGate)
    (found,) = find_couplings(network, image(4, 5)).couplings
    assert (found.name, found.n_units, found.is_normalised_together) == ("fc1", 6, True)
    kept = np.array([True, False, True, True, False, True])
    small: Any = cut(network, [found], {"fc1": kept})
    rows = torch.from_numpy(np.flatnonzero(np.tile(kept, 2)))
    assert torch.equal(small.fc1.weight, network.get_parameter("fc1.weight")[rows])
    assert (small.norm.normalized_shape, small.fc2.in_features) == ((4,), 4)


class Normalises(nn.Module):
    """A norm over all channels, of which one more layer reads than the graph of channels shows."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.head(self.second(x * (x.shape[1] if self.reads else 6.0)).relu())


def test_channels_under_a_common_norm_are_checked_too() -> None:
    """Against the whole network whose norm is given the channels alone that are left."""
    assert {one.name for one in find_couplings(seeded(lambda: Normalises(False)), image(4)).couplings} == {
        "first",
        "second",
    }
    found = find_couplings(seeded(lambda: Normalises(True)), image(4))
    assert {one.name for one in found.couplings} == {"second"}
    assert "in ways that the graph does not show" in found.refused["first"]


def test_what_hardly_matters_is_checked_as_closely() -> None:
    network = seeded(Looks)
    with torch.no_grad():
        network.get_parameter("second.weight").mul_(1e-7)
    assert {one.name for one in find_couplings(network, image(4)).couplings} == {"second"}


def test_a_long_search_for_units_tells_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    times = iter(range(0, 100_000, 11))
    with caplog.at_level("INFO", logger="paretoprune"):
        find_couplings(
            seeded(Mobile), image(3, 8, 8), Telling("finding what can be cut", clock=lambda: float(next(times)))
        )
    told = [record.getMessage() for record in caplog.records]
    assert "finding what can be cut: 3 groups are checked" in told
    assert any("may be left out" in line for line in told)
