"""From a network to a short program: a convolution with its batch norm, sum and ReLU is one step, the rest is as it is.

`torch.fx` traces the network. A network that cannot be traced (its control flow depends on the images, or it reads what
it has changed in place) is refused with the reason. The caller then evaluates it layer by layer.
"""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.networks.architectures import has_running_statistics


class NotTraceableError(Exception):
    """A network cannot be turned into a program; the message says why."""


@dataclass
class Convolution:
    """One convolution with what follows it: relu(norm(convolution(input)) + other), as far as present.

    Attributes:
        output: The node whose value this step computes.
        input: The node that is convolved.
        other: The node that is added (the shortcut), or None.
        module: Name of the convolution.
        norm: Name of its batch norm, or None.
        relu: Whether negative values become 0.
        dead: Nodes that no later step reads.
    """

    output: fx.Node
    input: fx.Node
    other: fx.Node | None
    module: str
    norm: str | None
    relu: bool
    dead: list[fx.Node] = field(default_factory=list)


@dataclass
class Call:
    """Anything else: a module, function or method, called as the network calls it.

    Attributes:
        output: The traced node, whose value this step computes.
        norm: Name of the module if it is a batch norm with running statistics that is not part of a `Convolution`.
        tail: Whether no convolution depends on it, so that float32 costs nothing.
        dead: Nodes that no later step reads.
    """

    output: fx.Node
    norm: str | None
    tail: bool
    dead: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Cut:
    """A place in a program where one tensor holds all that the later steps read.

    Attributes:
        after: Index of the last step before the cut.
        register: The tensor's node.
        shape: Its shape for one image.
        parameters: Names of the weights that the steps before the cut use.
        share: Share of the convolutions' arithmetic that lies before the cut, 0 to 1.
    """

    after: int
    register: fx.Node
    shape: tuple[int, ...]
    parameters: frozenset[str]
    share: float


@dataclass
class Program:
    """A network as a sequence of steps.

    Attributes:
        steps: In the order in which they run.
        image: The node of the images.
        answer: The node of the logits.
        network: The traced network, for the modules and tensors that calls need; its own copy.
    """

    steps: list[Convolution | Call]
    image: fx.Node
    answer: fx.Node
    network: nn.Module


