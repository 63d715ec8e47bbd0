"""From a network to a short program: convolution, batch norm, sum and ReLU as one step each, the rest as it is.

`torch.fx` traces the network; what it cannot trace (control flow that depends on the images, and in-place changes that
somebody reads) is refused with the reason, and the caller evaluates the network layer by layer instead.
"""

import copy
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.copies import copied
from paretoprune.networks.architectures import has_running_statistics
from paretoprune.networks.wrapping import adaptation_of, copy_inputs, hooks_of, logarithm_of, logits_of
from paretoprune.shapes import Emptied


class NotTraceableError(Exception):
    """A network cannot be turned into a program; the message says why."""


@dataclass
class Convolution:
    """One convolution with what follows it: relu(norm(convolution(input)) + other), as far as present.

    Attributes:
        output: Where the result goes.
        input: What is convolved.
        other: What is added, or None.
        module: Name of the convolution.
        norm: Name of its batch norm, or None.
        relu: Whether negative values become 0.
        dead: What nobody needs after this step.
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
        output: The traced node.
        norm: Name of the module if it is a batch norm with running statistics that no convolution has taken in.
        tail: Whether no convolution follows, so that float32 costs nothing.
        dead: What nobody needs after this step.
    """

    output: fx.Node
    norm: str | None
    tail: bool
    dead: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Cut:
    """A place in a program where one tensor holds all that the rest needs.

    Attributes:
        after: Index of the last step before the cut.
        register: The tensor's node.
        shape: Its shape for one image.
        parameters: Names of the weights that the steps up to here use.
        share: Share of the convolutions' arithmetic that lies before it.
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
        image: Where the images come in.
        answer: Where the logits come out.
        network: The traced network, for the modules and tensors that calls need; its own copy.
    """

    steps: list[Convolution | Call]
    image: fx.Node
    answer: fx.Node
    network: nn.Module


_RELU = (functional.relu, torch.relu, torch.relu_, functional.relu_)
_ADD = (operator.add, torch.add, operator.iadd)
# Functions that change their first argument, and what computes the same without doing so.
_PURE_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    functional.relu_: functional.relu,
}
# What surely makes a tensor of its own; anything else may return a view of its first argument.
_FRESH_FUNCTIONS = frozenset(_PURE_FUNCTIONS.values())
_FRESH_NAMES = frozenset(
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
        network: Takes images (n, c, h, w) as its only argument, others with defaults aside; it is left as it is.

    Raises:
        NotTraceableError: Control flow, several inputs, in-place changes that are read elsewhere, or an output that is
            no single tensor.
    """
    network = copied(network)
    network.eval()
    for name, kind, _ in hooks_of(network):
        if kind.startswith("_forward"):
            raise NotTraceableError(f"'{name}' has forward hooks")
    held = [(module, {key: _shallow(value) for key, value in vars(module).items()}) for module in network.modules()]
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever the network's own code raises when it meets a symbol instead of a tensor
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotTraceableError(f"its forward cannot be traced ({reason})") from error
    for module, attributes in held:
        # Where a module keeps an activation, it now keeps a symbol.
        symbols = [key for key, value in vars(module).items() if isinstance(value, fx.Proxy)]
        for key in symbols:
            del vars(module)[key]
        vars(module).update(attributes)
    n_needed = _n_needed(network)
    images = [node for node in graph.nodes if node.op == "placeholder"]
    if n_needed == 1:
        for node in images[1:]:
            graph.erase_node(node)  # an argument that keeps its default
        del images[1:]
    if len(images) != 1:
        raise NotTraceableError(f"its forward takes {len(images)} arguments instead of one")
    answer = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(answer, fx.Node):
        raise NotTraceableError("its output is not a single tensor")
    modules = dict(network.named_modules())
    _make_pure(list(graph.nodes), modules)
    steps = _fuse([node for node in graph.nodes if node.op not in ("placeholder", "output")], modules)
    _mark_tail(steps)
    _mark_dead(steps, answer, images[0])
    return Program(steps, images[0], answer, network)


def _shallow(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else value


def _n_needed(network: nn.Module) -> int:
    """Number of arguments that a network's forward has no default for, 0 where it takes any number."""
    arguments = inspect.signature(network.forward).parameters.values()
    if any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in arguments):
        return 0
    return sum(one.default is one.empty for one in arguments)


