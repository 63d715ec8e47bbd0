"""Which slices of which tensors have to go together: coupled channels of any network, and attention heads.

`structured.dependencies` proposes channels, `attention` heads. Nothing of that is taken on trust: the network is cut as
they say, and a coupling stays only if the smaller network answers what the whole one answers when nothing reads the
units in question. Layers that normalise channels together are given in the whole network what they have in the smaller.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from paretoprune.attention import layers_of, layouts_of
from paretoprune.copies import copied
from paretoprune.structured.dependencies import propose
from paretoprune.structured.gates import packed_gates
from paretoprune.structured.parts import Coupling, Couplings, NotCuttableError, Part, cut
from paretoprune.telling import Telling

# How far answers of the cut and of the whole network may be apart, as a share of the largest: they are computed in
# double precision, but a network may go through float32 by itself. Where units hardly matter, a share of what they do.
SAME, OF_EFFECT, ROUNDING = 1e-5, 1e-3, 1e-9


def find_couplings(network: nn.Module, image: Tensor, telling: Telling | None = None) -> Couplings:
    """Find the units of a network that can be cut.

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, ...), normalised, as the network expects them.
        telling: Says how far it is; None for the package's own logger.

    Raises:
        ValueError: Its graph cannot be followed, or nothing can be cut.
    """
    telling = Telling("finding what can be cut") if telling is None else telling
    image = image.detach().cpu()
    image = image.double() if image.is_floating_point() else image
    whole = copied(network).cpu().double()
    for parameter in whole.parameters():
        # The graph is that of gradients, whatever is frozen.
        parameter.requires_grad_(parameter.is_floating_point())
    whole.eval()
    order = {name: i for i, name in enumerate(_order_of_calls(whole, image))}
    heads, refused = _heads(whole, order)
    made = {part.tensor for layouts in heads.values() for part in layouts[0].parts if not part.reads}
    channels, unclear = propose(whole, image, order, made)
    telling("the graph is known, with %d groups", len(channels))
    checks = _Checks(whole, image, telling)
    couplings, unsound = checks.sound([*(layouts[0] for layouts in heads.values()), *channels])
    refused |= unclear | unsound
    # What went wrong may be otherwise: another order of the heads, or two halves of which one gates the other.
    others = {name: layouts[1:] for name, layouts in heads.items()} | {
        one.name: [one] for one in packed_gates(whole, order)
    }
    for i in range(max(map(len, others.values()), default=0)):
        again = [rest[i] for name, rest in others.items() if name in refused and i < len(rest)]
        found, _ = checks.sound(again)
        couplings += found
        refused = {name: reason for name, reason in refused.items() if name not in {one.name for one in found}}
    couplings.sort(key=lambda one: order.get(one.name, len(order)))
    if not couplings:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(
            f"expected channels that can be cut, found none ({reasons or 'no layer makes any'}); prune weights instead "
            "(units='weights')"
        )
    able = [one for one in couplings if one.name not in heads or _is_all_of(whole.get_submodule(one.name), one)]
    vanishing = checks.branches(able)
    return Couplings(tuple(replace(one, may_vanish=one in vanishing) for one in couplings), refused)


def _is_all_of(attention: nn.Module, heads: Coupling) -> bool:
    """Whether nothing of a module stays without its heads, but what a layer makes of nothing."""
    parts = {part.tensor for part in heads.parts}
    reader = next(part.tensor.removesuffix("weight") for part in heads.parts if part.reads)
    names = {f"{heads.name}.{name}" for name, _ in attention.named_parameters()}
    return names <= parts | {f"{reader}bias"}


def _heads(whole: nn.Module, order: Mapping[str, int]) -> tuple[dict[str, list[Coupling]], dict[str, str]]:
    """By name of each attention that runs, how its heads may lie in its tensors; and of which that is not known."""
    heads: dict[str, list[Coupling]] = {}
    refused: dict[str, str] = {}
    for name, module in whole.named_modules():
        if not name or name not in order:
            continue
        layouts = [
            Coupling(
                name,
                n_heads,
                tuple(Part(f"{name}.{one.tensor}", one.axis, one.head_of, one.reads) for one in slices),
            )
            for n_heads, slices in layouts_of(module)
        ]
        if layouts:
            heads[name] = layouts
        elif isinstance(module, nn.MultiheadAttention) and layers_of(module) is None:
            refused[name] = "its queries, keys and values differ in width, or something is added to its keys"
    return heads, refused


def _order_of_calls(network: nn.Module, image: Tensor) -> list[str]:
    """Names of the modules in the order in which they are called first."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.setdefault(name))
        for name, module in network.named_modules()
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


