"""Attention whose heads can be left out: what belongs to a head, and how a module learns how many it has.

Modules with one layer for queries, keys and values (or one each) and one that reads all heads are known by the widths
of these layers. Some modules count on the width of what they are given; `as_plain` makes of such a module one that goes
by its tensors, which keep their names.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

# What modules call the number of their heads, that of keys and values alone, and the width of all heads.
COUNTS = ("num_heads", "n_heads", "num_attention_heads", "heads")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTHS = ("attn_dim", "all_head_dim", "all_head_size", "inner_dim")
_QUERY, _KEY, _VALUE = (
    re.compile(rf"(to_|w)?({short}|{long})(_proj|_lin)?")
    for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
)


@dataclass(frozen=True)
class Slice:
    """An axis of a tensor whose entries belong to heads.

    Attributes:
        tensor: Name of the parameter or buffer within the module.
        axis: The axis.
        head_of: int64 (size of the axis,): the head that each entry belongs to.
        reads: Whether it is the weight of the layer that reads all heads.
    """

    tensor: str
    axis: int
    head_of: np.ndarray
    reads: bool = False


@dataclass(frozen=True)
class Layers:
    """The layers of attention that tell how wide its heads are.

    Attributes:
        makers: Names of the weights that make queries, keys and values, by rows: one, or three.
        reader: Name of the layer that reads all heads.
        count: Name of the attribute with the number of heads.
        n_heads: Number of heads.
        width: Of the values of one head.
    """

    makers: tuple[str, ...]
    reader: str
    count: str
    n_heads: int
    width: int


def layers_of(module: nn.Module) -> Layers | None:
    """The layers of attention, None for any other module, or attention that is made otherwise."""
    count = next((name for name in COUNTS if type(getattr(module, name, None)) is int), None)
    n_heads = 0 if count is None else getattr(module, count)
    if count is None or n_heads < 1:
        return None
    if isinstance(module, nn.MultiheadAttention):
        if not _is_plain(module):
            return None
        return Layers(("in_proj_weight",), "out_proj", count, n_heads, len(module.in_proj_weight) // (3 * n_heads))
    layers = {name: _weight_of(child) for name, child in module.named_children()}
    weights = {name: weight for name, weight in layers.items() if weight is not None}
    makers, n_rows = _makers(weights)
    if n_rows == 0 or n_rows % n_heads:
        return None
    # Where several could be it, the last one comes last.
    readers = [name for name, weight in weights.items() if name not in makers and weight.shape[1] == n_rows]
    if not readers:
        return None
    return Layers(tuple(f"{name}.weight" for name in makers), readers[-1], count, n_heads, n_rows // n_heads)


def _weight_of(child: nn.Module) -> Tensor | None:
    """The matrix of a layer: linear, or a convolution of one pixel."""
    if isinstance(child, nn.Linear):
        return child.weight
    if isinstance(child, nn.Conv1d | nn.Conv2d) and child.groups == 1 and child.weight[0, 0].numel() == 1:
        return child.weight
    return None


def _makers(weights: Mapping[str, Tensor]) -> tuple[tuple[str, ...], int]:
    """Names of the layers for queries, keys and values, and how wide all heads of the queries are; 0 for none."""
    for name, weight in weights.items():
        if "qkv" in name and len(weight) % 3 == 0:
            return (name,), len(weight) // 3
    names = [next((name for name in weights if kind.fullmatch(name)), None) for kind in (_QUERY, _KEY, _VALUE)]
    query, key, value = names
    if query is None or key is None or value is None or len(weights[key]) != len(weights[value]):
        return (), 0
    return (query, key, value), len(weights[query])


def layouts_of(module: nn.Module) -> Iterator[tuple[int, tuple[Slice, ...]]]:
    """How the heads may lie in the tensors of attention, the likeliest first: their number, and what belongs to each.

    Heads that share keys and values go together.
    """
    found = layers_of(module)
    if found is None or found.n_heads < 2:
        return
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    of_values = np.repeat(np.arange(found.n_heads), found.width)
    n_units = found.n_heads
    if len(found.makers) == 1:
        rows = {found.makers[0]: np.tile(of_values, 3)}
        others = [{found.makers[0]: np.repeat(np.arange(found.n_heads), 3 * found.width)}]
    else:
        query, *keyed = found.makers
        n_units = len(tensors[keyed[0]]) // found.width
        if n_units < 2 or found.n_heads % n_units:
            return
        of_values = np.repeat(np.arange(n_units), found.width * (found.n_heads // n_units))
        rows = {query: of_values, **dict.fromkeys(keyed, np.repeat(np.arange(n_units), found.width))}
        others = []
    for layout in (rows, *others):
        made = [Slice(name, 0, heads) for name, heads in layout.items()]
        made += [
            Slice(bias, 0, heads)
            for name, heads in layout.items()
            if (bias := f"{name.removesuffix('weight')}bias") in tensors
        ]
        made.append(Slice(f"{found.reader}.weight", 1, of_values, reads=True))
        more = list(_others(tensors, made, found, of_values)) if n_units == found.n_heads else []
        if more:
            yield n_units, (*made, *more)
        yield n_units, tuple(made)


def _others(tensors: Mapping[str, Tensor], known: list[Slice], found: Layers, of_values: np.ndarray) -> Iterator[Slice]:
    """Further tensors with an entry for each head, such as biases of positions, or for each row."""
    names = {one.tensor for one in known} | {f"{found.reader}.bias"}
    for name, tensor in tensors.items():
        if name in names or not tensor.is_floating_point():
            continue
        axes = [axis for axis, size in enumerate(tensor.shape) if size == found.n_heads]
        if len(axes) == 1:
            yield Slice(name, axes[0], np.arange(found.n_heads))
        elif tensor.ndim == 1 and len(tensor) == len(of_values):
            yield Slice(name, 0, of_values)


def tell_heads(module: nn.Module, before: Layers) -> None:
    """Set what attention says of its heads to the widths of its layers, in place.

    Args:
        module: Attention with tensors of other shapes.
        before: Its layers before.
    """
    n_rows = [len(module.get_parameter(name)) for name in before.makers]
    n_heads = n_rows[0] // (before.width * (3 if len(n_rows) == 1 else 1))
    for name in WIDTHS:
        if type(getattr(module, name, None)) is int and getattr(module, name) == before.n_heads * before.width:
            setattr(module, name, n_heads * before.width)
    for name in KEY_COUNTS:
        if type(getattr(module, name, None)) is int and len(n_rows) > 1:
            setattr(module, name, n_rows[1] // before.width)
    setattr(module, before.count, n_heads)


class WithoutHeads(nn.Module):
    """What is left of attention without any head: what the layer that read them makes of nothing.

    Args:
        attention: The module whose place it takes.
        reader: Name of the layer that read the heads.
        left: What is left of this layer.
    """

    def __init__(self, attention: nn.Module, reader: str, left: nn.Module) -> None:
        super().__init__()
        self.reader, self.answers_weights = reader, isinstance(attention, nn.MultiheadAttention)
        # What torch's own layers ask of attention before they call it.
        self.batch_first, self.num_heads, self.in_proj_bias = getattr(attention, "batch_first", True), 1, None
        self.add_module(reader, left)
        self.train(attention.training)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Map (n, ..., n_channels) to as much."""
        made = self.get_submodule(self.reader)(x)
        return (made, None) if self.answers_weights else made


