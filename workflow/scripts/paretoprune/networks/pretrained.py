"""Weights from elsewhere, brought into a network: which of those in a file, under which names, as which numbers."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from paretoprune.networks.checkpoints import is_counter, load_weights, misfits
from paretoprune.networks.weight_files import PLAIN_KEYS, read_states

# What wrappers and larger networks put before, or in the middle of, a network's own names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PREFIXES = (*WRAPPERS, "model", "net", "network", "encoder", "backbone", "base_model", "student", "state_dict")
AVERAGED = ("ema", "averaged", "average", "avg", "swa", "shadow", "teacher", "momentum")
# Ways to save masks and scales beside weights, by the ends of their names.
REPARAMETRISED = {
    "_mask": "torch.nn.utils.prune.remove(module, 'weight')",
    "weight_g": "torch.nn.utils.remove_weight_norm(module)",
    "original0": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    "original": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    "weight_u": "torch.nn.utils.remove_spectral_norm(module)",
}


@dataclass(frozen=True)
class Candidate:
    """Weights in a file that may be meant.

    Attributes:
        place: Dotted path of keys, then a prefix of names; "" for the outermost.
        state: Names to tensors, as the network has them.
        renamed: How names were changed, in words; empty where they were not.
        left: Names beside it that it does not use.
    """

    place: str
    state: Mapping[str, Tensor]
    renamed: str = ""
    left: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> tuple[bool, int]:
        """Smaller is taken first: weights as trained before averaged ones, usual keys before others."""
        keys = [key for key in self.place.split(".") if key and key not in WRAPPERS]
        usual = max((PLAIN_KEYS.index(key) if key in PLAIN_KEYS else len(PLAIN_KEYS) for key in keys), default=-1)
        return any(part in AVERAGED for key in keys for part in key.lower().split("_")), usual


def load_checkpoint(network: nn.Module, path: str | os.PathLike[str], key: str | None = None) -> str:
    """Copy the weights in a file into a network in place.

    Args:
        network: The network to fill.
        path: The file, see `weight_files.read_states`.
        key: Dotted path to the weights; None takes those that fit the network, as trained before averaged ones.

    Returns:
        What was loaded, in one line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Nothing in the file fits, or several things do of which none is the usual one; the weights are
            quantised or not finite.
    """
    states = read_states(path, key)
    candidates = [found for place, state in states.items() for found in _candidates(network, place, state)]
    fitting = sorted((one for one in candidates if not misfits(network, one.state)), key=lambda one: one.rank)
    source = f"checkpoint '{path}'"
    if not fitting:
        _refuse(network, source, candidates)
    chosen = fitting[0]
    rivals = [one for one in fitting[1:] if one.place != chosen.place and not _same(one.state, chosen.state)]
    if rivals and rivals[0].rank == chosen.rank:
        places = ", ".join(dict.fromkeys(f"'{one.place}'" for one in (chosen, *rivals)))
        raise ValueError(f"{source} holds several networks that fit; set `checkpoint_key` to one of {places}")
    state, casts = _as_numbers(network, chosen.state, source)
    load_weights(network, state, source)
    left = [*chosen.left, *(name for name in chosen.state if name not in state)]
    also = list(dict.fromkeys(one.place for one in rivals))
    averaged = [
        place for place in states if Candidate(place, {}).rank[0] and place not in also and place != chosen.place
    ]
    return ", ".join(
        part
        for part in (
            f"{source}: {len(state)} tensors" + (f" under '{chosen.place}'" if chosen.place else ""),
            "averaged weights" if chosen.rank[0] else "",
            chosen.renamed,
            casts,
            f"left out {_some(left)}" if left else "",
            f"not taken {_some([*also, *averaged])} (`checkpoint_key` chooses)" if also or averaged else "",
        )
        if part
    )


def _candidates(network: nn.Module, place: str, state: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """The ways to read a state dict as a network's, the plainest first; all but the first only where names fit."""
    own = [name for name in network.state_dict() if not is_counter(name)]
    plain = Candidate(place, state)
    yield plain
    if not misfits(network, state) or not own:
        return
    # Any prefix under which all names of the network are found.
    ends = [name.removesuffix(own[0]) for name in state if name.endswith(f".{own[0]}")]
    for prefix in ends:
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if all(name in inner for name in own):
            left = tuple(name for name in state if not name.startswith(prefix))
            # A prefix of all names is a wrapper's; one of some says which of several networks is meant.
            some = any(not is_counter(name) for name in left)
            at = ".".join(part for part in (place, prefix.rstrip(".")) if part) if some else place
            yield Candidate(at, inner, f"prefix '{prefix}' taken off", left)
    bare = {_bare(name): value for name, value in state.items()}
    if len({_bare(name) for name in state if not is_counter(name)}) < sum(not is_counter(name) for name in state):
        return  # two names would become one
    yield replace(plain, state=bare, renamed="wrappers' prefixes taken off")
    # The network is wrapped, and the checkpoint is of what is inside.
    renamed = {_bare(name): name for name in network.state_dict()}
    if len(renamed) == len(network.state_dict()):
        wrapped = {renamed.get(name, name): value for name, value in bare.items()}
        yield replace(plain, state=wrapped, renamed="the network's own prefixes put before names")


