"""The network as it stands: whether it can be pruned as it is, what of it runs, and what a copy of it needs.

One check at the start, shared by the library and the workflow. It runs a few images, and leaves the network as it is.
"""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from paretoprune.copies import HOOKS, check_module, copied, tensors_in, unwrapped, wrapper_of
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.wrapping import (
    Adaptation,
    adapt,
    are_probabilities,
    hooks_of,
    isolate_hooks,
    logits_of,
    remove_hook,
    without_adaptation,
)

# Images that the checks look at.
N_IMAGES = 64
# Images of a batch whose neighbours are exchanged, and how many of them stay; the first is no size of anything else,
# so that the dimension of the batch is found in what modules are given.
BATCH, N_STAYING = 13, 6
# How far equal answers may be apart, as a share of the largest: rounding, and that of other kernels.
SAME, NEARLY_SAME = 1e-5, 1e-2
# Calls with few images, for what is random only now and then.
N_CALLS = 24
# Names that a line has room for.
N_NAMED = 3


@dataclass(frozen=True)
class Inspection:
    """What one look at a network says.

    Attributes:
        network: A copy to work with, on the CPU, in float32 and evaluation mode: it writes into nobody's images, and
            answers logits.
        units: Its prunable weights, those that no forward pass uses left out.
        n_classes: Number of its answers.
        exclude: Patterns of weights that stay dense: those given, and one for each of `unused`.
        unused: Weights that no forward pass uses for its answer, and how many numbers each holds.
        matrices: Likewise of other parameters of several dimensions (embeddings, a module's own), which are
            never pruned.
        adaptation: What the copy was given.
        wrapper: What the network was taken out of; empty for nothing.
        name: What the network is called in errors.
    """

    network: nn.Module
    units: WeightUnits
    n_classes: int
    exclude: tuple[str, ...]
    unused: Mapping[str, int]
    matrices: Mapping[str, int]
    adaptation: Adaptation
    wrapper: str = ""
    name: str = "the network"

    @property
    def n_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def bare(self) -> nn.Module:
        """A copy without what it was given, which answers as the original does."""
        return without_adaptation(self.network)

    def report(self, log: logging.Logger, name: str) -> None:
        """Say it in a log."""
        for line in self.lines():
            log.info("%s: %s", name, line)

    def lines(self) -> list[str]:
        """At most four lines for a log: what is prunable, what is left out and why, what was adapted."""
        n = self.n_parameters
        lines = [
            f"{self.units.n_units} prunable weights in {self.units.n_groups} layers, {self.units.n_units / n:.1%} of "
            "all parameters"
        ]
        for found, reason in (
            (self.unused, "stay as they are, as no answer needs them"),
            (self.matrices, "stay dense, being matrices of no layer"),
        ):
            if found:
                lines.append(f"{sum(found.values()) / n:.1%} of all parameters {reason}: {_listed(found)}")
        adaptation = self.adaptation
        adapted = [f"taken out of {self.wrapper}"] if self.wrapper else []
        adapted += ["gets copies of its images, as it writes into them"] if adaptation.copies_inputs else []
        adapted += ["only its logits are looked at"] if adaptation.takes_logits else []
        adapted += ["its probabilities are taken by their logarithm"] if adaptation.takes_logarithm else []
        adapted += ["hooks that change no answer are left out"] if adaptation.drops_hooks else []
        return lines + ([f"the network as it is run: {'; '.join(adapted)}"] if adapted else [])


def inspect_network(
    network: nn.Module,
    images: Tensor,
    exclude: Sequence[str] = (),
    *,
    name: str = "the network",
    remedy: str = "give images as it expects them",
    trained: bool = True,
) -> Inspection:
    """Look at a network once, before anything else is done with it.

    Args:
        network: A classifier; it is left as it is.
        images: float (n, ...), as it expects them; at most `N_IMAGES` of them are looked at.
        exclude: Patterns of weights that stay dense, see `masks.units.WeightUnits.of`.
        name: What to call it in errors.
        remedy: What to do where it cannot run on the images.
        trained: Whether its answers have to be finite.

    Raises:
        ValueError: It cannot be pruned as it is; the message names the module or tensor, and the remedy.
    """
    check_module(network)
    wrapper = next((kind for module in network.modules() if (kind := wrapper_of(module))), "")
    network = unwrapped(network)
    check_plain(network)
    own = without_adaptation(network)
    _check_state(own, name)
    isolate_hooks(own)
    own.to("cpu").float()
    own.eval()
    units = WeightUnits.of(own, exclude)
    images = _some(images.detach().cpu().float())
    with torch.random.fork_rng(devices=[]):
        own, adaptation = _adapted(own, images, name, remedy)
        n_classes = check_answers(own, images, name=name, trained=trained)
        unused_names = _unused(own, units.names, images)
        _check_registered(own, images, name)
    sizes = {key: parameter.numel() for key, parameter in own.named_parameters()}
    if len(unused_names) == units.n_groups:
        raise ValueError(
            f"expected weights of {name} that its answers depend on, found none among the prunable ones; a forward "
            "that is put on a network as a function (a lambda that holds the network) runs the same weights in every "
            "copy: write it as a method of its class"
        )
    exclude = (*exclude, *(glob.escape(key) for key in unused_names))
    return Inspection(
        own,
        WeightUnits.of(own, exclude),
        n_classes,
        exclude,
        {key: sizes[key] for key in unused_names},
        other_matrices(own),
        adaptation,
        wrapper,
        name,
    )


