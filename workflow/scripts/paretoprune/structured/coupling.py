"""Which slices of which tensors have to go together: coupled channels of any network, and attention heads.

The graph of the network comes from torch-pruning, which nothing else here knows. It follows channels from the layer
that makes them through sums, concatenations, normalisations and depthwise convolutions to the layers that read them.
What it says is not taken on trust: the network is cut as it says, and a coupling stays only if the smaller network
answers what the whole one answers when nothing reads the channels in question.
"""

import fnmatch
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paretoprune.copies import copied
from paretoprune.shapes import is_attention, is_depthwise, with_tensors

# How far answers of the cut and of the whole network may be apart, as a share of the largest: they are computed in
# double precision, but a network may go through float32 by itself.
SAME = 1e-5
# Numbers of an axis that belong to no unit.
STAYS = -1


@dataclass(frozen=True)
class Part:
    """An axis of a tensor whose entries go with units.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: The axis.
        unit_of: int64 (size of the axis,): the unit that each entry goes with, `STAYS` for none.
        reads: Whether it is a layer's weight by its inputs, so that the units' activations are read here.
        together: Whether it belongs to a layer that normalises all channels together.
    """

    tensor: str
    axis: int
    unit_of: np.ndarray
    reads: bool = False
    together: bool = False

    def stays(self, bits: np.ndarray) -> np.ndarray:
        """Which entries stay, bool (size of the axis,), for bits (n_units,)."""
        return np.asarray((self.unit_of == STAYS) | bits[self.unit_of])


@dataclass(frozen=True)
class Coupling:
    """Units that compete, and the slices of tensors that go with each.

    Attributes:
        name: Name of the layer that makes them.
        n_units: Number of units.
        parts: Everything that has to be cut.
        may_vanish: Whether the network still does something without any of them: they are a branch beside a shortcut.
    """

    name: str
    n_units: int
    parts: tuple[Part, ...]
    may_vanish: bool = False

    def is_named(self, pattern: str) -> bool:
        """Whether a shell pattern matches the name of a layer that has to be cut, or of its weight."""
        tensors = [part.tensor for part in self.parts if part.tensor.endswith("weight")]
        names = [self.name, *tensors, *(name.removesuffix(".weight") for name in tensors)]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    @property
    def is_normalised_together(self) -> bool:
        """Whether channels are normalised together, so that removing some changes the others."""
        return any(part.together for part in self.parts)


@dataclass(frozen=True)
class Couplings:
    """What can be cut of a network, and what cannot.

    Attributes:
        couplings: In the order in which the network runs.
        refused: Layers whose outputs cannot be cut, and why.
    """

    couplings: tuple[Coupling, ...]
    refused: Mapping[str, str]


def find_couplings(network: nn.Module, image: Tensor) -> Couplings:
    """Find the units of a network that can be cut.

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, ...), normalised, as the network expects them.

    Raises:
        ValueError: Its graph cannot be followed, or nothing can be cut.
    """
    image = image.detach().cpu()
    image = image.double() if image.is_floating_point() else image
    whole = copied(network).cpu().double()
    whole.eval()
    proposed, refused = _proposed(whole, image)
    couplings: list[Coupling] = []
    for together in (False, True):
        alike = [coupling for coupling in proposed if coupling.is_normalised_together == together]
        sound, unsound = _sound(whole, image, alike)
        couplings += sound
        refused |= unsound
    couplings.sort(key=proposed.index)
    couplings = _branches(whole, image, couplings)
    if not couplings:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(
            f"expected channels that can be cut, found none ({reasons or 'no layer makes any'}); prune weights instead "
            "(units='weights')"
        )
    return Couplings(tuple(couplings), refused)


def _sound(whole: nn.Module, image: Tensor, couplings: Sequence[Coupling]) -> tuple[list[Coupling], dict[str, str]]:
    """Those that can be cut as they say, and why the others cannot; all at once, one by one if that goes wrong."""
    try:
        if couplings:
            _check(whole, image, couplings)
    except _NotCuttableError as error:
        if len(couplings) == 1:
            return [], {couplings[0].name: str(error)}
        half = len(couplings) // 2
        parts = [_sound(whole, image, part) for part in (couplings[:half], couplings[half:])]
        return parts[0][0] + parts[1][0], parts[0][1] | parts[1][1]
    return list(couplings), {}


def _branches(whole: nn.Module, image: Tensor, couplings: Sequence[Coupling]) -> list[Coupling]:
    """The same couplings, those marked that may vanish, alone and together."""
    able = [coupling for coupling in couplings if _may_vanish(whole, image, [coupling])]
    if able and not _may_vanish(whole, image, able):
        # Chains of couplings that a tensor lies between: only those that are no neighbours.
        uses = Counter(part.tensor for coupling in able for part in coupling.parts)
        able = [coupling for coupling in able if all(uses[part.tensor] == 1 for part in coupling.parts)]
        able = able if able and _may_vanish(whole, image, able) else []
    return [replace(coupling, may_vanish=coupling in able) for coupling in couplings]


