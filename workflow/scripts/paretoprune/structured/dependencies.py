"""What torch-pruning's dependency graph says of a network: groups of channels that go together, in plain data.

Nothing else knows torch-pruning. It follows channels from the layer that makes them through sums, concatenations,
normalisations and depthwise convolutions to the layers that read them, and is right more often than not: whoever calls
this checks what it says.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_map

from paretoprune.attention import layers_of, with_plain_attention
from paretoprune.copies import copied
from paretoprune.shapes import is_depthwise
from paretoprune.structured.parts import STAYS, Coupling, NotCuttableError, Part


@dataclass(frozen=True)
class _Item:
    """A module or parameter of a group of torch-pruning, and which of its channels stand for which of the root's.

    Attributes:
        module: Of the network that torch-pruning has seen.
        name: Name of the module or parameter.
        tensors: Names in the whole network of the module's own tensors, by their names in the module.
        owner: Kind of the module that has the parameter.
    """

    module: Any
    name: str
    tensors: Mapping[str, str]
    owner: str
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


def propose(
    whole: nn.Module, image: Tensor, order: Mapping[str, int], made_elsewhere: Collection[str]
) -> tuple[list[Coupling], dict[str, str]]:
    """What the graph says goes together, and the layers for which it says nothing that can be used.

    Args:
        whole: In evaluation mode; it is left as it is.
        image: One image (1, ...).
        order: When each module is first called, by name.
        made_elsewhere: Names of weights whose outputs are left out.

    Raises:
        ValueError: The network cannot be followed at all.
    """
    uses = Counter(id(parameter) for _, parameter in whole.named_parameters(remove_duplicate=False))
    shared = {name for name, parameter in whole.named_parameters(remove_duplicate=False) if uses[id(parameter)] > 1}
    groups, refused = _groups_of(whole, image)
    proposed = []
    seen = {item.name for items in groups for item in items}
    for name, module in whole.named_modules():
        if name in order and name not in seen and isinstance(module, _ConvNd | nn.Linear):
            refused.setdefault(name, "the graph, which is that of gradients, does not reach it")
    for items in groups:
        makers = [item for item in items if item.cuts_outputs and isinstance(item.module, _ConvNd | nn.Linear)]
        first = min(makers, key=lambda item: order.get(item.name, len(order)))
        if first.tensors["weight"] in made_elsewhere:
            continue
        if any(type(item.module).__name__ == "_OutputOp" for item in items) or all(item.cuts_outputs for item in items):
            continue  # the classes
        try:
            proposed.append(_coupling_of(first.name, items, shared))
        except NotCuttableError as error:
            refused[first.name] = str(error)
    return proposed, refused


class _Seen(nn.Module):
    """Attention as torch-pruning has to see it: a layer for queries, keys and values, and one that reads the heads.

    Args:
        whole: The module in whose place it is followed, not run: what it answers is of the right shape only.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        made, given = whole.in_proj_weight.shape
        self.qkv = nn.utils.skip_init(nn.Linear, given, made, bias=whole.in_proj_bias is not None)
        self.qkv.weight = whole.in_proj_weight
        self.qkv.bias = whole.in_proj_bias
        self.proj = whole.out_proj
        # What torch's own encoder layers ask of attention before they call it.
        self.batch_first, self.num_heads, self.in_proj_bias = whole.batch_first, 1, None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        """Answer something of the shape of the queries, which all that attention looks at has a part in."""
        q = self.qkv(query).chunk(3, dim=-1)[0]
        tokens = 1 if self.batch_first else 0
        _, k, v = self.qkv(key).mean(dim=tokens, keepdim=True).chunk(3, dim=-1)
        return self.proj(q * k + v), None


def _groups_of(whole: nn.Module, image: Tensor) -> tuple[list[list[_Item]], dict[str, str]]:
    """The groups of torch-pruning, in plain data, and the layers and modules at which it gave up.

    Raises:
        ValueError: It cannot follow the network, nor any part of it.
    """
    tensors = {id(tensor): name for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]}
    seen = with_plain_attention(copied(whole, shares_tensors=True))
    for name, module in list(seen.named_modules()):
        if name and isinstance(module, nn.MultiheadAttention) and layers_of(module) is not None:
            seen.set_submodule(name, _Seen(module))
    names = {id(module): name for name, module in seen.named_modules()} | tensors
    owners = {
        id(parameter): type(module).__name__
        for module in seen.modules()
        for parameter in module.parameters(recurse=False)
    }
    followed = _Followed(seen, image.expand(2, *image.shape[1:]).clone())
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        groups = followed.all()
    if not groups:
        raise ValueError(
            f"the channels of this network cannot be followed ({followed.first_reason}); prune weights instead "
            "(units='weights')"
        )
    return [[_item(one, names, tensors, owners) for one in group] for group in groups], followed.refused


