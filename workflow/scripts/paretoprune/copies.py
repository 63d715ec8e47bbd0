"""Networks as people hold them, taken out of wrappers and copied whatever they hold.

torch is imported where it is needed: fronts, which copy networks, can be read without it, as reports do.
"""

import copy
import os
import types
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_module(network: Any) -> None:
    """Refuse what is given in the place of a network.

    Raises:
        ValueError: It is no module; the message says how to make one of it.
    """
    from torch import nn

    if isinstance(network, nn.Module):
        return
    if isinstance(network, Mapping):
        found, remedy = "a state dict", "build the network and call its load_state_dict with it"
    elif isinstance(network, str | os.PathLike):
        found, remedy = f"the path '{network}'", "build the network and call load_state_dict(torch.load(path)) on it"
    elif isinstance(network, type) or callable(network):
        name = getattr(network, "__name__", type(network).__name__)
        found, remedy = f"'{name}', which is called to make one", f"give {name}(...), with its trained weights loaded"
    else:
        found, remedy = type(network).__name__, "give the network itself"
    raise ValueError(f"expected a network, a torch.nn.Module, found {found}; {remedy}")


def wrapper_of(network: "nn.Module") -> str | None:
    """Name of the wrapper that a module is, such as `DataParallel` or `torch.compile`; None for any other module."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    if isinstance(network, DataParallel | DistributedDataParallel | AveragedModel):
        return type(network).__name__
    # The class itself lies in torch._dynamo, which takes seconds to import.
    return "torch.compile" if type(network).__name__ == "OptimizedModule" and hasattr(network, "_orig_mod") else None


def unwrapped(network: "nn.Module") -> "nn.Module":
    """What is inside of `DataParallel`, `AveragedModel` and `torch.compile`, around a network or its parts.

    Where a part is wrapped, what comes back is a new module around the same parameters; the network is left as it is.
    """
    return _unwrapped(network, {}) if any(wrapper_of(module) for module in network.modules()) else network


def _unwrapped(module: "nn.Module", done: "dict[int, nn.Module]") -> "nn.Module":
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


def copied(network: "nn.Module", *, shares_tensors: bool = False) -> "nn.Module":
    """A copy of a network, of which the original sees nothing.

    With `shares_tensors` its modules are new ones around the same parameters and buffers.

    Activations that a module keeps are copied without their history, and hooks write into containers of their own.
    What cannot be copied (a lock, an open file) is shared.
    """
    import torch

    memo: dict[int, Any] = {}
    if shares_tensors:
        memo |= {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for tensor in tensors_in([network]):
        if id(tensor) in memo:
            continue
        if not tensor.is_leaf or tensor.is_inference():
            with torch.inference_mode(mode=False):
                memo[id(tensor)] = tensor.detach().clone()
    with torch.inference_mode(mode=False):
        try:
            return copy.deepcopy(network, dict(memo))
        except Exception:  # whatever an object says that cannot be copied
            return copy.deepcopy(network, memo | _not_copyable(network, memo))


def _not_copyable(network: "nn.Module", memo: Mapping[int, Any]) -> dict[int, Any]:
    """What modules and their hooks hold that no copy can be made of, by its id."""
    found: dict[int, Any] = {}
    for module in network.modules():
        own = {**vars(module), **{f"{kind}.{key}": hook for kind in HOOKS for key, hook in vars(module)[kind].items()}}
        for name, value in own.items():
            if name in (*HOOKS, "_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                found[id(value)] = value
    return found


def tensors_in(values: Iterable[Any]) -> "Iterable[Tensor]":
    """All tensors that a copy of these values would copy."""
    import torch

    stack, seen = list(values), set[int]()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | type | types.ModuleType | torch.dtype):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
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