def _may_vanish(whole: nn.Module, image: Tensor, couplings: Sequence[Coupling]) -> bool:
    """Whether a network without these units runs, answers as if nothing read them, and still looks at its images."""
    nothing = {coupling.name: np.zeros(coupling.n_units, dtype=bool) for coupling in couplings}
    try:
        small = _checked_cut(whole, image, couplings, nothing)
    except _NotCuttableError:
        return False
    with torch.no_grad():
        return not torch.equal(small(image), small(image.flip(-1) + 1.0))


class _NotCuttableError(ValueError):
    """A coupling cannot be cut; the message says why."""


def _check(whole: nn.Module, image: Tensor, couplings: Sequence[Coupling]) -> None:
    """Cut every second unit, and compare with the whole network in which nothing reads them."""
    _checked_cut(whole, image, couplings, {one.name: np.arange(one.n_units) % 2 == 0 for one in couplings})


def _checked_cut(
    whole: nn.Module, image: Tensor, couplings: Sequence[Coupling], choice: Mapping[str, np.ndarray]
) -> nn.Module:
    """The network without some units, if it answers as the whole one does when nothing reads them.

    Raises:
        _NotCuttableError: It does not run, or answers something else.
    """
    try:
        small = cut(whole, couplings, choice)
        with torch.no_grad():
            found = small(image)
    except Exception as error:  # whatever the network's own code raises where its channels are fewer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _NotCuttableError(f"the network does not run without some of its channels ({reason[:120]})") from error
    if any(coupling.is_normalised_together for coupling in couplings):
        # Fewer channels under one norm are another function; that the network runs is all that can be told.
        return small
    blind = copied(whole)
    tensors = dict(blind.named_parameters())
    with torch.no_grad():
        for coupling in couplings:
            for part in coupling.parts:
                if part.reads:
                    lost = ~part.stays(choice[coupling.name])
                    tensors[part.tensor].index_fill_(part.axis, torch.from_numpy(np.flatnonzero(lost)), 0.0)
        expected = blind(image)
        scale = max(float(expected.abs().max()), 1e-12)
        differs = found.shape != expected.shape or float((found - expected).abs().max()) > SAME * scale
    if differs:
        raise _NotCuttableError("its channels are used in ways that the graph does not show")
    return small


