"""Latency as a cost: a table of a network's layers at their possible widths, and what it says of small networks.

A layer is timed with the batch norm and the activation that directly follow, which runtimes compute in one go. Hardware
computes channels in steps: layers are timed at both ends of some steps, so that straight lines between them are flat
where nothing is gained. Convolutions that read a multiple of 4 channels may be computed in another way than others, so
that the table has them twice; between both ways activations are laid out anew, at a price that is fitted to random
small networks (`structured/timing.py`). What is in no layer (sums, pooling, attention's products) is the table's
constant, and a line is fitted likewise.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paretoprune.copies import copied
from paretoprune.deployment.blocks import Block
from paretoprune.deployment.latency import LatencyTable, Widths
from paretoprune.masks.packed import PackedMasks
from paretoprune.networks.tracing import Convolution, NotTraceableError, trace
from paretoprune.networks.watching import run_watched
from paretoprune.shapes import is_depthwise, with_tensors
from paretoprune.structured.units import ChannelUnits, Sizes

# Steps at whose ends layers are timed: as wide as vector registers, wider ones where there would be more steps than
# this for a layer that is cut along one axis, or along two.
STEP, NARROW_STEP, NARROW = 16, 8, 32
MOST_STEPS = 4, 2
# Convolutions that read a multiple of so many channels may be computed in another way than others.
ALIGNED, READING = 4, " reading "
REMEDY = "measure_latency(network, units, image, runtime)"
_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
_ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU)


@dataclass(frozen=True)
class Layer:
    """One call of a layer, as a table of latencies knows it.

    Attributes:
        name: Name of the layer, and all that its time depends on: a table of another network has no such block.
        axes: The axes of its weight that its widths are counted on, by tensor and axis.
        points: For each of them the widths to time, the widest first; a single one where it is never cut.
        aligned: Whether the first width is a multiple of `ALIGNED`, or is none; None where that makes no difference.
            Otherwise another layer of the table stands for the same call.
        module: The layer itself.
        followers: The batch norm and the activation behind it, where there are any.
        inputs: Shape of what it is given for one image.
        n_made: Numbers that it makes of it.
        kind: All that its time depends on.
    """

    name: str
    axes: tuple[tuple[str, int], ...]
    points: tuple[tuple[int, ...], ...]
    aligned: bool | None
    module: nn.Module = field(repr=False)
    followers: tuple[nn.Module, ...]
    inputs: tuple[int, ...]
    n_made: int
    kind: str

    @property
    def block(self) -> Block:
        """What is timed; layers of one kind that can have the same widths are timed once."""
        # Where it is not the one that stands for the whole network, another is.
        stands = bool(self.stands_for(np.array([self.module.get_parameter("weight").shape[self.axes[0][1]]]))[0])
        return Block(self.name, tuple(product(*self.points)), self.build, f"{self.kind} at {self.points}", stands)

    def stands_for(self, widths: np.ndarray) -> np.ndarray:
        """Whether it is this one that stands for the call where the first width is this, bool (n,)."""
        if self.aligned is None:
            return np.ones(len(widths), dtype=bool)
        return np.asarray((widths % ALIGNED == 0) == self.aligned)

    def build(self, widths: Widths) -> tuple[nn.Module, Tensor]:
        """The layer at some widths, its first channels, and inputs for one image."""
        layer, whole = self.module, self.module.get_parameter("weight").detach()
        weight = whole
        for (_, axis), width in zip(self.axes, widths, strict=True):
            weight = weight.narrow(axis, 0, width)
        transposed = isinstance(layer, _ConvTransposeNd)
        n_made = weight.shape[1] * layer.groups if isinstance(layer, _ConvTransposeNd) else weight.shape[0]
        if isinstance(layer, _ConvNd):
            read = 0 if transposed or is_depthwise(layer) else 1
            n_read = layer.in_channels * weight.shape[read] // whole.shape[read]
            shape = (self.inputs[0], n_read, *self.inputs[2:])
        else:
            shape = (*self.inputs[:-1], weight.shape[1])
        built = copied(nn.Sequential(layer, *self.followers))
        tensors = {**dict(built.named_parameters()), **dict(built.named_buffers())}
        smaller: dict[str, Tensor | None] = {"0.weight": weight}
        for name, tensor in tensors.items():
            # Biases, and all that a norm has.
            if name != "0.weight" and tensor.ndim == 1 and len(tensor) > 1:
                smaller[name] = tensor.detach().narrow(0, 0, n_made)
        built = with_tensors(built, smaller)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if shape[0] != 1:
            # Windows or tokens of one image that lie along the batch.
            return nn.Sequential(nn.Flatten(0, 1), built), images[None]
        return built, images


def layers_of(network: nn.Module, units: ChannelUnits, image: Tensor) -> tuple[Layer, ...]:
    """The convolutions and linear layers of a network, once for each time that they run.

    Args:
        network: The whole network, in evaluation mode; it is left as it is.
        units: What can be cut.
        image: One image (1, ...), normalised.
    """
    network = copied(network).cpu().float().eval()
    modules, followers = dict(network.named_modules()), _followers(network)
    grids = _Grids(units, network)
    seen: Counter[str] = Counter()
    layers = []
    for name, inputs, n_made in _calls(network, image.cpu().float()):
        module = modules[name]
        weight = f"{name}.weight".removeprefix(".")
        behind = tuple(followers.get(name, ()))
        one_axis = isinstance(module, _ConvNd) and is_depthwise(module)
        makes, reads = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
        axes = ((weight, makes),) if one_axis else ((weight, reads), (weight, makes))
        seen[name] += 1
        place = name if seen[name] == 1 else f"{name} ({seen[name]})"
        kind = f"{module} of {'x'.join(map(str, inputs))}" + "".join(f", {type(one).__name__}" for one in behind)
        most = MOST_STEPS[sum(grids.can_be_cut(*axis) for axis in axes) > 1]
        others = [grids.of(*axis, most) for axis in axes[1:]]
        told = isinstance(module, _ConvNd) and module.in_channels > ALIGNED
        for aligned in (True, False) if told else (None,):
            points = grids.of(*axes[0], most, aligned), *others
            reading = "" if aligned is None else f"{READING}{'a' if aligned else 'no'} multiple of {ALIGNED}"
            if points[0]:
                layers.append(
                    Layer(f"{place}{reading}: {kind}", axes, points, aligned, module, behind, inputs, n_made, kind)
                )
    return tuple(layers)


class _Grids:
    """Widths at which axes of a network's tensors are timed."""

    def __init__(self, units: ChannelUnits, network: nn.Module) -> None:
        self._shapes = {name: tensor.shape for name, tensor in network.named_parameters()}
        # How many entries go with each unit.
        self._entries: dict[tuple[str, int], list[np.ndarray]] = {}
        for coupling in units.couplings:
            for part in coupling.parts:
                counted = np.bincount(part.unit_of[part.unit_of >= 0])
                self._entries.setdefault((part.tensor, part.axis), []).append(counted[counted > 0])

    def can_be_cut(self, tensor: str, axis: int) -> bool:
        """Whether it has more than one width."""
        return (tensor, axis) in self._entries

    def of(self, tensor: str, axis: int, most_steps: int, aligned: bool | None = None) -> tuple[int, ...]:
        """Widths, the widest first, of all or of those that are aligned or not: both ends of at most so many steps."""
        size = self._shapes[tensor][axis]
        able = np.array([size])
        if self.can_be_cut(tensor, axis):
            entries = np.concatenate(self._entries[tensor, axis])
            # Entries that go with one unit, and those that go with none.
            unit, fixed = int(np.gcd.reduce(entries)), size - int(entries.sum())
            able = np.arange(fixed or unit, size + 1, unit)
        if aligned is not None:
            able = able[(able % ALIGNED == 0) == aligned]
        step = STEP if size > NARROW else NARROW_STEP
        while -(-size // step) > most_steps:
            step *= 2
        found = set(able[[0, -1]].tolist()) if len(able) else set()
        for end in range(step, size, step):
            found |= {*able[able <= end][-1:].tolist(), *able[able > end][:1].tolist()}
        return tuple(sorted(found, reverse=True))


def _calls(network: nn.Module, image: Tensor) -> list[tuple[str, tuple[int, ...], int]]:
    """The layers that run, in their order, the shape of what each is given for one image, and how much it makes."""
    found: list[tuple[str, tuple[int, ...], int]] = []

    def see(name: str, layer: nn.Module, inputs: tuple[Any, ...], _: Mapping[str, Any], output: Tensor) -> None:
        shape = tuple(inputs[0].shape)
        # Of a single image without a batch a convolution's channels would be first.
        if not isinstance(layer, _ConvNd) or len(shape) == layer.weight.ndim:
            found.append((name, shape, output.numel()))

    def has_weight(module: nn.Module) -> bool:
        return isinstance(module, _ConvNd | nn.Linear) and "weight" in dict(module.named_parameters(recurse=False))

    run_watched(network, image, has_weight, see)
    return found


def _followers(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The batch norm and the activation that directly follow each layer; nothing where the network is not traced."""
    try:
        program = trace(network)
    except NotTraceableError:
        return {}
    modules = dict(program.network.named_modules())
    found = {}
    for step in program.steps:
        if isinstance(step, Convolution):
            name, end = step.module, step.output
            behind = [modules[step.norm]] if step.norm is not None else []
            behind += [nn.ReLU()] if step.relu else []
        elif step.output.op == "call_module":
            name, end, behind = str(step.output.target), step.output, []
        else:
            continue
        following = _only_user(end)
        if not behind and following is not None and following.op == "call_module":
            norm = modules[str(following.target)]
            if isinstance(norm, _BatchNorm) and norm.num_features > 1:
                behind, following = [norm], _only_user(following)
        if not any(isinstance(one, nn.ReLU) for one in behind):
            behind += _activation(following, modules)
        found[name] = behind
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    if node is None:
        return []
    if node.op == "call_module":
        module = modules[str(node.target)]
        return [module] if isinstance(module, _ACTIVATION_MODULES) else []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return [_ACTIVATIONS[name]()] if name in _ACTIVATIONS else []


@dataclass(frozen=True)
class LatencyCost:
    """What a table says of the time of small networks, relative to the whole one.

    Attributes:
        sizes: How large their tensors are.
        layers: Of the whole network.
        table: With a block for each of them.
        name: Name of the objective.
    """

    sizes: Sizes
    layers: tuple[Layer, ...]
    table: LatencyTable
    name: str = "latency"

    @classmethod
    def of_network(cls, network: nn.Module, units: ChannelUnits, image: Tensor, table: LatencyTable) -> "LatencyCost":
        """The cost for a network and its units.

        Args:
            network: The whole network, in evaluation mode; it is left as it is.
            units: What can be cut.
            image: One image (1, ...), normalised.
            table: Measured for this network.

        Raises:
            ValueError: The table was measured for another network, or for fewer widths.
        """
        layers = layers_of(network, units, image)
        check_layers(table, layers)
        return cls(Sizes(units, copied(network)), layers, table)

    def seconds(self, masks: PackedMasks) -> np.ndarray:
        """Predicted times of a batch, float64 (n_masks,)."""
        # A table may tell apart what is never cut here.
        widths = {
            name: np.zeros((len(masks), len(grid.axes)), dtype=np.int64) for name, grid in self.table.grids.items()
        }
        return self.table.predict_all(widths | self._widths(masks))

    def laid_out_anew(self, masks: PackedMasks) -> np.ndarray:
        """Numbers made of an image, when whole, by what reads no multiple of 4 channels, float64 (n_masks,)."""
        total = np.zeros(len(masks))
        widths = self._widths(masks)
        for layer in self.layers:
            if layer.aligned is False:
                total += layer.n_made * widths[layer.name].all(axis=1)
        return total

    def _widths(self, masks: PackedMasks) -> dict[str, np.ndarray]:
        """Widths of each layer, int64 (n_masks, n_axes)."""
        kept = self.sizes.kept(masks)
        widths = {}
        for layer in self.layers:
            each = [np.broadcast_to(kept.get(axis, self._size(axis)), len(masks)) for axis in layer.axes]
            found = np.rint(np.stack(each, axis=1)).astype(np.int64)
            # Where it does not stand for the call, it is not there.
            widths[layer.name] = found * layer.stands_for(found[:, 0])[:, None]
        return widths

    def of(self, masks: PackedMasks) -> np.ndarray:
        """Relative times, float64 (n_masks,), 1 for the whole network."""
        # The line may lead below nothing for a network of which hardly anything is left.
        return np.maximum(self.seconds(masks), 0.0) / self.whole

    @cached_property
    def whole(self) -> float:
        """Predicted time of a batch by the whole network, in seconds."""
        n_units = self.sizes.units.n_units
        return float(self.seconds(PackedMasks.pack_each([np.ones(n_units, dtype=bool)], n_units))[0])

    def _size(self, axis: tuple[str, int]) -> float:
        return float(self.sizes.shapes[axis[0]][axis[1]])


def check_layers(table: LatencyTable, layers: Sequence[Layer]) -> None:
    """Refuse a table of another network.

    Raises:
        ValueError: Its blocks are not the layers, or it knows fewer widths of one.
    """
    known, expected = {_call(name) for name in table.blocks}, {_call(layer.name) for layer in layers}
    odd = sorted(known ^ expected)
    if odd:
        raise ValueError(
            f"the latency table was measured for another network: expected {len(expected)} layers and their shapes, "
            f"found {len(known)} of which {len(known & expected)} fit, not '{odd[0]}'; measure this network: `{REMEDY}`"
        )
    for layer in layers:
        axes = table.grids[layer.name].axes if layer.name in table.grids else ()
        holds = [
            axis[0] <= points[-1] and axis[-1] >= points[0] for axis, points in zip(axes, layer.points, strict=False)
        ]
        if not holds or not all(holds):
            raise ValueError(
                f"the latency table was measured for other widths: expected {_spans(layer.points)} for '{layer.name}', "
                f"found {_spans([axis[::-1].tolist() for axis in axes])}, as where more layers are excluded; measure "
                f"anew: `{REMEDY}`"
            )


def _call(name: str) -> str:
    """The name of a block without what it says of alignment."""
    place, colon, kind = name.partition(":")
    return f"{place.partition(READING)[0]}{colon}{kind}"


def _spans(points: Sequence[Sequence[int]]) -> str:
    return " x ".join(f"{each[-1]} to {each[0]}" for each in points) or "none"