class _Tracer(fx.Tracer):
    """Traces down to torch's own layers, and to batch norm of any make, which repairs know by its kind."""

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Put what adapts the network around its forward, which is traced without hooks."""
        forward, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        adaptation, n_needed = adaptation_of(self.root), _n_needed(self.root)

        def adapted(network: nn.Module, *inputs: Any) -> Any:
            inputs = inputs[:1] if n_needed == 1 else inputs
            output = forward(network, *(copy_inputs(network, inputs) if adaptation.copies_inputs else inputs))
            output = logits_of(output) if adaptation.takes_logits else output
            return logarithm_of(output) if adaptation.takes_logarithm else output

        return adapted, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | Emptied) or super().is_leaf_module(m, module_qualified_name)


def _make_pure(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> None:
    """Replace in-place operations by their pure forms, or refuse where somebody reads what they change."""
    order = {node: i for i, node in enumerate(nodes)}
    changing = {name for name, module in modules.items() if getattr(module, "inplace", False)}
    changes: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        in_place = False
        if node.op == "call_function":
            if node.target in _PURE_FUNCTIONS:
                node.target, in_place = _PURE_FUNCTIONS[node.target], True
            if node.kwargs.get("inplace"):
                node.kwargs, in_place = {**node.kwargs, "inplace": False}, True
            in_place = in_place or _make_named_pure(node)
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
    # What an in-place operation returns counts as its own: code that reads it means the changed values.
    ends = {node for node, _ in changes}
    owners = {node: _owner(node, modules, ends) for node in nodes}
    for node, changed in changes:
        family = [other for other in nodes if owners[other] is owners[changed]]
        if any(order[user] > order[node] for other in family for user in other.users):
            raise NotTraceableError(f"'{node.name}' changes a tensor in place that is read again")


def _make_named_pure(node: fx.Node) -> bool:
    """Whether a function changes its first argument by its name, such as `torch.clamp_`; replaced by its pure form."""
    name = getattr(node.target, "__name__", "")
    if node.target in (operator.and_, operator.or_, operator.is_, operator.not_):
        return False
    if not name.endswith("_") or name.endswith("__"):
        return False
    pure = getattr(torch, name.removesuffix("_"), None) or getattr(functional, name.removesuffix("_"), None)
    if pure is None:
        raise NotTraceableError(f"it changes a tensor in place ('{node.name}')")
    node.target = pure
    return True


def _owner(node: fx.Node, modules: dict[str, nn.Module], ends: set[fx.Node]) -> fx.Node:
    """The node whose memory a node may look into: itself where it is one of `ends` or surely no view."""
    while node not in ends and node.args and isinstance(node.args[0], fx.Node):
        if node.op == "call_module":
            fresh = not isinstance(modules[str(node.target)], _VIEWING_MODULES)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            fresh = (node.op == "call_function" and node.target in _FRESH_FUNCTIONS) or name in _FRESH_NAMES
        if fresh:
            break
        node = node.args[0]
    return node


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_relu(node: fx.Node | None, modules: dict[str, nn.Module]) -> bool:
    if node is None:
        return False
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELU) or (node.op == "call_method" and node.target == "relu")


def _added_to(node: fx.Node | None, summand: fx.Node) -> fx.Node | None:
    """The other summand if `node` adds something to `summand`, and only that."""
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
    """One step for each node, or for each chain that starts with a convolution.

    A chain runs where its last node stands: everything it reads has been computed by then.
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
        summand = _added_to(following, end)
        # The later of two convolutions takes their sum.
        taken_later = summand is not None and _ends_convolution(summand, modules) and order[summand] > order[node]
        if following is not None and summand is not None and not taken_later:
            fused_into[end], end, other = following, following, summand
            following = _only_user(end)
        relu = _is_relu(following, modules)
        if relu:
            assert following is not None
            fused_into[end], end = following, following
        chains[end] = Convolution(end, source, other, str(node.target), norm, relu)
    steps: list[Convolution | Call] = []
    for node in nodes:
        if node in chains:
            steps.append(chains[node])
        elif node not in fused_into:
            module = modules[str(node.target)] if node.op == "call_module" else None
            unfused = module is not None and has_running_statistics(module)
            steps.append(Call(node, str(node.target) if unfused else None, tail=False))
    return steps


def reads(step: Convolution | Call) -> list[fx.Node]:
    """What a step needs."""
    if isinstance(step, Call):
        return step.output.all_input_nodes
    return [step.input] + ([step.other] if step.other is not None else [])


def _mark_tail(steps: list[Convolution | Call]) -> None:
    """Mark the calls whose result no convolution sees, directly or through others."""
    needed: set[fx.Node] = set()
    for step in reversed(steps):
        if isinstance(step, Convolution) or step.output in needed:
            needed.update(reads(step))
        else:
            step.tail = True


def _mark_dead(steps: list[Convolution | Call], answer: fx.Node, image: fx.Node) -> None:
    seen = {answer, image}  # the images belong to the caller
    for step in reversed(steps):
        mentioned = [*reads(step), step.output]
        step.dead = [node for node in dict.fromkeys(mentioned) if node not in seen]
        seen.update(mentioned)


def run_call(call: Call, registers: dict[fx.Node, Any], network: nn.Module) -> Any:
    """Run a call on what the registers hold; in the tail, floating-point arguments become float32."""

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
