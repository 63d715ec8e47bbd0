"""Heads as units: what belongs to them, the plain modules that can have fewer, and networks in which they are cut."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut_networks import difference, silenced
from paretoprune import Front
from paretoprune.attention import PlainAttention, WithoutHeads, as_plain, layers_of, layouts_of, with_plain_attention
from paretoprune.deployment.export import export_onnx, export_pt2
from paretoprune.masks.packed import PackedMasks
from paretoprune.networks.costs import count_uses
from paretoprune.shapes import with_state
from paretoprune.structured.refit import SlimRefit
from paretoprune.structured.units import SLIM_COSTS, ChannelUnits, slim_costs
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def seeded(make: Any, *given: Any, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make(*given, **options)
        for parameter in network.parameters():
            # Biases that start at 0 would hide whose they are.
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Vision(nn.Module):
    """Tokens, attention of torch beside a shortcut, a gated MLP, and a head."""

    def __init__(self, *, batch_first: bool = True, bias: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.batch_first, self.need_weights = batch_first, need_weights
        self.embed = nn.Conv2d(1, 16, 4, stride=4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias)
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=self.need_weights)[0]
        x = x + (y if self.batch_first else y.transpose(0, 1))
        y = self.norm(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x.mean(dim=1))


IMAGES = noise(6, 1, 16, 16)
VARIANTS: list[dict[str, bool]] = [{}, {"batch_first": False}, {"bias": False}, {"need_weights": True}]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_the_plain_form_answers_what_torch_answers(batch_first: bool, bias: bool, across: bool) -> None:
    whole = seeded(nn.MultiheadAttention, 12, 3, bias=bias, batch_first=batch_first)
    plain: Any = as_plain(whole)
    assert list(plain.state_dict()) == list(whole.state_dict())
    x, other = noise(2, 5, 12), noise(2, 5, 12).flip(1)
    length, n = (5, 2) if batch_first else (2, 5)
    padding = torch.zeros(n, length, dtype=torch.bool)
    padding[0, -1] = True
    hides = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    adds = noise(length, length)
    given = (x, other, other) if across else (x, x, x)
    for options in (
        {}, {"need_weights": False}, {"attn_mask": hides}, {"attn_mask": adds, "need_weights": False},
        {"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": hides, "need_weights": False},
        {"average_attn_weights": False}, {"attn_mask": noise(3 * n, length, length)},
    ):  # fmt: skip
        found, expected = plain(*given, **options), whole(*given, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        if options.get("need_weights", True):
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
        else:
            assert found[1] is expected[1] is None


def test_what_the_plain_form_cannot_do_is_refused() -> None:
    plain: Any = as_plain(seeded(nn.MultiheadAttention, 12, 3, batch_first=True))
    x = noise(2, 5, 12)
    with pytest.raises(ValueError, match=r"expected one mask for all heads"):
        plain(x, x, x, attn_mask=torch.zeros(4, 5, 5))
    with pytest.raises(AssertionError, match="three dimensions"):
        plain(x[0], x[0], x[0])
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5}):
        other = nn.MultiheadAttention(12, 3, **options)
        assert as_plain(other) is None
        assert layers_of(other) is None


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_windows_answer_what_those_of_torchvision_answer(kind: Any, shift: int, bias: bool) -> None:
    whole = seeded(kind, 12, [4, 4], [shift, shift], 3, qkv_bias=bias)
    plain: Any = as_plain(whole)
    # Whole windows, windows that have to be padded, and images that are smaller than one.
    for size in ((8, 8), (7, 9), (3, 4)):
        x = noise(2, *size, 12)
        torch.testing.assert_close(plain(x), whole(x), rtol=1e-4, atol=1e-5)


def test_plain_grids_answer_what_those_of_torchvision_answer() -> None:
    whole = seeded(RelativePositionalMultiHeadAttention, 12, 4, 9)
    plain: Any = as_plain(whole)
    x = noise(2, 3, 9, 12)
    torch.testing.assert_close(plain(x), whole(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
def test_heads_of_torch_are_cut_and_the_rest_answers_as_before(options: dict[str, bool]) -> None:
    network = seeded(Vision, **options)
    units = ChannelUnits.of(network, IMAGES[:1])
    assert dict(zip(units.names, units.sizes.tolist(), strict=True)) == {"embed": 16, "attention": 4, "gate": 24}
    assert {one.name for one in units.couplings if one.may_vanish} == {"attention", "gate"}
    kept = {
        "embed": np.ones(16, dtype=bool),
        "attention": np.array([1, 0, 0, 1], dtype=bool),
        "gate": np.arange(24) < 9,
    }
    bits = np.concatenate([kept[name] for name in units.names])
    small: Any = units.slim(network, bits)
    assert isinstance(small.attention, PlainAttention)
    assert (small.attention.num_heads, small.attention.in_proj_weight.shape) == (2, (24, 16))
    expected = silenced(copy.deepcopy(network), units.couplings, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), expected(IMAGES), rtol=1e-4, atol=1e-5)
    # By hand: the columns of the second and third head.
    by_hand = copy.deepcopy(network)
    with torch.no_grad():
        by_hand.attention.out_proj.weight[:, 4:12] = 0
        by_hand.down.weight[:, 9:] = 0
        assert difference(small(IMAGES), by_hand(IMAGES)) < 1e-4
    assert type(network.attention) is nn.MultiheadAttention


def test_a_network_of_all_heads_keeps_the_module_of_torch() -> None:
    network = seeded(Vision)
    units = ChannelUnits.of(network, IMAGES[:1])
    small: Any = units.slim(network, np.ones(units.n_units, dtype=bool))
    assert type(small.attention) is nn.MultiheadAttention
    with torch.no_grad():
        assert torch.equal(small(IMAGES), network(IMAGES))


def masks(units: ChannelUnits) -> list[np.ndarray]:
    """All, some, and no head at all."""
    rows = [np.ones(units.n_units, dtype=bool) for _ in range(3)]
    start = int(units.offsets[units.names.index("attention")])
    rows[1][start + 1] = False
    rows[1][units.offsets[0]] = False
    rows[2][start : start + 4] = False
    return rows


@pytest.mark.parametrize("options", VARIANTS)
def test_costs_with_heads_are_those_of_the_networks_that_are_built(options: dict[str, bool]) -> None:
    network = seeded(Vision, **options)
    units = ChannelUnits.of(network, IMAGES[:1])
    rows = masks(units)
    costs = slim_costs(list(SLIM_COSTS), units, network, IMAGES[:1])
    found = {cost.name: cost.of(PackedMasks.pack_each(rows, units.n_units)) for cost in costs}
    for i, row in enumerate(rows):
        small = units.slim(network, row)

        def ratio(measure: Any, small: nn.Module = small) -> float:
            return measure(small) / measure(network)

        def macs(module: nn.Module) -> float:
            sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
            return sum(n * sizes[name] for name, n in count_uses(module, IMAGES[:1]).items())

        numbers = ratio(lambda module: sum(parameter.numel() for parameter in module.parameters()))
        assert found["parameters"][i] == pytest.approx(numbers)
        assert found["bytes"][i] == pytest.approx(numbers)
        assert found["macs"][i] == pytest.approx(ratio(macs))
    # Of 16 tokens: attention makes 48 numbers of 16; then 36 of 15; and without it the MLP makes 24 of 16.
    assert found["memory"].tolist() == pytest.approx([1.0, (15 + 36) / 64, (16 + 24) / 64])


def test_states_of_networks_with_fewer_heads_are_read_back(tmp_path: Path) -> None:
    network = seeded(Vision)
    units = ChannelUnits.of(network, IMAGES[:1])
    rows = masks(units)
    states = [dict(units.slim(network, row).state_dict()) for row in rows]
    assert "attention.in_proj_weight" not in states[2]
    front = Front(
        PackedMasks.pack_each(rows, units.n_units),
        np.array([[0.1, 1.0], [0.2, 0.5], [0.3, 0.3]]), ["phase1"] * 3, ("error", "macs"), network, states, "channels",
    )  # fmt: skip
    front.save(tmp_path / "front.npz")
    again = Front.load(tmp_path / "front.npz", seeded(Vision))
    for i, row in enumerate(rows):
        small = units.slim(network, row)
        with torch.no_grad():
            assert torch.equal(again.network(i)(IMAGES), small(IMAGES))
            assert torch.equal(with_state(copy.deepcopy(network), small.state_dict())(IMAGES), small(IMAGES))
    vanished: Any = again.network(2)
    assert isinstance(vanished.attention, WithoutHeads)
    # It can be trained.
    vanished.train()(IMAGES).sum().backward()
    assert vanished.get_parameter("attention.out_proj.bias").grad is not None


def test_networks_with_fewer_heads_are_exported(tmp_path: Path) -> None:
    network = seeded(Vision)
    units = ChannelUnits.of(network, IMAGES[:1])
    for row in masks(units)[1:]:
        small = units.slim(network, row)
        assert export_onnx(small, IMAGES, tmp_path / "small.onnx").dynamic_batch
        export_pt2(small, IMAGES, tmp_path / "small.pt2")


def test_the_layer_that_reads_the_heads_is_fitted_again() -> None:
    """Of two heads that say the same, one is not missed."""
    network = seeded(Vision)
    with torch.no_grad():
        weight, bias = network.attention.in_proj_weight, network.attention.in_proj_bias
        for start in (0, 16, 32):
            weight[start + 4 : start + 8], bias[start + 4 : start + 8] = (
                weight[start : start + 4],
                bias[start : start + 4],
            )
    units = ChannelUnits.of(network, IMAGES[:1])
    bits = np.ones(units.n_units, dtype=bool)
    bits[units.offsets[units.names.index("attention")] + 1] = False
    images = noise(128, 1, 16, 16)
    found = SlimRefit(network, units, images, damping=1e-6)(bits)
    with torch.no_grad():
        assert difference(units.slim(network, bits)(images), network(images)) > 0.05
        assert difference(found(images), network(images)) < 1e-2


class Masked(nn.Module):
    """Attention with a mask that is made of its inputs: of keys, or of scores and one for each head."""

    def __init__(self, n_masks: int = 1) -> None:
        super().__init__()
        self.embed, self.n_masks = nn.Linear(6, 8), n_masks
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.n_masks > 1:
            adds = (x @ x.transpose(1, 2)).repeat_interleave(self.n_masks, dim=0)
            x = x + self.attention(x, x, x, attn_mask=adds, need_weights=False)[0]
        else:
            x = x + self.attention(x, x, x, key_padding_mask=x[..., 0] > 1, need_weights=False)[0]
        return self.head(functional.relu(self.up(x)).mean(dim=1))


def test_attention_with_a_mask_is_followed_and_re_fitted() -> None:
    network, x = seeded(Masked), noise(96, 5, 6)
    units = ChannelUnits.of(network, x[:1])
    bits = np.ones(units.n_units, dtype=bool)
    bits[units.offsets[units.names.index("attention")]] = False
    bits[units.offsets[units.names.index("up")] :][:6] = False
    small, found = units.slim(network, bits), SlimRefit(network, units, x)(bits)
    with torch.no_grad():
        assert difference(found(x), network(x)) < 0.7 * difference(small(x), network(x))


def test_heads_with_masks_of_their_own_stay_and_the_rest_is_re_fitted() -> None:
    network, x = seeded(Masked, 2), noise(96, 5, 6)
    units = ChannelUnits.of(network, x[:1])
    assert "attention" not in units.names
    bits = np.ones(units.n_units, dtype=bool)
    bits[units.offsets[units.names.index("up")] :][:6] = False
    small, found = units.slim(network, bits), SlimRefit(network, units, x)(bits)
    with torch.no_grad():
        assert difference(found(x), network(x)) < 0.7 * difference(small(x), network(x))


class Encoder(nn.Module):
    """torch's own encoder layer, which uses the tensors of its attention past the module where it may."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(dim=1))