class _Checks:
    """Cuts a network and compares.

    Args:
        whole: In double precision; it is changed for a moment, and left as it is.
        image: One image.
        telling: Says how far it is.
    """

    def __init__(self, whole: nn.Module, image: Tensor, telling: Telling) -> None:
        self._whole, self._image, self._telling = whole, image, telling
        # Another image beside it shows whether a network still looks at what it is given.
        self._two = torch.cat([image, image.flip(-1) + 1])
        with torch.no_grad():
            self._answer = whole(image)
        self._n_done = 0

    def sound(self, proposed: Sequence[Coupling]) -> tuple[list[Coupling], dict[str, str]]:
        """Those that can be cut as they say, and why the others cannot."""
        kept: list[Coupling] = []
        refused: dict[str, str] = {}
        for together in (False, True):
            sound, unsound = self._halved([one for one in proposed if one.is_normalised_together == together])
            kept, refused = kept + sound, refused | unsound
        return kept, refused

    def _halved(self, couplings: Sequence[Coupling]) -> tuple[list[Coupling], dict[str, str]]:
        """All at once, and by halves if that goes wrong."""
        if not couplings:
            return [], {}
        wrong = self._wrong(couplings)
        if wrong is None or len(couplings) == 1:
            self._n_done += len(couplings)
            self._telling("%d groups are checked", self._n_done)
            return (list(couplings), {}) if wrong is None else ([], {couplings[0].name: wrong})
        half = len(couplings) // 2
        parts = [self._halved(part) for part in (couplings[:half], couplings[half:])]
        return parts[0][0] + parts[1][0], parts[0][1] | parts[1][1]

    def _wrong(self, couplings: Sequence[Coupling]) -> str | None:
        """What is wrong with a network without about half of these units; None for nothing."""
        try:
            self._cut(couplings, {one.name: _some(one.n_units) for one in couplings})
        except NotCuttableError as error:
            return str(error)
        return None

    def branches(self, couplings: Sequence[Coupling]) -> list[Coupling]:
        """Those that may vanish together: as many as go, the first ones first."""
        return self._grown([], self._grown([], couplings, self._looks_without), self._may_vanish)

    def _grown(
        self, base: list[Coupling], more: Sequence[Coupling], holds: Callable[[Sequence[Coupling]], bool]
    ) -> list[Coupling]:
        """The base and all that can be added to it so that something holds; whole halves are tried at once."""
        self._telling("which groups may be left out as a whole")
        if not more or holds([*base, *more]):
            return [*base, *more]
        half = len(more) // 2
        return base if half == 0 else self._grown(self._grown(base, more[:half], holds), more[half:], holds)

    def _looks_without(self, couplings: Sequence[Coupling]) -> bool:
        """Whether the whole network still looks at its images when nothing reads these units."""
        with torch.no_grad(), self._unread(couplings, _nothing(couplings)):
            return _looks(self._whole, self._two)

    def _may_vanish(self, couplings: Sequence[Coupling]) -> bool:
        """Whether a network without these units runs, answers as if nothing read them, and still looks at images."""
        try:
            small = self._cut(couplings, _nothing(couplings), strict=False)
            with torch.no_grad():
                return _looks(small, self._two)
        except (NotCuttableError, RuntimeError):  # a network may take one image, and no two without these units
            return False

    def _cut(
        self, couplings: Sequence[Coupling], choice: Mapping[str, np.ndarray], *, strict: bool = True
    ) -> nn.Module:
        """The network without some units, if it answers as the whole one does when nothing reads them.

        Raises:
            NotCuttableError: It does not run, or answers something else.
        """
        try:
            small = cut(self._whole, couplings, choice, shares_tensors=True)
            with torch.no_grad():
                found = small(self._image)
        except Exception as error:  # whatever the network's own code raises where its channels are fewer
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotCuttableError(f"the network does not run without some of its channels ({reason[:120]})") from error
        try:
            with torch.no_grad(), self._unread(couplings, choice), self._normalised(couplings, choice, small):
                expected = self._whole(self._image)
        except Exception as error:  # of a norm that is given more than channels
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotCuttableError(f"its norm cannot be followed with fewer channels ({reason[:120]})") from error
        scale = max(float(expected.abs().max()), 1e-12)
        # Of several at once the effect of one would hide what another one does wrong: they have to be equal.
        most = ROUNDING * scale
        if len(couplings) == 1 or not strict:
            effect = float((expected - self._answer).abs().max())
            most = max(most, min(SAME * scale, OF_EFFECT * effect))
        if found.shape != expected.shape or not float((found - expected).abs().max()) <= most:
            raise NotCuttableError("its channels are used in ways that the graph does not show")
        return small

    @contextmanager
    def _unread(self, couplings: Sequence[Coupling], choice: Mapping[str, np.ndarray]) -> Iterator[None]:
        """The whole network in which nothing reads some units, for a moment."""
        tensors = dict(self._whole.named_parameters())
        before: list[Callable[[], Tensor]] = []
        try:
            for coupling in couplings:
                for part in coupling.parts:
                    if not part.reads:
                        continue
                    tensor = tensors[part.tensor].detach()
                    lost = torch.from_numpy(np.flatnonzero(~part.stays(choice[coupling.name])))
                    held = tensor.index_select(part.axis, lost)
                    before.append(partial(tensor.index_copy_, part.axis, lost, held))
                    tensor.index_fill_(part.axis, lost, 0.0)
            yield
        finally:
            for restore in reversed(before):
                restore()

    @contextmanager
    def _normalised(
        self, couplings: Sequence[Coupling], choice: Mapping[str, np.ndarray], small: nn.Module
    ) -> Iterator[None]:
        """The whole network whose common norms see the channels alone that are left, for a moment."""
        stays: dict[str, np.ndarray] = {}
        for coupling in couplings:
            for part in coupling.parts:
                if part.together:
                    name, mask = part.tensor.rpartition(".")[0], part.stays(choice[coupling.name])
                    stays[name] = stays[name] & mask if name in stays else mask
        with ExitStack() as undo:
            for name, mask in stays.items():
                norm = self._whole.get_submodule(name)
                # Its own method takes precedence over that of its class.
                vars(norm)["forward"] = _norm_of_some(small.get_submodule(name), mask)
                undo.callback(vars(norm).pop, "forward")
            # torch's own encoder layers compute norms by themselves where they may.
            undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            yield