def cut(network: nn.Module, couplings: Sequence[Coupling], kept: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of a network without some units.

    Args:
        network: The whole network; it is left as it is.
        couplings: What can be cut.
        kept: By name of the coupling, bool (n_units,), which units stay; those that are not named stay whole.

    Returns:
        The same modules around smaller tensors; `shapes.Emptied` in the place of layers that make or read nothing.
    """
    return with_tensors(copied(network), smaller_tensors(network, couplings, kept))


def smaller_tensors(
    network: nn.Module, couplings: Sequence[Coupling], kept: Mapping[str, np.ndarray]
) -> dict[str, Tensor | None]:
    """The tensors that change when units go, by name; None for those of which nothing is left."""
    tensors: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # An axis may be cut by several couplings, whose entries are side by side in it (concatenations).
    stays: dict[str, dict[int, np.ndarray]] = {}
    reads: set[tuple[str, int]] = set()
    for coupling in couplings:
        if coupling.name not in kept or kept[coupling.name].all():
            continue
        for part in coupling.parts:
            mine, axes = part.stays(kept[coupling.name]), stays.setdefault(part.tensor, {})
            axes[part.axis] = axes[part.axis] & mine if part.axis in axes else mine
            if part.reads:
                reads.add((part.tensor, part.axis))
    smaller: dict[str, Tensor | None] = {}
    for name, axes in stays.items():
        cut_out = tensors[name].detach()
        for axis, mask in axes.items():
            cut_out = cut_out.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(cut_out.device))
        smaller[name] = cut_out if cut_out.numel() else None
    for name, held in list(smaller.items()):
        bias = f"{name.removesuffix('weight')}bias"
        makes = next((mask for axis, mask in stays[name].items() if (name, axis) not in reads), None)
        if held is None and (makes is None or makes.any()) and name.endswith("weight"):
            # It reads nothing, and what it made of nothing is its bias.
            n_made = tensors[name].shape[1 if (name, 0) in reads else 0] if makes is None else int(makes.sum())
            trained = smaller.get(bias, tensors.get(bias))
            smaller[bias] = tensors[name].new_zeros(n_made) if trained is None else trained.detach()
    return smaller


# What torch-pruning says


@dataclass(frozen=True)
class _Item:
    """A module or parameter of a group of torch-pruning, and which of its channels stand for which of the root's."""

    module: Any
    name: str
    cuts_outputs: bool
    channels: list[int]
    roots: list[int]


@dataclass(frozen=True)
class _Axis:
    """An axis that has to be cut, before it is known what its units are.

    Attributes:
        size: Number of channels that it stands for.
        n_groups: Channels at one position of this many equal parts go together.
        folded: Whether the axis has the positions of one part only, and stands for all.
    """

    tensor: str
    axis: int
    size: int
    reads: bool = False
    together: bool = False
    n_groups: int = 1
    folded: bool = False


def _proposed(whole: nn.Module, image: Tensor) -> tuple[list[Coupling], dict[str, str]]:
    """What the graph says goes together, and the layers for which it says nothing that can be used."""
    order = {name: i for i, name in enumerate(_order_of_calls(whole, image))}

    def place(name: str) -> int:
        return order.get(name, len(order))

    attentions = {name: module for name, module in whole.named_modules() if is_attention(module)}
    proposed, refused = [_heads(name, module) for name, module in attentions.items()], {}
    uses = Counter(id(parameter) for _, parameter in whole.named_parameters(remove_duplicate=False))
    shared = {name for name, parameter in whole.named_parameters(remove_duplicate=False) if uses[id(parameter)] > 1}
    for items in _groups_of(whole, image):
        makers = [item.name for item in items if item.cuts_outputs and isinstance(item.module, _ConvNd | nn.Linear)]
        name = min(makers, key=place)
        if name.removesuffix(".qkv") in attentions:
            continue
        if any(type(item.module).__name__ == "_OutputOp" for item in items) or all(item.cuts_outputs for item in items):
            continue  # the classes
        try:
            proposed.append(_coupling_of(name, items, shared))
        except _NotCuttableError as error:
            refused[name] = str(error)
    return sorted(proposed, key=lambda coupling: place(coupling.name)), refused


def _groups_of(whole: nn.Module, image: Tensor) -> list[list[_Item]]:
    """The groups of torch-pruning, in plain data.

    Raises:
        ValueError: It cannot follow the network.
    """
    import torch_pruning

    names = {id(module): name for name, module in whole.named_modules()}
    names |= {id(parameter): name for name, parameter in whole.named_parameters()}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(
                whole, example_inputs=image.expand(2, *image.shape[1:]).clone()
            )
            groups = list(graph.get_all_groups(ignored_layers=[], root_module_types=[_ConvNd, nn.Linear]))
    except Exception as error:  # whatever torch-pruning or the network raise on the way
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the channels of this network cannot be followed ({type(error).__name__}: {reason[:160]}); prune weights "
            "instead (units='weights')"
        ) from error
    return [
        [
            _Item(
                item.dep.target.module,
                names.get(id(item.dep.target.module), ""),
                "out_channels" in item.dep.handler.__name__,
                list(item.idxs),
                list(item.root_idxs),
            )
            for item in group
        ]
        for group in groups
    ]