# Modules that count on the width of what they are given


class PlainAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with as many heads as its tensors have, and channels of any number.

    Args:
        whole: The module whose tensors it takes over.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        _take_over(self, whole)
        # So that torch's own encoder layers call it, and do not use its tensors themselves.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, of batches.

        Raises:
            ValueError: Masks for more or fewer heads than there are: it is not known which heads are left.
        """
        torch._assert(query.dim() == 3, "expected sequences of a batch, of three dimensions")
        q, k, v = self._projected(query, key, value)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (_apart(one, self.head_dim) for one in (q, k, v))
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = _joined_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            x = functional.dropout(weights, dropout, training=self.training) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            q, k, v = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        # Written out, since a traced network cannot go through what it does not know the number of.
        of_q, of_k, of_v = self.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return (
            functional.linear(query, of_q, bias_q),
            functional.linear(key, of_k, bias_k),
            functional.linear(value, of_v, bias_v),
        )


def _apart(x: Tensor, width: int) -> Tensor:
    """Heads (n, n_heads, length, width) that lie side by side in (n, length, n_heads * width)."""
    return x.unflatten(-1, (-1, width)).transpose(-3, -2)


def _joined_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores (n, n_heads, n_queries, n_keys), None for nothing."""
    if attn_mask is not None and attn_mask.dim() == 3:
        # One for each image and head, which fits while no head is gone.
        if len(attn_mask) != q.shape[0] * q.shape[1]:
            raise ValueError(
                f"expected one mask for all heads, or {q.shape[0] * q.shape[1]} for {q.shape[1]} heads of "
                f"{q.shape[0]} images, found {len(attn_mask)}; heads with masks of their own stay whole"
            )
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    added = None if attn_mask is None else _as_added(attn_mask, q)
    if key_padding_mask is None:
        return added
    of_keys = _as_added(key_padding_mask, q)[:, None, None, :]
    return of_keys if added is None else added + of_keys


