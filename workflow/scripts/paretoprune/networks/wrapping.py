"""Networks as people bring them: out of wrappers, copied whatever they hold, and given copies where they write."""

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Under which names an answer of several parts holds its logits.
LOGITS = ("logits", "out")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@dataclass(frozen=True)
class Adaptation:
    """What a copy of a network needs so that the package can run it like any other.

    Attributes:
        copies_inputs: Its `forward` writes into what it is given.
        takes_logits: It answers with several parts, of which one is the logits.
        drops_hooks: It has hooks that change no answer.
    """

    copies_inputs: bool = False
    takes_logits: bool = False
    drops_hooks: bool = False


def wrapper_of(network: nn.Module) -> str | None:
    """Name of the wrapper that a module is, `DataParallel` or `torch.compile`; None for any other module."""
    if isinstance(network, DataParallel | DistributedDataParallel):
        return type(network).__name__
    # The class itself lies in torch._dynamo, which takes seconds to import.
    return "torch.compile" if type(network).__name__ == "OptimizedModule" and hasattr(network, "_orig_mod") else None


def unwrapped(network: nn.Module) -> nn.Module:
    """What is inside of `DataParallel` and `torch.compile`, around a network or its parts.

    Where a part is wrapped, what comes back is a new module around the same parameters; the network is left as it is.
    """
    return _unwrapped(network, {}) if any(wrapper_of(module) for module in network.modules()) else network


