"""From a dense network to what the fused path runs: steps, the places of prunable weights, cuts, sums in place.

A network is traced (`networks.tracing`), and run once on a few images to see shapes, types and memory. What is found is
frozen: candidates change weights and statistics, never the program.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.evaluation.kernels import Kernels
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import has_running_statistics
from paretoprune.networks.tracing import Call, Convolution, Cut, NotTraceableError, Program, reads, run_call, trace
from paretoprune.repair.batchnorm import Moments

# Where activations are worth keeping for children that differ later on: shares of the network's arithmetic.
CUT_SHARES = (1 / 3, 2 / 3, 5 / 6)
# How far a cut may lie from its share.
CUT_TOLERANCE = 0.15

Registers = dict[fx.Node, Any]


@dataclass(frozen=True)
class CompiledNetwork:
    """A dense network as the fused path runs it.

    Attributes:
        steps: In the order in which they run.
        image: Where the images come in.
        answer: Where the logits come out.
        modules: By name, on the device; those that calls run hold tensors in the type to compute in. A copy.
        network: The same, as one module.
        prunable: Place in the layout of each convolution's weight, by the convolution's name; None where it is not
            pruned. A weight that two layers share has one place.
        called: Tensors that calls read, each with the place in the layout that it is filled from.
        dense: float32 (n_weights,), the trained weights in mask order.
        fixed: Weights of convolutions that are not pruned, float32, by name.
        trained: Running mean and variance of each batch norm, by name.
        fitting: Steps whose two summands have one shape and type, so that a kernel can add them.
        overwriting: Those of them that may write the sum over their shortcut, as nobody reads it again.
        cuts: Where activations can be kept, first to last.
        unused: Names of prunable tensors that no step from an index on reads, by the index after each cut.
    """

    steps: tuple[Convolution | Call, ...]
    image: fx.Node
    answer: fx.Node
    modules: Mapping[str, nn.Module]
    network: nn.Module
    prunable: Mapping[str, int | None]
    called: tuple[tuple[Tensor, int], ...]
    dense: Tensor
    fixed: Mapping[str, Tensor]
    trained: Mapping[str, Moments]
    fitting: frozenset[int]
    overwriting: frozenset[int]
    cuts: tuple[Cut, ...]
    unused: Mapping[int, frozenset[str]]


def compile_network(network: nn.Module, layout: WeightUnits, sample: Tensor, kernels: Kernels) -> CompiledNetwork:
    """Turn a dense network into what the fused path runs.

    Args:
        network: The trained dense network, in evaluation mode; it is left as it is.
        layout: Where its prunable weights lie in a mask.
        sample: Two images (2, c, h, w) as it will be given, on the device and in the type to compute in.
        kernels: What convolves.

    Raises:
        NotTraceableError: The network cannot be turned into a program; the message says why.
    """
    program = trace(network)
    work = program.network.to(sample.device)
    modules: dict[str, Any] = dict(work.named_modules())
    parameters = dict(work.named_parameters())
    places = {id(parameters[name]): i for i, name in enumerate(layout.names)}
    convolutions = [step.module for step in program.steps if isinstance(step, Convolution)]
    prunable = {name: places.get(id(modules[name].weight)) for name in convolutions}
    # Before calls get their tensors in the type to compute in: these are the trained weights, unrounded.
    with torch.no_grad():
        dense = torch.cat([parameters[name].detach().float().reshape(-1) for name in layout.names])
        fixed: dict[str, Tensor] = {
            n: modules[n].weight.detach().float().clone() for n in convolutions if prunable[n] is None
        }
    called = _give_types(program, modules, places, sample.dtype)
    trained = {
        name: (module.running_mean.float().clone(), module.running_var.float().clone())
        for name, module in modules.items()
        if has_running_statistics(module)
    }

    def weight_of(name: str) -> Tensor:
        place = prunable[name]
        if place is None:
            return fixed[name]
        start, stop = layout.offsets[place : place + 2].tolist()
        return dense[start:stop].view(layout.shapes[place])

    with torch.inference_mode():
        folded = {
            i: kernels.fold(
                modules[step.module],
                weight_of(step.module),
                None if step.norm is None else modules[step.norm],
                None if step.norm is None else trained[step.norm],
            )
            for i, step in enumerate(program.steps)
            if isinstance(step, Convolution)
        }
        found = _inspect(program, modules, kernels, folded, sample)

    def read_by(steps: Sequence[Convolution | Call]) -> frozenset[str]:
        return _prunable_tensors(steps, layout, prunable, modules, called, work)

    cuts = _choose_cuts(program.steps, found, read_by)
    return CompiledNetwork(
        steps=tuple(program.steps),
        image=program.image,
        answer=program.answer,
        modules=modules,
        network=work,
        prunable=prunable,
        called=tuple(called),
        dense=dense,
        fixed=fixed,
        trained=trained,
        fitting=found.fitting,
        overwriting=found.overwriting,
        cuts=tuple(cuts),
        # What runs before a cut may run after it too.
        unused={cut.after + 1: cut.parameters - read_by(program.steps[cut.after + 1 :]) for cut in cuts},
    )


def _give_types(
    program: Program, modules: Mapping[str, Any], places: Mapping[int, int], dtype: torch.dtype
) -> list[tuple[Tensor, int]]:
    """Give what calls use its type, and find the prunable tensors that they read.

    Args:
        program: The traced network; its tensors are changed.
        modules: Of its network, by name.
        places: Place in the layout by the identity of a tensor.
        dtype: Type to compute in.

    Returns:
        Pairs of a tensor that a call reads and the place in the layout that it is filled from.

    Raises:
        NotTraceableError: One tensor would need two types.
    """
    types: dict[int, torch.dtype] = {}
    used: dict[int, Tensor] = {}
    for step in program.steps:
        if not isinstance(step, Call):
            continue
        node, wanted = step.output, torch.float32 if step.tail else dtype
        if node.op == "call_module":
            module = modules[str(node.target)]
            # Statistics rounded to bfloat16 would shift every activation; normalisation mixes the two types.
            keeps_float32 = isinstance(module, _BatchNorm)
        elif node.op == "get_attr":
            readers = [s for s in program.steps if isinstance(s, Call) and node in s.output.all_input_nodes]
            wanted = torch.float32 if all(reader.tail for reader in readers) else dtype
            keeps_float32 = False
        else:
            continue
        for tensor in _tensors_of(node, modules, program.network):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or keeps_float32:
                continue
            if types.setdefault(id(tensor), wanted) != wanted:
                raise NotTraceableError("a weight is shared by layers that compute in different types")
            used[id(tensor)] = tensor
    for key, tensor in used.items():
        tensor.data = tensor.data.to(types[key])
    return [(tensor, places[key]) for key, tensor in used.items() if key in places]


def _tensors_of(node: fx.Node, modules: Mapping[str, Any], network: nn.Module) -> list[Any]:
    """What the network holds and a call reads: parameters and buffers of a module, or an attribute."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return [*module.parameters(), *module.buffers()]
    return [operator.attrgetter(str(node.target))(network)] if node.op == "get_attr" else []