class _Followed:
    """A network as torch-pruning follows it; of one that it cannot follow, the parts that it can.

    Args:
        network: It is changed for a moment, and left as it is.
        images: What it is run on.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.refused: dict[str, str] = {}
        self._network, self._images = network, images
        self._calls: dict[str, tuple[tuple[Any, ...], Mapping[str, Any], Any]] = {}

    @property
    def first_reason(self) -> str:
        """Of the first module that could not be followed."""
        return next((f"'{name}': {why}" for name, why in self.refused.items()), "no layer runs")

    def all(self) -> list[Any]:
        """The groups of the network, or of its parts."""
        try:
            return self._graph_of(self._network, (self._images,))
        except Exception:  # whatever torch-pruning or the network raise on the way
            self._watch()
            return self._parts("", self._network)[0]

    def _parts(self, name: str, module: nn.Module) -> tuple[list[Any], bool]:
        """The groups of a module, and whether it can be followed but for parts of it."""
        inputs, options, _ = self._calls[name]
        if not any(isinstance(part, _ConvNd | nn.Linear) for part in module.modules()):
            return [], not isinstance(module, nn.RNNBase)
        if not options:
            # Otherwise nothing is known of it but what its parts say.
            try:
                return self._graph_of(module, inputs), True
            except Exception as error:  # likewise
                reason = _reason(error)
        else:
            reason = "it takes arguments by name"
        groups, lost = [], {}
        children = {f"{name}.{own}".removeprefix("."): child for own, child in module.named_children()}
        for child_name, child in children.items():
            if child_name not in self._calls:
                continue
            found, is_followed = self._parts(child_name, child)
            if not is_followed:
                lost[child_name] = child
            groups.append((found, is_followed))
        of_lost = [group for found, is_followed in groups if not is_followed for group in found]
        if lost and not options:
            try:
                with self._opaque(lost):
                    return of_lost + self._graph_of(module, inputs), True
            except Exception:  # likewise
                pass
        self.refused[name or type(module).__name__] = f"torch-pruning cannot follow it ({reason})"
        return [group for found, _ in groups for group in found], False

    def _graph_of(self, module: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
        """The groups of all layers of a module."""
        import torch_pruning

        graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=inputs)
        names = {id(module): name for name, module in self._network.named_modules()}
        groups = []
        visited: set[nn.Module] = set()
        for root in list(graph.module2node):
            if root in visited or not isinstance(root, _ConvNd | nn.Linear):
                continue
            try:
                groups.append(graph.get_pruning_group(root, *_all_outputs(graph, root)))
            except Exception as error:  # likewise
                self.refused[names[id(root)]] = f"torch-pruning cannot follow its outputs ({_reason(error)})"
                visited.add(root)
                continue
            visited |= {item.dep.target.module for item in groups[-1] if _cuts_outputs(item)}
        return groups

    def _watch(self) -> None:
        """Note what each module is given and answers."""

        def note(name: str) -> Any:
            return lambda _, inputs, options, output: self._calls.update({name: (inputs, options, output)})

        modules = self._network.named_modules()
        handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules]
        try:
            with torch.no_grad():
                self._network(self._images)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _opaque(self, lost: Mapping[str, nn.Module]) -> Iterator[None]:
        """The network with other modules in the place of some, which answer the same of nothing."""
        try:
            for name in lost:
                self._network.set_submodule(name, _Opaque(self._calls[name][2]))
            yield
        finally:
            for name, module in lost.items():
                self._network.set_submodule(name, module)


class _Opaque(nn.Module):
    """Answers what another module has answered, as if it came from nowhere."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **options: Any) -> Any:
        """Answer it, with a gradient."""
        return tree_map(
            lambda one: (
                one.detach().clone().requires_grad_() if torch.is_tensor(one) and one.is_floating_point() else one
            ),
            self.output,
        )


def _all_outputs(graph: Any, root: nn.Module) -> tuple[Any, list[int]]:
    """How torch-pruning cuts the outputs of a layer, and their indices."""
    pruner = graph.get_pruner_of_module(root)
    return pruner.prune_out_channels, list(range(pruner.get_out_channels(root)))