def test_heads_of_an_encoder_layer_are_cut() -> None:
    network, x = seeded(Encoder), noise(4, 5, 6)
    units = ChannelUnits.of(network, x[:1])
    assert {"layer.self_attn", "layer.linear1"} <= set(units.names)
    kept = {one.name: np.arange(one.n_units) < (1 if one.name == "layer.self_attn" else 8) for one in units.couplings}
    bits = np.concatenate([kept[name] for name in units.names])
    expected = silenced(copy.deepcopy(network), units.couplings, kept)
    with torch.no_grad():
        torch.testing.assert_close(units.slim(network, bits)(x), expected(x), rtol=1e-4, atol=1e-5)


class Projects(nn.Module):
    """Attention with layers of its own for queries, keys and values, of which two heads share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 3
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o_proj = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (n, self.head_dim)).transpose(1, 2)
            for layer, n in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_key_value_heads),
                (self.v_proj, self.num_key_value_heads),
            )
        )
        k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Language(nn.Module):
    """Grouped queries, RMS norms and a gated MLP, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.first_norm, self.self_attn = nn.RMSNorm(8), Projects()
        self.norm, self.gate_proj, self.up_proj = nn.RMSNorm(8), nn.Linear(8, 10), nn.Linear(8, 10)
        self.down_proj, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.self_attn(self.first_norm(x))
        y = self.norm(x)
        return self.head((x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))).mean(dim=1))