_RELU = (functional.relu, torch.relu, torch.relu_, functional.relu_)
_ADD = (operator.add, torch.add, operator.iadd)
# Functions that change their first argument, and their out-of-place forms.
_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    functional.relu_: functional.relu,
}
# Functions and methods whose result is surely a new tensor. Any other may return a view of its first argument.
_NEW_TENSOR_FUNCTIONS = frozenset(_OUT_OF_PLACE.values())
_NEW_TENSOR_NAMES = frozenset(
    (
        *("add", "sub", "mul", "div", "truediv", "matmul", "bmm", "mm", "cat", "stack", "clone", "pad", "_pad"),
        *("relu", "sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "softmax"),
        *("conv1d", "conv2d", "linear", "batch_norm", "group_norm", "layer_norm", "mean", "sum", "amax", "log_softmax"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "boolean_dispatch", "interpolate"),
    )
)
_VIEWING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def trace(network: nn.Module) -> Program:
    """Turn a network in evaluation mode into a program.

    Args:
        network: Takes images (n, c, h, w) as its only argument; it is left as it is.

    Raises:
        NotTraceableError: Control flow, several inputs, in-place changes that are read elsewhere, or an output that is
            no single tensor.
    """
    network = copy.deepcopy(network).eval()
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotTraceableError(f"'{name}' has forward hooks")
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever the network's own code raises when it meets a symbol instead of a tensor
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotTraceableError(f"its forward cannot be traced ({reason})") from error
    images = [node for node in graph.nodes if node.op == "placeholder"]
    if len(images) != 1:
        raise NotTraceableError(f"its forward takes {len(images)} arguments instead of one")
    answer = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(answer, fx.Node):
        raise NotTraceableError("its output is not a single tensor")
    modules = dict(network.named_modules())
    _make_out_of_place(list(graph.nodes), modules)
    steps = _fuse([node for node in graph.nodes if node.op not in ("placeholder", "output")], modules)
    _mark_tail(steps)
    _mark_dead(steps, answer, images[0])
    return Program(steps, images[0], answer, network)


class _Tracer(fx.Tracer):
    """Traces down to torch's own layers and to every subclass of batch norm, which repairs look for."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _make_out_of_place(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> None:
    """Replace in-place operations by their out-of-place forms.

    Args:
        nodes: Of the graph, in the order in which they run.
        modules: By name; their `inplace` flags are cleared.

    Raises:
        NotTraceableError: A later node reads a tensor that was changed in place, or there is no out-of-place form.
    """
    order = {node: i for i, node in enumerate(nodes)}
    changing = {name for name, module in modules.items() if getattr(module, "inplace", False)}
    changes: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        in_place = False
        if node.op == "call_function":
            if node.target in _OUT_OF_PLACE:
                node.target, in_place = _OUT_OF_PLACE[node.target], True
            if node.kwargs.get("inplace"):
                node.kwargs, in_place = {**node.kwargs, "inplace": False}, True
            if node.kwargs.get("out") is not None or node.target in (operator.setitem, setattr):
                raise NotTraceableError(f"it writes into a tensor ('{node.name}')")
        elif node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
            node.target, in_place = str(node.target).removesuffix("_"), True
            if not hasattr(torch.Tensor, str(node.target)) or node.target in ("copy", "zero", "fill", "set"):
                raise NotTraceableError(f"it changes a tensor in place ('{node.name}')")
        elif node.op == "call_module" and node.target in changing:
            modules[str(node.target)].inplace, in_place = False, True  # type: ignore[assignment]
        if in_place and node.args and isinstance(node.args[0], fx.Node):
            changes.append((node, node.args[0]))
    # The out-of-place form leaves its argument unchanged, so no later node may read the argument or an alias of it. A
    # node that reads the result of the operation gets the changed values in either form: results count as no aliases.
    results = {node for node, _ in changes}
    storages = {node: _storage(node, modules, results) for node in nodes}
    for node, changed in changes:
        aliases = [other for other in nodes if storages[other] is storages[changed]]
        if any(order[user] > order[node] for alias in aliases for user in alias.users):
            raise NotTraceableError(f"'{node.name}' changes a tensor in place that is read again")


def _storage(node: fx.Node, modules: dict[str, nn.Module], results: set[fx.Node]) -> fx.Node:
    """The node whose memory a node may be a view of: itself if it is one of `results` or surely a new tensor."""
    while node not in results and node.args and isinstance(node.args[0], fx.Node):
        if node.op == "call_module":
            is_new = not isinstance(modules[str(node.target)], _VIEWING_MODULES)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            is_new = (node.op == "call_function" and node.target in _NEW_TENSOR_FUNCTIONS) or name in _NEW_TENSOR_NAMES
        if is_new:
            break
        node = node.args[0]
    return node


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads `node`, None if several or none do."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_relu(node: fx.Node | None, modules: dict[str, nn.Module]) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELU) or (node.op == "call_method" and node.target == "relu")


def _other_summand(node: fx.Node | None, summand: fx.Node) -> fx.Node | None:
    """The other summand if `node` is the plain sum of `summand` and another node, otherwise None."""
    is_add = node is not None and (
        (node.op == "call_function" and node.target in _ADD) or (node.op == "call_method" and node.target == "add")
    )
    if node is None or not is_add or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    return second if first is summand else first


def _is_plain_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = modules[str(node.target)]
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _ends_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a convolution, or the batch norm of one."""
    if node.op == "call_module" and type(modules[str(node.target)]) is nn.BatchNorm2d and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return _is_plain_convolution(node, modules)


def _fuse(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> list[Convolution | Call]:
    """Make one step of each chain that starts with a convolution, and one of every other node.

    Args:
        nodes: Of the graph, in the order in which they run.
        modules: By name.

    Returns:
        The steps, in an order in which everything is computed before it is read.
    """
    order = {node: i for i, node in enumerate(nodes)}
    fused_into: dict[fx.Node, fx.Node] = {}
    chains: dict[fx.Node, Convolution] = {}
    for node in nodes:
        if not _is_plain_convolution(node, modules):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        end, norm, other = node, None, None
        following = _only_user(end)
        if following is not None and following.op == "call_module":
            target = str(following.target)
            if type(modules[target]) is nn.BatchNorm2d and has_running_statistics(modules[target]):
                fused_into[end], end, norm = following, following, target
                following = _only_user(end)
        summand = _other_summand(following, end)
        # Of two convolutions the later one takes their sum: only there has the other been computed.
        belongs_to_other = summand is not None and _ends_convolution(summand, modules) and order[summand] > order[node]
        if following is not None and summand is not None and not belongs_to_other:
            fused_into[end], end, other = following, following, summand
            following = _only_user(end)
        relu = _is_relu(following, modules)
        if relu:
            assert following is not None
            fused_into[end], end = following, following
        chains[end] = Convolution(end, source, other, str(node.target), norm, relu)
    steps: list[Convolution | Call] = []
    for node in nodes:
        # A chain runs at the place of its last node, where everything that it reads has been computed.
        if node in chains:
            steps.append(chains[node])
        elif node not in fused_into:
            module = modules[str(node.target)] if node.op == "call_module" else None
            unfused = module is not None and has_running_statistics(module)
            steps.append(Call(node, str(node.target) if unfused else None, tail=False))
    return steps


def reads(step: Convolution | Call) -> list[fx.Node]:
    """The nodes that a step reads."""
    if isinstance(step, Call):
        return step.output.all_input_nodes
    return [step.input] + ([step.other] if step.other is not None else [])


def _mark_tail(steps: list[Convolution | Call]) -> None:
    """Mark the calls on whose result no convolution depends, directly or through other calls."""
    needed: set[fx.Node] = set()
    for step in reversed(steps):
        if isinstance(step, Convolution) or step.output in needed:
            needed.update(reads(step))
        else:
            step.tail = True


def _mark_dead(steps: list[Convolution | Call], answer: fx.Node, image: fx.Node) -> None:
    """Note at each step the nodes that it mentions last, so that their memory can be freed or used again."""
    seen = {answer, image}  # the logits are returned, the images belong to the caller
    # From the end: the first mention met is the last one in the order of the program.
    for step in reversed(steps):
        mentioned = [*reads(step), step.output]
        step.dead = [node for node in dict.fromkeys(mentioned) if node not in seen]
        seen.update(mentioned)


def run_call(call: Call, registers: dict[fx.Node, Any], network: nn.Module) -> Any:
    """Run a call on the values of the nodes that it reads; in the tail, floating-point arguments become float32.

    Args:
        call: The step.
        registers: Values of nodes that have been computed.
        network: The program's network.

    Returns:
        What the module, function or method returns, usually a tensor.
    """

    def value(node: fx.Node) -> Any:
        held = registers[node]
        return held.float() if call.tail and isinstance(held, Tensor) and held.is_floating_point() else held

    node = call.output
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(network)
    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    if node.op == "call_module":
        return network.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