def _cuts_outputs(item: Any) -> bool:
    return "out_channels" in item.dep.handler.__name__


def _item(item: Any, names: Mapping[int, str], tensors: Mapping[int, str], owners: Mapping[int, str]) -> _Item:
    module = item.dep.target.module
    own: dict[str, str] = {}
    if isinstance(module, nn.Module):
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        own = {name: tensors[id(tensor)] for name, tensor in held if id(tensor) in tensors}
    owner = owners.get(id(module), "")
    return _Item(
        module, names.get(id(module), ""), own, owner, _cuts_outputs(item), list(item.idxs), list(item.root_idxs)
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _coupling_of(name: str, items: Sequence[_Item], shared: Collection[str]) -> Coupling:
    """Bring one group of torch-pruning into parts; channels that must go together become one unit."""
    found: list[tuple[_Axis, np.ndarray]] = []
    for item in items:
        if item.name:
            for axis in _axes_of(item):
                if axis.tensor in shared:
                    raise NotCuttableError(f"'{axis.tensor}' is used by several layers")
                found.append((axis, _roots_of(axis, item)))
    unit_of_root = _joined(len(items[0].channels), found)
    parts: dict[tuple[str, int], Part] = {}
    for axis, root_of in found:
        unit_of = np.where(root_of == STAYS, STAYS, unit_of_root[root_of])
        if axis.folded:
            unit_of = unit_of.reshape(axis.n_groups, -1)[0]
        parts[axis.tensor, axis.axis] = Part(axis.tensor, axis.axis, unit_of, axis.reads, axis.together)
    if not any(part.reads for part in parts.values()):
        raise NotCuttableError("no layer reads them")
    n_units = int(unit_of_root.max()) + 1
    if n_units < 2:
        raise NotCuttableError("they only go all together")
    return Coupling(name, n_units, tuple(parts.values()))


def _axes_of(item: _Item) -> Iterator[_Axis]:
    """The axes of an item's tensors that a cut goes through."""
    module, name = item.module, item.name
    if isinstance(module, nn.Parameter):
        size = max(item.channels) + 1
        axes = [axis for axis, n in enumerate(module.shape) if n == size]
        if len(axes) != 1:
            raise NotCuttableError(f"no axis of the parameter '{name}' {tuple(module.shape)} is clearly theirs")
        yield _Axis(name, axes[0], size, together="norm" in item.owner.lower())
    elif isinstance(module, _ConvNd):
        yield from _axes_of_convolution(module, item.tensors, item.cuts_outputs)
    elif isinstance(module, nn.Linear):
        if item.cuts_outputs:
            yield _Axis(item.tensors["weight"], 0, module.out_features)
            if module.bias is not None:
                yield _Axis(item.tensors["bias"], 0, module.out_features)
        else:
            yield _Axis(item.tensors["weight"], 1, module.in_features, reads=True)
    elif isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise NotCuttableError(f"'{name}' normalises over more than channels")
        together = isinstance(module, nn.LayerNorm | nn.GroupNorm)
        n_groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if together and not tensors:
            raise NotCuttableError(f"'{name}' has no tensor by which its width could be told")
        for own_name, tensor in tensors:
            if tensor.ndim == 1 and len(tensor) > 1:
                yield _Axis(item.tensors[own_name], 0, len(tensor), together=together, n_groups=n_groups)
    else:
        raise NotCuttableError(f"'{name}' is a {type(module).__name__}, whose channels are not cut")


def _axes_of_convolution(module: _ConvNd, tensors: Mapping[str, str], cuts_outputs: bool) -> Iterator[_Axis]:
    transposed, depthwise = isinstance(module, _ConvTransposeNd), is_depthwise(module)
    if transposed and module.groups > 1:
        raise NotCuttableError(f"'{tensors['weight']}' is a transposed convolution in groups")
    if cuts_outputs or depthwise:
        # A group of a depthwise convolution goes as a whole.
        n_groups = 1 if depthwise else module.groups
        yield _Axis(tensors["weight"], 1 if transposed else 0, module.out_channels, n_groups=n_groups)
        if module.bias is not None:
            yield _Axis(tensors["bias"], 0, module.out_channels, n_groups=n_groups)
    else:
        folded = module.groups > 1
        yield _Axis(
            tensors["weight"],
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
        raise NotCuttableError(f"the graph does not say which channels '{axis.tensor}' has")
    if item.channels and max(item.channels) >= axis.size:
        raise NotCuttableError(
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
            raise NotCuttableError(f"'{axis.tensor}' has groups that other channels are in too")
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
