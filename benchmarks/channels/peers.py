"""What torch-pruning chooses, used as its documentation says, and the same choice as a mask over our units."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning
from paretoprune.copies import copied
from paretoprune.structured.parts import STAYS
from paretoprune.structured.units import ChannelUnits
from torch import Tensor, nn

# How far answers of the tool's network and of ours may be apart, as a share of the largest: both in float32.
SAME = 1e-4
# The ratio is raised by this much until enough is removed, and halved N_HALVINGS times from there.
RATIO_STEP, N_HALVINGS = 0.05, 7


@dataclass(frozen=True)
class Importance:
    """An importance of torch-pruning.

    Attributes:
        make: Makes it.
        needs_gradients: Whether it looks at gradients of the loss, which need labels.
    """

    make: Callable[[], Any]
    needs_gradients: bool = False


IMPORTANCES: Mapping[str, Importance] = {
    "group norm": Importance(torch_pruning.importance.GroupMagnitudeImportance),
    "batch-norm scale": Importance(torch_pruning.importance.BNScaleImportance),
    "Taylor": Importance(torch_pruning.importance.GroupTaylorImportance, needs_gradients=True),
}

# Entries that are gone, int64, of each axis of a tensor.
Cuts = dict[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Pruned:
    """A network that torch-pruning has pruned, and what it has cut out of it."""

    network: nn.Module
    cuts: Cuts


class Pruner:
    """torch-pruning's pruner with one importance, for one network.

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, ...), normalised.
        importance: Among `IMPORTANCES`.
        globally: Whether all layers are ranked together; otherwise each loses the same share.
        ignored: Names of layers whose outputs stay.
        gradients: Of the loss, by the names of the parameters, for an importance that needs them.
    """

    def __init__(
        self,
        network: nn.Module,
        image: Tensor,
        importance: str,
        *,
        globally: bool,
        ignored: tuple[str, ...],
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._network, self._image, self._importance = network, image, IMPORTANCES[importance]
        self._globally, self._ignored = globally, ignored
        if self._importance.needs_gradients and gradients is None:
            raise ValueError(f"expected gradients for the importance '{importance}', found none")
        self._gradients = gradients if self._importance.needs_gradients else None

    def __call__(self, ratio: float) -> Pruned:
        """Prune a copy.

        Args:
            ratio: Share of the channels to remove, of each layer or of all.
        """
        network, pruner = self._pruner(ratio)
        names = {id(module): name for name, module in network.named_modules()}
        removed: dict[tuple[str, int], set[int]] = {}
        for group in pruner.step(interactive=True):
            for item in group:
                module, handler = item.dep.target.module, item.dep.handler.__name__
                # Steps without parameters are nodes of the graph, too.
                if id(module) in names and getattr(module, "weight", None) is not None:
                    axis = 0 if "out_channels" in handler else 1
                    removed.setdefault((f"{names[id(module)]}.weight", axis), set()).update(item.idxs)
            group.prune()
        cuts = {key: np.array(sorted(entries), dtype=np.int64) for key, entries in removed.items()}
        return Pruned(network.eval(), cuts)

    def scores(self, units: ChannelUnits) -> np.ndarray:
        """The importance of each unit, float32 (n_units,), higher = keep; units of several channels have their sum."""
        network, pruner = self._pruner(0.5)
        names = {id(module): name for name, module in network.named_modules()}
        found = np.zeros(units.n_units)
        places = {
            part.tensor: (start, part.unit_of)
            for coupling, start in zip(units.couplings, units.offsets[:-1], strict=True)
            for part in coupling.parts
            if not part.reads
        }
        layers = [pruner.ignored_layers, pruner.root_module_types]
        for group in pruner.DG.get_all_groups(ignored_layers=layers[0], root_module_types=layers[1]):
            root = f"{names[id(group[0].dep.target.module)]}.weight"
            if root in places:
                start, unit_of = places[root]
                with torch.no_grad():
                    each = pruner.estimate_importance(group).double().numpy()
                np.add.at(found, start + unit_of[unit_of != STAYS], each[unit_of != STAYS])
        return found.astype(np.float32)

    def _pruner(self, ratio: float) -> tuple[nn.Module, Any]:
        network = copied(self._network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(True)
            parameter.grad = None if self._gradients is None else self._gradients[name].clone()
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.BasePruner(
                network,
                self._image,
                importance=self._importance.make(),
                pruning_ratio=ratio,
                global_pruning=self._globally,
                ignored_layers=[network.get_submodule(name) for name in self._ignored],
            )
        return network, pruner


def layers_that_stay(network: nn.Module, units: ChannelUnits) -> tuple[str, ...]:
    """Layers whose outputs are no units: what a user has to tell the tool to ignore."""
    cut = {part.tensor for coupling in units.couplings for part in coupling.parts if not part.reads}
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return tuple(name for name, _ in layers if f"{name}.weight" not in cut)


def failure_without_ignoring(network: nn.Module, image: Tensor, classes: str) -> str | None:
    """What happens to a user who has only the classes ignored; None where the pruned network runs."""
    try:
        pruned = Pruner(network, image, "group norm", globally=False, ignored=(classes,))(0.3)
        with torch.no_grad():
            pruned.network(image)
    except Exception as error:  # whatever the tool or the network raises
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def mask_of(units: ChannelUnits, cuts: Cuts) -> np.ndarray:
    """The mask over our units that cuts out the same.

    Args:
        units: What can be cut.
        cuts: What is cut.

    Returns:
        bool (n_units,), True = kept.

    Raises:
        ValueError: Something is cut that is no unit, or parts of a unit.
    """
    bits = np.ones(units.n_units, dtype=bool)
    parts = [
        (part, start, start + coupling.n_units)
        for coupling, start in zip(units.couplings, units.offsets[:-1], strict=True)
        for part in coupling.parts
    ]
    known = {(part.tensor, part.axis) for part, _, _ in parts}
    if unknown := sorted(key for key in cuts if key not in known):
        name, axis = unknown[0]
        raise ValueError(f"expected cuts through units only, found one through axis {axis} of '{name}'")
    for part, start, _ in parts:
        gone = part.unit_of[cuts.get((part.tensor, part.axis), np.zeros(0, dtype=np.int64))]
        bits[start + gone[gone != STAYS]] = False
    stays: dict[tuple[str, int], np.ndarray] = {}
    for part, start, stop in parts:
        # Several couplings may lie side by side in an axis.
        mine, key = part.stays(bits[start:stop]), (part.tensor, part.axis)
        stays[key] = stays[key] & mine if key in stays else mine
    for (name, axis), mask in stays.items():
        # A tool may say nothing of biases and buffers: they go with the weight.
        if not name.endswith(".weight") and (name, axis) not in cuts:
            continue
        gone = cuts.get((name, axis), np.zeros(0, dtype=np.int64))
        if not np.array_equal(np.flatnonzero(~mask), gone):
            raise ValueError(f"expected whole units to be cut, found parts of some in axis {axis} of '{name}'")
    return bits


def check_same_answers(theirs: nn.Module, ours: nn.Module, images: Tensor) -> None:
    """Make sure that two networks answer alike.

    Raises:
        ValueError: They do not.
    """
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    apart = float((expected - found).abs().max()) / max(float(expected.abs().max()), 1e-12)
    if not apart <= SAME:
        raise ValueError(f"expected the answers of the tool's network from ours, found them {apart:.2g} apart")


def nearest_ratio(removed: Callable[[float], float], level: float) -> float:
    """The ratio that removes a share of the multiply-adds, as nearly as can be, by bisection.

    Whole channels go, so that what is removed grows in steps: of the two sides of a step the nearer one is taken.

    Args:
        removed: From a ratio to what it removes.
        level: The share.

    Raises:
        ValueError: No ratio below 1 removes as much.
    """
    high = next((float(step) for step in np.arange(RATIO_STEP, 1.0, RATIO_STEP) if removed(float(step)) >= level), None)
    if high is None:
        raise ValueError(f"expected a ratio that removes {level:.0%} of the multiply-adds, found none below 1")
    # What is removed need not grow with the ratio everywhere: a layer that would lose everything is left whole.
    low = max(0.0, high - RATIO_STEP)
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= level else (middle, high)
    return min(low, high, key=lambda ratio: abs(removed(ratio) - level))