def _order_of_calls(network: nn.Module, image: Tensor) -> list[str]:
    """Names of the modules in the order in which they are called first."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.setdefault(name))
        for name, module in network.named_modules()
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _heads(name: str, module: Any) -> Coupling:
    """The heads of an attention whose queries, keys and values come from one layer."""
    of_inputs = np.repeat(np.arange(module.num_heads), module.head_dim)
    of_outputs = np.tile(of_inputs, 3)
    parts = [Part(f"{name}.qkv.weight", 0, of_outputs)]
    if module.qkv.bias is not None:
        parts.append(Part(f"{name}.qkv.bias", 0, of_outputs))
    parts.append(Part(f"{name}.proj.weight", 1, of_inputs, reads=True))
    return Coupling(name, module.num_heads, tuple(parts))


def _coupling_of(name: str, items: Sequence[_Item], shared: Collection[str]) -> Coupling:
    """Bring one group of torch-pruning into parts; channels that must go together become one unit."""
    found: list[tuple[_Axis, np.ndarray]] = []
    for item in items:
        if item.name:
            for axis in _axes_of(item):
                if axis.tensor in shared:
                    raise _NotCuttableError(f"'{axis.tensor}' is used by several layers")
                found.append((axis, _roots_of(axis, item)))
    unit_of_root = _joined(len(items[0].channels), found)
    parts: dict[tuple[str, int], Part] = {}
    for axis, root_of in found:
        unit_of = np.where(root_of == STAYS, STAYS, unit_of_root[root_of])
        if axis.folded:
            unit_of = unit_of.reshape(axis.n_groups, -1)[0]
        parts[axis.tensor, axis.axis] = Part(axis.tensor, axis.axis, unit_of, axis.reads, axis.together)
    if not any(part.reads for part in parts.values()):
        raise _NotCuttableError("no layer reads them")
    n_units = int(unit_of_root.max()) + 1
    if n_units < 2:
        raise _NotCuttableError("they only go all together")
    return Coupling(name, n_units, tuple(parts.values()))


def _axes_of(item: _Item) -> Iterator[_Axis]:
    """The axes of an item's tensors that a cut goes through."""
    module, name = item.module, item.name
    prefix = f"{name}."
    if isinstance(module, nn.Parameter):
        size = max(item.channels) + 1
        axes = [axis for axis, n in enumerate(module.shape) if n == size]
        if len(axes) != 1:
            raise _NotCuttableError(f"no axis of the parameter '{name}' {tuple(module.shape)} is clearly theirs")
        yield _Axis(name, axes[0], size)
    elif isinstance(module, _ConvNd):
        yield from _axes_of_convolution(module, prefix, item.cuts_outputs)
    elif isinstance(module, nn.Linear):
        if item.cuts_outputs:
            yield _Axis(f"{prefix}weight", 0, module.out_features)
            if module.bias is not None:
                yield _Axis(f"{prefix}bias", 0, module.out_features)
        else:
            yield _Axis(f"{prefix}weight", 1, module.in_features, reads=True)
    elif isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise _NotCuttableError(f"'{name}' normalises over more than channels")
        together = isinstance(module, nn.LayerNorm | nn.GroupNorm)
        n_groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if together and not tensors:
            raise _NotCuttableError(f"'{name}' has no tensor by which its width could be told")
        for own_name, tensor in tensors:
            if tensor.ndim == 1 and len(tensor) > 1:
                yield _Axis(f"{prefix}{own_name}", 0, len(tensor), together=together, n_groups=n_groups)
    else:
        raise _NotCuttableError(f"'{name}' is a {type(module).__name__}, whose channels are not cut")


def _axes_of_convolution(module: _ConvNd, prefix: str, cuts_outputs: bool) -> Iterator[_Axis]:
    transposed, depthwise = isinstance(module, _ConvTransposeNd), is_depthwise(module)
    if transposed and module.groups > 1:
        raise _NotCuttableError(f"'{prefix}weight' is a transposed convolution in groups")
    if cuts_outputs or depthwise:
        # A group of a depthwise convolution goes as a whole.
        n_groups = 1 if depthwise else module.groups
        yield _Axis(f"{prefix}weight", 1 if transposed else 0, module.out_channels, n_groups=n_groups)
        if module.bias is not None:
            yield _Axis(f"{prefix}bias", 0, module.out_channels, n_groups=n_groups)
    else:
        folded = module.groups > 1
        yield _Axis(
            f"{prefix}weight",
            0 if transposed else 1,
            module.in_channels,
            reads=True,
            n_groups=module.groups,
            folded=folded,
        )


def _roots_of(axis: _Axis, item: _Item) -> np.ndarray:
    """The root of each channel of an axis, int64 (size,), `STAYS` where it has none."""
    root_of = np.full(axis.size, STAYS, dtype=np.int64)
    if len(item.channels) != len(item.roots) or any(root is None for root in item.roots):
        raise _NotCuttableError(f"the graph does not say which channels '{axis.tensor}' has")
    if item.channels and max(item.channels) >= axis.size:
        raise _NotCuttableError(
            f"'{axis.tensor}' has {axis.size} channels where the graph sees {max(item.channels) + 1}"
        )
    root_of[item.channels] = item.roots
    return root_of


def _joined(n_roots: int, found: Sequence[tuple[_Axis, np.ndarray]]) -> np.ndarray:
    """The unit of each root, int64 (n_roots,): roots at one position of all groups go together."""
    edges = []
    for axis, root_of in found:
        if axis.n_groups == 1:
            continue
        if (root_of == STAYS).any() or len(root_of) % axis.n_groups:
            raise _NotCuttableError(f"'{axis.tensor}' has groups that other channels are in too")
        by_group = root_of.reshape(axis.n_groups, -1)
        edges += [np.stack([by_group[0], other]) for other in by_group[1:]]
    if not edges:
        return np.arange(n_roots)
    first, second = np.concatenate(edges, axis=1)
    pairs = csr_array((np.ones(len(first)), (first, second)), shape=(n_roots, n_roots))
    _, labels = connected_components(pairs, directed=False)
    # In the order of their first channels.
    _, start, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(start))[inverse], dtype=np.int64)