def _bare(name: str) -> str:
    """A name without the prefixes at its start and the wrappers in its middle."""
    parts = name.split(".")
    while len(parts) > 2 and parts[0] in PREFIXES:
        del parts[0]
    return ".".join(part for part in parts if part not in WRAPPERS)


def _refuse(network: nn.Module, source: str, candidates: list[Candidate]) -> None:
    """Say how the weights that fit best do not fit."""
    own = network.state_dict()
    best = max(candidates, key=lambda one: sum(name in own for name in one.state))
    unexpected = [name for name in best.state if name not in own]
    for end, remedy in REPARAMETRISED.items():
        if wrong := next((name for name in unexpected if name.rpartition(".")[2].endswith(end)), None):
            raise ValueError(
                f"{source} does not fit the network: '{wrong}' belongs to weights that torch works out from other "
                f"tensors; call {remedy} for each such module and save the state dict again"
            )
    for name, value in best.state.items():
        _check_numbers(name, value, source)
    if any(name.endswith("_packed_params") or "._packed_params." in name for name in unexpected):
        _refuse_quantised(source, unexpected[0])
    load_weights(network, best.state, source)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(name in other and other[name] is tensor for name, tensor in one.items())


def _refuse_quantised(source: str, name: str) -> None:
    raise ValueError(
        f"{source} is quantised: expected floating-point weights, found integers or packed ones in '{name}'; give the "
        "weights from before quantisation"
    )


def _check_numbers(name: str, tensor: Tensor, source: str) -> None:
    if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        _refuse_quantised(source, name)
    if tensor.is_meta:
        raise ValueError(
            f"{source} has no values for '{name}' (a tensor on the device meta); save the weights themselves"
        )


def _as_numbers(network: nn.Module, state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str]:
    """Weights in the types of a network's own, and what was changed for it in words.

    Raises:
        ValueError: They are quantised or not finite; the tensors are named.
    """
    parameters, own = dict(network.named_parameters()), network.state_dict()
    numbers: dict[str, Tensor] = {}
    casts: dict[str, int] = {}
    wrong: list[str] = []
    for name, tensor in state.items():
        if name not in own:
            continue
        _check_numbers(name, tensor, source)
        floats = own[name].is_floating_point()
        if tensor.is_complex():
            raise ValueError(f"{source} has complex numbers in '{name}', expected real ones; give a real network's")
        if floats and not tensor.is_floating_point() and name in parameters:
            _refuse_quantised(source, name)
        if tensor.layout != torch.strided:
            tensor, kind = tensor.to_dense(), "sparse tensors made dense"
            casts[kind] = casts.get(kind, 0) + 1
        numbers[name] = value = tensor.detach().to(own[name].dtype)
        if floats and tensor.dtype != value.dtype:
            kind = f"cast from {tensor.dtype} to {value.dtype}".replace("torch.", "")
            casts[kind] = casts.get(kind, 0) + 1
        # A mask for attention may hold -inf in a buffer.
        strict = name in parameters or name.endswith(("running_mean", "running_var"))
        bad = ~value.isfinite() if strict else value.isnan()
        if floats and bool(bad.any()):
            wrong.append(f"{name} ({int(bad.sum())} of {value.numel()})")
    if wrong:
        raise ValueError(
            f"{source} has values that are not finite: {_some(wrong)}; take an earlier checkpoint, from before the "
            "training diverged, or one of higher precision"
        )
    return numbers, ", ".join(f"{n} {kind}" for kind, n in casts.items())


def _some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