def _unwrapped(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while wrapper_of(module):
        module = module.get_submodule("_orig_mod" if hasattr(module, "_orig_mod") else "module")
    if id(module) not in done:
        done[id(module)] = module
        if any(wrapper_of(part) for part in module.modules()):
            shallow = done[id(module)] = module.__new__(type(module))
            shallow.__dict__.update(module.__dict__)
            parts = {name: None if part is None else _unwrapped(part, done) for name, part in module._modules.items()}
            shallow.__dict__["_modules"] = parts
    return done[id(module)]


def copied(network: nn.Module) -> nn.Module:
    """A copy of a network, of which the original sees nothing.

    Activations that a module keeps are copied without their history, and hooks write into containers of their own.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_in([network]):
        if not tensor.is_leaf or tensor.is_inference():
            with torch.inference_mode(mode=False):
                memo[id(tensor)] = tensor.detach().clone()
    with torch.inference_mode(mode=False):
        return copy.deepcopy(network, memo)


def _tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """All tensors that a copy of these values would copy."""
    stack, seen = list(values), set[int]()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | type | types.ModuleType | torch.dtype):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, partial):
            stack += [value.func, value.args, value.keywords]
        elif not isinstance(value, types.FunctionType) and hasattr(value, "__dict__"):
            stack += vars(value).values()


# ------------------------------------------------------------------------------------------------ hooks


def hooks_of(network: nn.Module) -> dict[tuple[str, str, int], Callable[..., Any]]:
    """Hooks that are none of ours, on a network and its parts, by module, kind and key."""
    return {
        (name, kind, key): hook
        for name, module in network.named_modules()
        for kind in _HOOKS
        for key, hook in getattr(module, kind).items()
        if hook not in (copy_inputs, take_logits)
    }


def remove_hook(network: nn.Module, name: str, kind: str, key: int) -> None:
    """Take one of `hooks_of` off, in place."""
    module = network.get_submodule(name)
    getattr(module, kind).pop(key)
    for flags in _FLAGS:
        if flags.startswith(kind):
            getattr(module, flags).pop(key, None)


def isolate_hooks(network: nn.Module) -> None:
    """Let hooks, in place, write into copies of the lists and dictionaries that their authors look at."""
    memo: dict[int, Any] = {id(module): module for module in network.modules()}
    for (name, kind, key), hook in hooks_of(network).items():
        getattr(network.get_submodule(name), kind)[key] = _isolated(hook, memo)


def _isolated(hook: Any, memo: dict[int, Any]) -> Any:
    """A hook with its own copies of what it holds."""
    if isinstance(hook, partial):
        inner = _isolated(hook.func, memo)
        return partial(
            inner, *(_own(v, memo) for v in hook.args), **{k: _own(v, memo) for k, v in hook.keywords.items()}
        )
    if isinstance(hook, types.MethodType):
        return types.MethodType(hook.__func__, _own(hook.__self__, memo))
    if not isinstance(hook, types.FunctionType):
        return _own(hook, memo)
    names = [name for name in hook.__code__.co_names if isinstance(hook.__globals__.get(name), list | dict | set)]
    found = types.FunctionType(
        hook.__code__,
        hook.__globals__ | {name: _own(hook.__globals__[name], memo) for name in names},
        hook.__name__,
        None if hook.__defaults__ is None else tuple(_own(value, memo) for value in hook.__defaults__),
        tuple(_own_cell(cell, memo) for cell in hook.__closure__ or ()),
    )
    found.__kwdefaults__ = hook.__kwdefaults__ and {k: _own(v, memo) for k, v in hook.__kwdefaults__.items()}
    return found


def _own_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        return types.CellType(_own(cell.cell_contents, memo))
    except ValueError:  # nothing has been put into it yet
        return cell


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a hook holds; what cannot be copied, and modules, as they are."""
    if isinstance(value, nn.Module | type | types.ModuleType):
        return value
    if isinstance(value, types.FunctionType | types.MethodType | partial):
        if id(value) not in memo:
            memo[id(value)] = value  # a function may hold itself
            memo[id(value)] = _isolated(value, memo)
        return memo[id(value)]
    memo |= {id(t): t.detach().clone() for t in _tensors_in([value]) if not t.is_leaf or t.is_inference()}
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, files, whatever a recorder holds
        return value


# ------------------------------------------------------------------------------------------------ adaptations


def copy_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a network that writes into its inputs: it gets copies."""
    return tuple(value.clone() if hasattr(value, "clone") else value for value in inputs)


def take_logits(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a network that answers with several parts: the logits alone."""
    return logits_of(output)


def logits_of(output: Any) -> Any:
    """The logits of an answer: itself, or the part that is called `logits` or `out`.

    Raises:
        ValueError: There is no such part.
    """
    # A symbol stands for a tensor while a network is traced.
    if isinstance(output, Tensor | torch.fx.Proxy):
        return output
    for name in LOGITS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor | torch.fx.Proxy):
            return found
    kind = type(output).__name__
    if isinstance(output, Mapping):
        kind += f" with {', '.join(str(key) for key in list(output)[:4])}"
    elif isinstance(output, tuple | list):
        kind += f" of {len(output)}"
    raise ValueError(
        f"expected logits (n, n_classes), or an answer with `logits` or `out`, found a {kind}; wrap the network so "
        "that it answers the logits alone:\n"
        "class Logits(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return self[0](x)[0]  # then prune Logits(network); [0] is where the logits are"
    )


def adapt(network: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Give a network, in place, what an adaptation says."""
    if adaptation.drops_hooks:
        for hook in hooks_of(network):
            remove_hook(network, *hook)
    if adaptation.copies_inputs:
        network.register_forward_pre_hook(copy_inputs, prepend=True)
    if adaptation.takes_logits:
        network.register_forward_hook(take_logits)
    return network


def adaptation_of(network: nn.Module) -> Adaptation:
    """Which of our hooks a network has."""
    return Adaptation(
        copies_inputs=copy_inputs in network._forward_pre_hooks.values(),
        takes_logits=take_logits in network._forward_hooks.values(),
    )


def without_adaptation(network: nn.Module) -> nn.Module:
    """A copy that needs nothing of this package, and answers as the original did."""
    network = copied(network)
    for kind, ours in (("_forward_pre_hooks", copy_inputs), ("_forward_hooks", take_logits)):
        kept = [(key, hook) for key, hook in getattr(network, kind).items() if hook is not ours]
        setattr(network, kind, OrderedDict(kept))
    return network