def test_heads_that_share_keys_and_values_go_together() -> None:
    network, x = seeded(Language), noise(4, 5, 6)
    units = ChannelUnits.of(network, x[:1])
    sizes = dict(zip(units.names, units.sizes.tolist(), strict=True))
    assert sizes == {"embed": 8, "self_attn": 2, "gate_proj": 10}
    kept = {"embed": np.ones(8, dtype=bool), "self_attn": np.array([False, True]), "gate_proj": np.arange(10) < 4}
    small: Any = units.slim(network, np.concatenate([kept[name] for name in units.names]))
    assert (small.self_attn.num_heads, small.self_attn.num_key_value_heads) == (2, 1)
    expected = silenced(copy.deepcopy(network), units.couplings, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-5)
    # The channels that all norms see together, too.
    half = np.ones(units.n_units, dtype=bool)
    half[units.offsets[units.names.index("embed")] : units.offsets[units.names.index("embed")] + 4] = False
    with torch.no_grad():
        assert units.slim(network, half)(x).shape == (4, 3)


def test_heads_may_lie_side_by_side_with_their_queries_keys_and_values() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 3
            self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 12)).transpose(1, 2).chunk(3, dim=-1)
            return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    network = seeded(nn.Sequential, nn.Linear(6, 6), Interleaved(), nn.Flatten(), nn.Linear(30, 3))
    orders = [{one.tensor: one.head_of for one in slices} for _, slices in layouts_of(network[1])]
    assert [order["qkv.weight"][:13].tolist() for order in orders] == [
        [0] * 4 + [1] * 4 + [2] * 4 + [0],
        [0] * 12 + [1],
    ]
    x = noise(4, 5, 6)
    units = ChannelUnits.of(network, x[:1])
    assert "1" in units.names
    kept = {one.name: np.arange(one.n_units) != 1 for one in units.couplings}
    small = units.slim(network, np.concatenate([kept[name] for name in units.names]))
    with torch.no_grad():
        expected = silenced(copy.deepcopy(network), units.couplings, kept)(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)


def test_plain_attention_takes_the_place_of_all() -> None:
    network = seeded(Vision)
    plain: Any = with_plain_attention(copy.deepcopy(network))
    assert isinstance(plain.attention, PlainAttention)
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-6)