# Names of the prunable tensors that some steps read.
ReadBy = Callable[[Sequence[Convolution | Call]], frozenset[str]]


@dataclass(frozen=True)
class _Found:
    """What one run shows.

    Attributes:
        fitting, overwriting: See `CompiledNetwork`.
        work: Arithmetic of each step, in products for one image.
        alone: Steps after which one tensor holds all that the rest needs: index, its node, its shape for one image.
    """

    fitting: frozenset[int]
    overwriting: frozenset[int]
    work: list[float]
    alone: list[tuple[int, fx.Node, tuple[int, ...]]]


def _inspect(
    program: Program,
    modules: Mapping[str, nn.Module],
    kernels: Kernels,
    folded: Mapping[int, tuple[Tensor, Tensor | None]],
    sample: Tensor,
) -> _Found:
    """Run the dense network once, step by step, and look at what the registers hold.

    Raises:
        NotTraceableError: The answer is no matrix, or a convolution is given something else than images.
    """
    fitting: set[int] = set()
    overwriting: set[int] = set()
    work: list[float] = []
    alone: list[tuple[int, fx.Node, tuple[int, ...]]] = []
    registers: Registers = {program.image: sample}
    network = program.network
    # Memory that outlives a candidate: nothing may be written into it.
    own = {t.untyped_storage().data_ptr() for t in [sample, *network.parameters(), *network.buffers()]}
    for index, step in enumerate(program.steps):
        work.append(0.0)
        if isinstance(step, Convolution):
            module, x = modules[step.module], registers[step.input]
            if x.ndim != 4 or x.dtype != kernels.dtype:
                raise NotTraceableError(f"'{step.module}' convolves something else than batches of images")
            y = kernels.convolve(module, x, *folded[index], relu=False)
            # Products for one image: each number of the output is a sum over one row of the weights.
            work[-1] = y[0].numel() * prod(module.get_parameter("weight").shape[1:])
            if step.other is not None:
                if _fits(registers[step.other], y):
                    fitting.add(index)
                    if _may_be_overwritten(step, registers, own):
                        overwriting.add(index)
                y = y + registers[step.other]
            registers[step.output] = y.relu_() if step.relu else y
        else:
            registers[step.output] = run_call(step, registers, network)
        for node in step.dead:
            del registers[node]
        # A cut wants one live tensor, and nobody later on who looks at the images themselves.
        live = [node for node in registers if node is not program.image]
        reads_image = any(program.image in reads(later) for later in program.steps[index + 1 :])
        if len(live) == 1 and not reads_image and isinstance(registers[live[0]], Tensor):
            held = registers[live[0]]
            if held.ndim == 4 and held.dtype == kernels.dtype:
                alone.append((index, live[0], tuple(held.shape[1:])))
    answer = registers[program.answer]
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(sample):
        raise NotTraceableError("its output is no matrix of logits")
    return _Found(frozenset(fitting), frozenset(overwriting), work, alone)


