"""Which slices go together: small networks with couplings known by hand, real ones, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.networks.architectures import CifarResNet
from paretoprune.shapes import Emptied
from paretoprune.structured.coupling import Coupling, cut, find_couplings
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models


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
    "heads": (Transformer, (5, 6), {"attention": 3, "up": 10}, {"up"}),
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
    for network, shape in ((models.shufflenet_v2_x0_5().eval(), (3, 64, 64)), (seeded(Remembers), (5, 6))):
        with pytest.raises(ValueError, match=r"channels of this network cannot be followed .*units='weights'"):
            find_couplings(network, image(*shape))


# Number of couplings, and of those that may vanish, as found; sums by hand would be no check.
REAL = {
    "resnet18": 8, "mobilenet_v3_small": 15, "squeezenet1_1": 0, "googlenet": 0, "regnet_y_400mf": 0,
    "timm/resnet10t": 0, "timm/mobilenetv3_small_050": 0, "timm/vit_tiny_patch16_224": 12, "timm/convnext_atto": 0,
    "timm/efficientnet_lite0": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_networks_run_with_half_of_everything(name: str) -> None:
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        network = timm.create_model(name.removeprefix("timm/"), num_classes=10).eval()
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        network = models.get_model(name, weights=None, num_classes=10, **options).eval()
    x = image(3, 224, 224) if "vit" in name else image(3, 64, 64)
    found = find_couplings(network, x)
    assert not found.refused
    assert sum(one.may_vanish for one in found.couplings) >= REAL[name]
    rng = np.random.default_rng(0)

    def some(one: Coupling) -> np.ndarray:
        return np.append(rng.random(one.n_units - 1) < 0.5, True)

    small = cut(network, found.couplings, {one.name: some(one) for one in found.couplings})
    with torch.no_grad():
        assert small(x).shape == (1, 10)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in network.parameters())
    assert share < 0.6