def _as_added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))


class PlainWindows(nn.Module):
    """torchvision's attention in shifted windows (both versions), with as many heads as its tensors have.

    Args:
        whole: The module whose tensors it takes over.
    """

    def __init__(self, whole: Any) -> None:
        _take_over(self, whole)
        self.head_dim = whole.qkv.out_features // (3 * whole.num_heads)
        self.kind = type(whole)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, height, width, n_channels) to as much."""
        this: Any = self
        qkv = this.qkv(_into_windows(x, this.window_size, this.shift_size))
        scale = getattr(this, "logit_scale", None)
        if scale is not None and this.qkv.bias is not None:
            # Keys have no bias there.
            q, k, v = qkv.chunk(3, dim=-1)
            qkv = torch.cat([q, k - this.qkv.bias.chunk(3)[1], v], dim=-1)
        positions = self.kind.get_relative_position_bias(this)
        mask = _window_mask(x, this.window_size, this.shift_size)
        dropout = this.attention_dropout if self.training else 0.0
        made = this.proj(_attend(qkv, self.head_dim, positions, mask, scale, dropout))
        made = functional.dropout(made, this.dropout, self.training)
        return _out_of_windows(made, x, this.window_size, this.shift_size)


def _padded(x: Tensor, window: list[int], shift: list[int]) -> tuple[list[int], list[int]]:
    """Height and width in whole windows, and by how much the windows are shifted."""
    sizes = [-(-x.shape[i + 1] // window[i]) * window[i] for i in (0, 1)]
    return sizes, [0 if window[i] >= sizes[i] else shift[i] for i in (0, 1)]


def _into_windows(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """(n, height, width, n_channels) as (n * n_windows, size of a window, n_channels)."""
    (height, width), shift = _padded(x, window, shift)
    x = functional.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = x.view(x.shape[0], height // window[0], window[0], width // window[1], window[1], x.shape[3])
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)


def _out_of_windows(made: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """What `_into_windows` did to `x`, undone for what was made of it."""
    (height, width), shift = _padded(x, window, shift)
    made = made.view(x.shape[0], height // window[0], width // window[1], window[0], window[1], made.shape[-1])
    made = made.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    if sum(shift) > 0:
        made = torch.roll(made, shifts=(shift[0], shift[1]), dims=(1, 2))
    return made[:, : x.shape[1], : x.shape[2]].contiguous()


def _window_mask(x: Tensor, window: list[int], shift: list[int]) -> Tensor | None:
    """What keeps apart in a window what the shift has put together, (n_windows, 1, size, size); None for nothing."""
    (height, width), shift = _padded(x, window, shift)
    if sum(shift) == 0:
        return None
    place = x.new_zeros(height, width)
    steps = [[(0, -window[i]), (-window[i], -shift[i]), (-shift[i], None)] for i in (0, 1)]
    for i, (top, bottom) in enumerate(steps[0]):
        for j, (left, right) in enumerate(steps[1]):
            place[top:bottom, left:right] = 3 * i + j
    place = _into_windows(place[None, :, :, None], window, [0, 0]).squeeze(-1)
    return ((place[:, None] != place[:, :, None]) * -100.0).to(x.dtype)[:, None]


def _attend(
    qkv: Tensor, width: int, positions: Tensor, mask: Tensor | None, scale: Tensor | None, dropout: float
) -> Tensor:
    """Attention within windows: (n * n_windows, size, n_heads * width), of three times as many channels."""
    q, k, v = (_apart(one, width) for one in qkv.chunk(3, dim=-1))
    if scale is None:
        scores = (q * width**-0.5) @ k.transpose(-2, -1)
    else:
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(scale, max=float(np.log(100.0))).exp()
    scores = scores + positions
    if mask is not None:
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask).flatten(0, 1)
    weights = functional.dropout(functional.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return (weights @ v).transpose(1, 2).flatten(2)


# Their code looks at sizes, which a symbol does not have: traced networks call them as a whole.
for _name in ("_into_windows", "_out_of_windows", "_window_mask", "_attend", "_joined_masks"):
    fx.wrap(_name)


class PlainGrid(nn.Module):
    """torchvision's attention of MaxViT, with as many heads as its tensors have.

    Args:
        whole: The module whose tensors it takes over.
    """

    def __init__(self, whole: Any) -> None:
        _take_over(self, whole)
        self.kind = type(whole)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, n_groups, n_pixels, n_channels) to as much."""
        this: Any = self
        q, k, v = this.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (_apart(one, this.head_dim) for one in (q, k, v))
        scores = q @ (k * this.scale_factor).transpose(-2, -1) + self.kind.get_relative_positional_bias(this)
        return this.merge((functional.softmax(scores, dim=-1) @ v).transpose(2, 3).flatten(3))