def _some(images: Tensor) -> Tensor:
    """At most `N_IMAGES` images from all over, a tensor of its own."""
    return images[torch.linspace(0, len(images) - 1, min(len(images), N_IMAGES)).long()].clone()


def _listed(found: Mapping[str, int]) -> str:
    names = sorted(found, key=lambda key: -found[key])
    return ", ".join(names[:N_NAMED]) + (f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else "")


# ------------------------------------------------------------------------------------------------ plain parameters


def check_plain(network: nn.Module) -> None:
    """Refuse networks whose parameters are not there, or are computed from others.

    Raises:
        ValueError: TorchScript, a lazy layer, weight norm, spectral norm, a pruning or another parametrization; the
            message names the tensor and the call that makes it a plain one.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            "expected a network of Python code, found TorchScript, whose parameters cannot be laid out; give the "
            "network that it was made from"
        )
    for prefix, module in network.named_modules():
        at = f"network.get_submodule('{prefix}')" if prefix else "network"
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"expected a network of Python code, found TorchScript in '{prefix}'; give the module that it was made "
                "from"
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ValueError(
                f"expected weights of floating point, found the quantised '{prefix}' ({type(module).__name__}); give "
                "the network from before quantisation"
            )
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"expected a network whose parameters exist, found the lazy '{dot}{key}'; run it once: "
                    "network(images[:2])"
                )
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"expected a network with values, found '{dot}{key}' on the device 'meta'; load its trained "
                    "weights: network.to_empty(device='cpu').load_state_dict(...)"
                )
        if parametrize.is_parametrized(module):
            key = next(iter(module.parametrizations))
            _refuse(f"{dot}{key}", f"torch.nn.utils.parametrize.remove_parametrizations({at}, '{key}')")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                _refuse(f"{dot}{hook.name}", f"torch.nn.utils.remove_weight_norm({at}, '{hook.name}')")
            if isinstance(hook, SpectralNorm):
                _refuse(f"{dot}{hook.name}", f"torch.nn.utils.remove_spectral_norm({at}, '{hook.name}')")
            if isinstance(hook, prune.BasePruningMethod):
                _refuse(f"{dot}{hook._tensor_name}", f"torch.nn.utils.prune.remove({at}, '{hook._tensor_name}')")


def _check_state(network: nn.Module, name: str) -> None:
    """Refuse a network whose state dict is not one of tensors that it takes back: its members could not be kept.

    Raises:
        ValueError: With what is wrong.
    """
    state = dict(network.state_dict())
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    try:
        reason = f"'{others[0]}' is {type(state[others[0]]).__name__}" if others else ""
        if not others:
            copied(network).load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
    if reason:
        raise ValueError(
            f"expected a state dict of {name} that holds tensors and that it takes back, as pruned networks are kept "
            f"as such; found that {reason}; take off what changes it (a get_extra_state, a hook on the state dict, a "
            "buffer set to None)"
        )


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _check_registered(network: nn.Module, images: Tensor, name: str) -> None:
    """Refuse a network that answers by layers which it holds in a plain list, so that nobody sees their weights.

    Raises:
        ValueError: With the attribute.
    """
    known = {id(parameter) for parameter in network.parameters()}

    def hidden_in(value: Any) -> list[Tensor]:
        return [t for t in tensors_in([value]) if isinstance(t, nn.Parameter) and id(t) not in known]

    if not hidden_in(network):
        return
    with torch.no_grad():
        expected = network(images)
        for prefix, module in network.named_modules():
            # Containers first: methods and trainers lead back to the whole network.
            held = sorted(vars(module).items(), key=lambda item: not isinstance(item[1], list | tuple | dict | set))
            for key, value in held:
                if key in ("_modules", *HOOKS) or not (hidden := hidden_in(value)):
                    continue
                before = [parameter.detach().clone() for parameter in hidden]
                try:
                    for parameter in hidden:
                        parameter.fill_(torch.nan)
                    changes = not _are_close(network(images), expected, SAME)
                finally:
                    for parameter, own in zip(hidden, before, strict=True):
                        parameter.copy_(own)
                if changes:
                    raise ValueError(
                        f"expected the layers of {name} as parts of it, found some in '{_joined(prefix, key)}' "
                        f"({type(value).__name__}), whose weights are neither in its parameters nor in its state dict; "
                        "hold them in nn.ModuleList, nn.ModuleDict or nn.ParameterList"
                    )


def _refuse(tensor: str, call: str) -> None:
    raise ValueError(
        f"expected plain parameters, found '{tensor}', which is computed from other tensors and cannot be masked; make "
        f"it a plain parameter first: {call}"
    )


def other_matrices(network: nn.Module) -> dict[str, int]:
    """Sizes of the parameters of several dimensions that no prunable layer holds."""
    prunable = set(WeightUnits.of(network).names)
    return {
        name: parameter.numel()
        for name, parameter in network.named_parameters()
        if name not in prunable and sum(size > 1 for size in parameter.shape) > 1
    }


# ------------------------------------------------------------------------------------------------ adaptation


def _adapted(own: nn.Module, images: Tensor, name: str, remedy: str) -> tuple[nn.Module, Adaptation]:
    """Give a copy of a network what it needs; its hooks go where answers stay the same without them.

    Raises:
        ValueError: It cannot run on the images, or answers anything but logits.
    """
    few = images[:BATCH]
    try:
        with torch.no_grad():
            output = copied(own)(few.clone())
    except Exception as error:  # whatever the network's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shape = tuple(images.shape[1:])
        if any(words in reason for words in ("dtype", "scalar type", "should be the same")) and "type" in reason:
            remedy = (
                "networks are run in float32: let its forward cast to the type of its weights, as in "
                "x.to(self.weight.dtype), and to no other"
            )
        if isinstance(error, TypeError) and "argument" in reason:
            remedy = "wrap it so that its forward takes the images alone, as its one positional argument"
        raise ValueError(f"{name} cannot run on images of shape {shape}: {reason}; {remedy}") from error
    drops = False
    hooks = hooks_of(own)
    if hooks:
        expected = _logits_or_nothing(own, few)
        for tried in [list(hooks), *([hook] for hook in hooks)]:
            without = copied(own)
            for hook in tried:
                remove_hook(without, *hook)
            found = _logits_or_nothing(without, few)
            if expected is not None and found is not None and _are_close(found, expected, SAME):
                own, drops = without, True
                if len(tried) == len(hooks):
                    break
        with torch.no_grad():
            output = copied(own)(few.clone())
    given = images.clone()
    version = given._version
    with torch.no_grad():
        copied(own)(given)
    writes = given._version != version or not torch.equal(given, images)
    try:
        logits = logits_of(output)
    except ValueError as error:
        raise ValueError(f"{name} answers something else: {error}") from error
    if logits.is_floating_point() and tuple(logits.shape) in ((len(few),), (len(few), 1)):
        raise ValueError(
            f"expected an answer of {name} for each class, found one for each image; where it says how likely the "
            "second of two classes is, wrap it so that it answers two logits:\n"
            "class TwoLogits(nn.Sequential):\n"
            "    def forward(self, x):\n"
            "        z = self[0](x).reshape(-1, 1)  # before any sigmoid\n"
            "        return torch.cat([torch.zeros_like(z), z], dim=1)  # then prune TwoLogits(network)"
        )
    if logits.ndim != 2 or len(logits) != len(few) or not logits.is_floating_point():
        raise ValueError(
            f"expected logits (n, n_classes) from {name}, found shape {tuple(logits.shape)} of {logits.dtype} for "
            f"{len(few)} images; wrap it so that it answers one row of floats for each image "
            "(flatten(1) takes off sizes of 1)"
        )
    adaptation = Adaptation(writes, logits is not output, drops, are_probabilities(logits))
    # The hooks to drop are gone; those that are left change answers.
    return adapt(own, replace(adaptation, drops_hooks=False)), adaptation


def _logits_or_nothing(network: nn.Module, images: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found: Tensor = logits_of(copied(network)(images.clone()))
    except Exception:  # without a hook that makes its answer what it is, a network may answer anything
        return None
    return found


# ------------------------------------------------------------------------------------------------ answers


def check_answers(network: nn.Module, images: Tensor, *, name: str = "the network", trained: bool = True) -> int:
    """Refuse networks whose answers do not repeat, depend on the other images of a batch, or are not finite.

    Args:
        network: In evaluation mode, adapted; it is left as it is.
        images: float (n, ...), as it expects them; at most `N_IMAGES` of them are looked at.
        name: What to call it in errors.
        trained: Whether its answers have to be finite.

    Returns:
        Number of its answers.

    Raises:
        ValueError: One of these; the message names the first module that is at fault, and the remedy.
    """
    images = _some(images)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = copied(network)
        logits, again = probe(images), probe(images)
        few = images[:2]
        try:
            calls = [probe(few) for _ in range(N_CALLS)]
        except Exception:  # a batch of another size is looked at below
            calls = []
        if not _are_close(logits, again, SAME) or not all(_are_close(call, calls[0], SAME) for call in calls):
            at = _first_at_fault(network, [images[:BATCH]] * 2 + [few] * len(calls), None)
            raise ValueError(
                f"expected equal answers of {name} to equal images, found others at each call: {at} is random in "
                "evaluation mode; let it draw in training only, as nn.Dropout and "
                "functional.dropout(x, p, training=self.training) do"
            )
        if trained and not bool(logits.isfinite().all()):
            found = _first_not_finite(network, images[:BATCH]) or _first_not_finite(network, images)
            at = found or _described(network, "")
            raise ValueError(
                f"expected finite answers of {name}, found some that are not finite: {at} is the first to give any; "
                "check its weights, the checkpoint and the normalisation of the images"
            )
        first, second = _batches(images)
        staying = min(N_STAYING, len(first) // 2)
        if not _are_close(probe(first)[:staying], probe(second)[:staying], SAME):
            at = _first_at_fault(network, [first, second], staying)
            raise ValueError(
                f"expected answers of {name} that do not depend on the other images of a batch, found some that do: "
                f"{at} mixes the images; give batch norm running statistics (track_running_stats=True, and "
                "training=self.training in functional.batch_norm), attention and recurrent layers "
                "batch_first=True where images come first, and take no mean over a batch"
            )
        _check_one_image(probe, images, logits, name)
    return logits.shape[1]


def _batches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of one size: the first images are the same, their neighbours others."""
    pool = images if len(images) >= 2 * BATCH else torch.cat([images, images.flip(-1), images / 2, -images])
    pool = torch.cat([pool] * (1 + 2 * BATCH // len(pool)))
    return pool[:BATCH], torch.cat([pool[:N_STAYING], pool[BATCH : 2 * BATCH - N_STAYING]])


def _check_one_image(probe: nn.Module, images: Tensor, logits: Tensor, name: str) -> None:
    """Refuse a network that takes no single image, as gradients of one image need."""
    try:
        found, reason = probe(images[:1]), ""
    except Exception as error:  # whatever the network's own code raises
        found, reason = None, f" ({(str(error).splitlines() or [type(error).__name__])[0]})"
    if found is None or found.shape != logits[:1].shape or not _are_close(found, logits[:1], NEARLY_SAME):
        what = "an error" if found is None else f"shape {tuple(found.shape)}"
        if found is not None and found.shape == logits[:1].shape:
            what = "another answer"
        raise ValueError(
            f"expected of {name} the same answer (1, {logits.shape[1]}) for one image alone as in a batch, found "
            f"{what}{reason}; let nothing in its forward depend on the size of the batch (flatten(1) rather than "
            "squeeze() or view with a fixed size)"
        )


def _are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether answers are equal but for rounding; what is not finite has to be so in both."""
    if a.shape != b.shape:
        return False
    finite = a.isfinite() & b.isfinite()
    scale = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)


@dataclass(frozen=True)
class _Seen:
    """One call of a module: its name, and digests of what it was given and of what it gave; None where unknown."""

    name: str
    given: bytes | None
    gave: bytes | None


@contextmanager
def _watched(
    network: nn.Module, enter: Callable[[Any], Any], leave: Callable[[str, Any, Any], None]
) -> Iterator[nn.Module]:
    """A copy of a network that tells what its modules are given and give, those inside of others first.

    Args:
        network: It is left as it is.
        enter: Called with the inputs of a module.
        leave: Called with the name of a module, what `enter` said, and the module's output.
    """
    probe = copied(network)
    stack: list[Any] = []
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs: stack.append(enter((args, kwargs))), prepend=True, with_kwargs=True
        )
        module.register_forward_hook(lambda module, args, output, name=name: leave(name, stack.pop(), output))
    yield probe


def _described(network: nn.Module, name: str) -> str:
    kind = type(network.get_submodule(name)).__name__
    return f"'{name}' ({kind})" if name else f"its own forward ({kind})"


def _first_at_fault(network: nn.Module, batches: Sequence[Tensor], staying: int | None) -> str:
    """The first module that is given the same and gives something else, in the order in which modules finish.

    Args:
        network: It is left as it is.
        batches: To be run one after the other; those of one size are compared with the first of that size.
        staying: How many images of a batch are compared, the first ones; None for all.
    """
    runs: list[list[_Seen]] = []
    seen: list[_Seen] = []

    def digest(value: Any) -> bytes | None:
        return _digest(value, len(batches[len(runs)]), staying)

    with _watched(
        network, digest, lambda name, given, output: seen.append(_Seen(name, given, digest(output)))
    ) as probe:
        for batch in batches:
            seen.clear()
            probe(batch)
            runs.append(list(seen))
    first = {len(batch): run for batch, run in zip(reversed(batches), reversed(runs), strict=True)}
    for batch, run in zip(batches, runs, strict=True):
        for a, b in zip(first[len(batch)], run, strict=False):
            known = None not in (a.given, b.given, a.gave, b.gave)
            if a.name == b.name and known and a.given == b.given and a.gave != b.gave:
                return _described(network, a.name)
    return _described(network, "")


def _digest(value: Any, n: int, staying: int | None) -> bytes | None:
    """Digest of all tensors in a value, of the first `staying` images only; None where these cannot be told."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(value):
        rows: Tensor | None = tensor
        if staying is not None and tensor.ndim:
            at = next((i for i, size in enumerate(tensor.shape) if size == n), None)
            if at is not None:
                rows = tensor.narrow(at, 0, staying)
            elif tensor.shape[0] % n == 0:
                rows = tensor[: staying * (tensor.shape[0] // n)]
            else:
                rows = None
        if rows is None:
            return None
        found.update(str(tuple(rows.shape)).encode())
        found.update(
            rows.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if rows.numel() else b""
        )
    return found.digest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _first_not_finite(network: nn.Module, images: Tensor) -> str | None:
    """The first weight that is not finite, or module that makes something so of finite inputs; None for neither."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not bool(tensor.isfinite().all()):
            return f"'{name}'"
    found: list[str] = []

    def is_finite(value: Any) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))

    def leave(name: str, was_finite: bool, output: Any) -> None:
        if was_finite and not is_finite(output):
            found.append(name)

    with _watched(network, is_finite, leave) as probe:
        probe(images)
    return _described(network, found[0]) if found else None


# ------------------------------------------------------------------------------------------------ what runs


def _unused(network: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """Which parameters no answer depends on, neither by a gradient nor by their values.

    Args:
        network: In evaluation mode; it is left as it is.
        names: Of the parameters.
        images: All of them are looked at: a branch may run for some only.
    """
    probe = copied(network)
    probe.requires_grad_(True)
    parameters = dict(probe.named_parameters())
    reached = _reached(probe, [parameters[name] for name in names], images)
    open_names = [name for name, is_reached in zip(names, reached, strict=True) if not is_reached]
    # A part that runs without gradients, or all where the network has none: numbers that are none reach the answers.
    with torch.no_grad():
        expected = probe(images)

        def matter(tried: Sequence[str]) -> bool:
            before = {name: parameters[name].detach().clone() for name in tried}
            for name in tried:
                parameters[name].fill_(torch.nan)
            try:
                found = probe(images)
            except Exception:  # a network may refuse what is not a number
                return True
            finally:
                for name, value in before.items():
                    parameters[name].copy_(value)
            return not _are_close(found, expected, SAME)

        if not open_names or not matter(open_names):
            return open_names
        return [name for name in open_names if not matter([name])]


def _reached(probe: nn.Module, weights: Sequence[Tensor], images: Tensor) -> list[bool]:
    """Which weights a gradient of the answers reaches, be it 0."""
    reached = [False] * len(weights)
    for batch in images.split(BATCH):
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(probe(batch).sum(), weights, allow_unused=True)
        except RuntimeError:  # something in it has no derivative
            continue
        reached = [was or gradient is not None for was, gradient in zip(reached, found, strict=True)]
        if all(reached):
            break
    return reached