def _some(n_units: int) -> np.ndarray:
    """About half of some units, without any regularity, fewer of the first ones: bool (n_units,).

    A pattern would fit what goes together otherwise than it is said, such as the halves of a gate.
    """
    kept = np.random.default_rng(0).random(n_units) < np.linspace(0.25, 0.75, n_units)
    kept[0], kept[-1] = False, True
    return kept


def _nothing(couplings: Sequence[Coupling]) -> dict[str, np.ndarray]:
    return {one.name: np.zeros(one.n_units, dtype=bool) for one in couplings}


def _looks(network: nn.Module, two: Tensor) -> bool:
    """Whether a network answers two images differently."""
    first, second = network(two)
    return not torch.equal(first, second)


def _norm_of_some(norm: nn.Module, stays: np.ndarray) -> Callable[[Tensor], Tensor]:
    """A norm of some channels: those that are left are normalised among themselves, the others are 0.

    Args:
        norm: Of the channels that are left.
        stays: bool (n_channels,).
    """
    left = torch.from_numpy(np.flatnonzero(stays))

    def normalise(x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        # Channels come last, or second; a norm of other channels than it is given fails.
        axes = [axis for axis in (x.ndim - 1, 1) if x.shape[axis] == len(stays)]
        for axis in axes:
            try:
                return made.index_copy(axis, left, norm(x.index_select(axis, left)))
            except RuntimeError:
                if axis == axes[-1]:
                    raise
        raise NotCuttableError("the channels of a norm are neither last nor second")

    return normalise