def _take_over(plain: nn.Module, whole: nn.Module) -> None:
    """Make a module that has not been set up yet hold what another one holds."""
    nn.Module.__init__(plain)
    held = {
        name: dict(value) if name in ("_parameters", "_buffers", "_modules") else value
        for name, value in vars(whole).items()
    }
    plain.__dict__.update(held)


def _is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether queries, keys and values are equally wide, and nothing is added to the keys."""
    return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn


def as_plain(module: nn.Module) -> nn.Module | None:
    """The same attention, around the same tensors, for any number of heads and channels; None where there is none."""
    if isinstance(module, nn.MultiheadAttention):
        return PlainAttention(module) if type(module) is nn.MultiheadAttention and _is_plain(module) else None
    made: Callable[[Any], nn.Module] | None = None
    # Whoever has such a module has imported torchvision.
    if (swin := sys.modules.get("torchvision.models.swin_transformer")) and type(module) in (
        swin.ShiftedWindowAttention,
        swin.ShiftedWindowAttentionV2,
    ):
        made = PlainWindows
    elif (maxvit := sys.modules.get("torchvision.models.maxvit")) and (
        type(module) is maxvit.RelativePositionalMultiHeadAttention
    ):
        made = PlainGrid
    return None if made is None else made(module)


def with_plain_attention(network: nn.Module) -> nn.Module:
    """Put plain modules in the place of all attention that has such a form, in place; the answers stay.

    Args:
        network: Its own copy, which is changed.

    Returns:
        The same network.
    """
    for name, module in list(network.named_modules()):
        plain = as_plain(module) if name else None
        if plain is not None:
            network.set_submodule(name, plain)
    return network
