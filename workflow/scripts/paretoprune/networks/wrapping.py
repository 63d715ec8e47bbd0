"""Networks as people bring them, made to run like others: given copies where they write, asked for logits alone."""

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.copies import HOOKS, copied, tensors_in

# Under which names an answer of several parts holds its logits.
LOGITS = ("logits", "out")
# Probabilities below this are rounded to 0 in some types; how far a sum of probabilities may be from 1.
LEAST_PROBABILITY, ROUNDING = 1e-30, 1e-3
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@dataclass(frozen=True)
class Adaptation:
    """What a copy of a network needs so that the package can run it like any other.

    Attributes:
        copies_inputs: Its `forward` writes into what it is given.
        takes_logits: It answers with several parts, of which one is the logits.
        takes_logarithm: It answers probabilities, of which the logarithm is what others call logits.
        drops_hooks: It has hooks that change no answer.
    """

    copies_inputs: bool = False
    takes_logits: bool = False
    drops_hooks: bool = False
    takes_logarithm: bool = False


# ------------------------------------------------------------------------------------------------ hooks


def hooks_of(network: nn.Module) -> dict[tuple[str, str, int], Callable[..., Any]]:
    """Hooks that are none of ours, on a network and its parts, by module, kind and key."""
    return {
        (name, kind, key): hook
        for name, module in network.named_modules()
        for kind in HOOKS
        for key, hook in getattr(module, kind).items()
        if hook not in (copy_inputs, take_logits, take_logarithm)
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
    memo |= {id(t): t.detach().clone() for t in tensors_in([value]) if not t.is_leaf or t.is_inference()}
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


def take_logarithm(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a network that answers probabilities: their logarithm."""
    return logarithm_of(output)


def logarithm_of(probabilities: Any) -> Any:
    """The logarithm, of probabilities that were rounded to 0 too."""
    return probabilities.clamp(min=LEAST_PROBABILITY).log()


def are_probabilities(answers: Tensor) -> bool:
    """Whether answers (n, n_classes) are shares of 1, as after a softmax."""
    return bool((answers >= 0).all() & ((answers.sum(dim=1) - 1).abs() < ROUNDING).all())


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
    kind, place = type(output).__name__, "[0]"
    if isinstance(output, Mapping):
        kind += f" with {', '.join(str(key) for key in list(output)[:4])}"
        place = next((f"[{key!r}]" for key, part in output.items() if isinstance(part, Tensor)), place)
    elif isinstance(output, tuple | list):
        kind += f" of {len(output)}"
    elif held := [key for key, part in getattr(output, "__dict__", {}).items() if isinstance(part, Tensor)]:
        kind += f" with {', '.join(held[:4])}"
        place = f".{held[0]}"
    raise ValueError(
        f"expected logits (n, n_classes), or an answer with `logits` or `out`, found a {kind}; wrap the network so "
        "that it answers the logits alone:\n"
        "class Logits(nn.Sequential):\n"
        "    def forward(self, x):\n"
        f"        return self[0](x){place}  # then prune Logits(network); {place} is where the logits are"
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
    if adaptation.takes_logarithm:
        network.register_forward_hook(take_logarithm)
    return network


def adaptation_of(network: nn.Module) -> Adaptation:
    """Which of our hooks a network has."""
    return Adaptation(
        copies_inputs=copy_inputs in network._forward_pre_hooks.values(),
        takes_logits=take_logits in network._forward_hooks.values(),
        takes_logarithm=take_logarithm in network._forward_hooks.values(),
    )


def without_adaptation(network: nn.Module) -> nn.Module:
    """A copy that needs nothing of this package, and answers as the original did."""
    network = copied(network)
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        ours = (copy_inputs, take_logits, take_logarithm)
        kept = [(key, hook) for key, hook in getattr(network, kind).items() if hook not in ours]
        setattr(network, kind, OrderedDict(kept))
    return network