def _fits(other: Any, y: Tensor) -> bool:
    """Whether a kernel can add the two: a sum that broadcasts, or mixes types, is left to torch."""
    return isinstance(other, Tensor) and other.shape == y.shape and other.dtype == y.dtype


def _may_be_overwritten(step: Convolution, registers: Registers, own: set[int]) -> bool:
    """Whether a sum may be written over its shortcut.

    Only if nobody reads the shortcut again, neither by its name nor through a view of its memory, and if it lies in
    memory as the kernel writes it.
    """
    assert step.other is not None
    other: Tensor = registers[step.other]
    kept = [v for n, v in registers.items() if n not in step.dead and isinstance(v, Tensor)]
    busy = own | {v.untyped_storage().data_ptr() for v in kept}
    return (
        step.other in step.dead
        # The convolution would read what it has just written.
        and step.other is not step.input
        and other.untyped_storage().data_ptr() not in busy
        and other.is_contiguous(memory_format=torch.channels_last)
    )


def _choose_cuts(steps: Sequence[Convolution | Call], found: _Found, read_by: ReadBy) -> list[Cut]:
    """The places nearest to `CUT_SHARES` of the network's arithmetic."""
    total = sum(found.work)
    if not total:
        return []
    shares = torch.tensor(found.work).double().cumsum(0) / total
    chosen: dict[int, Cut] = {}
    norms = [step.norm for step in steps]
    # A batch norm is corrected where it runs first, which must not depend on where a candidate begins.
    alone = [entry for entry in found.alone if not {*norms[: entry[0] + 1]} & {*norms[entry[0] + 1 :]} - {None}]
    for wanted in CUT_SHARES:
        # Of places with the same share the smallest tensor; the last steps before a convolution cost nothing.
        near = [(abs(float(shares[i]) - wanted), prod(shape), i, node, shape) for i, node, shape in alone]
        near = [entry for entry in near if entry[0] < CUT_TOLERANCE]
        if near:
            _, _, index, node, shape = min(near, key=lambda entry: entry[:3])
            chosen[index] = Cut(index, node, shape, read_by(steps[: index + 1]), float(shares[index]))
    return [chosen[index] for index in sorted(chosen)]


def _prunable_tensors(
    steps: Sequence[Convolution | Call],
    layout: WeightUnits,
    prunable: Mapping[str, int | None],
    modules: Mapping[str, Any],
    called: Sequence[tuple[Tensor, int]],
    network: nn.Module,
) -> frozenset[str]:
    """Names of the prunable tensors that some steps read."""
    found: set[str] = set()
    for step in steps:
        if isinstance(step, Convolution):
            place = prunable[step.module]
            found.update([] if place is None else [layout.names[place]])
        else:
            ids = {id(tensor) for tensor in _tensors_of(step.output, modules, network)}
            found.update(layout.names[place] for tensor, place in called if id(tensor) in ids)
    return frozenset(found)
