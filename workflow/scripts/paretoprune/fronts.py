"""Fronts of pruned networks: non-dominated sets, hypervolume, and the choice of members.

Objectives are always minimised. The loss is the first column, the costs are the others. Nothing here needs torch.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moocore
import numpy as np
from pymoo.util.nds.non_dominated_sorting import find_non_dominated

from paretoprune.files import read_npz, write_npz
from paretoprune.masks.packed import PackedMasks
from paretoprune.objectives import ERROR_AND_DENSITY, reference_point
from paretoprune.tensors import load_networks, read_metadata, save_networks

if TYPE_CHECKING:
    from torch import Tensor, nn

# Costs that are larger than a limit by no more than this count as equal to it.
_ROUNDING = 1e-9


def networks_beside(path: str | os.PathLike[str]) -> Path:
    """The file of the networks of a front that is saved at `path`."""
    path = Path(path)
    # What follows the last dot of another name may tell it from its neighbours, as in `front-0.8`.
    return path.with_suffix(".safetensors") if path.suffix == ".npz" else path.with_name(f"{path.name}.safetensors")


def hypervolume(objectives: np.ndarray, reference: Sequence[float] = (1.0, 1.0)) -> float:
    """Volume between the points and the reference point, which is the part of the space that they dominate.

    Args:
        objectives: float (n, n_objectives), minimised; points at or beyond the reference point add nothing.
        reference: The reference point, one value for each objective, see `objectives.reference_point`.

    Returns:
        At least 0, larger is better; at most the product of the reference point if no objective is negative.

    Raises:
        ValueError: The points have more or fewer objectives than the reference point.
    """
    objectives = np.asarray(objectives, dtype=float)
    if not len(objectives):
        return 0.0
    if objectives.ndim != 2 or objectives.shape[1] != len(reference):
        raise ValueError(
            f"expected points with {len(reference)} objectives as the reference has, found shape {objectives.shape}; "
            "give the reference of these objectives, see objectives.reference_point"
        )
    return float(moocore.hypervolume(objectives, ref=np.asarray(reference, dtype=float)))


def non_dominated(objectives: np.ndarray) -> np.ndarray:
    """Find the points that no other point dominates; of equal points the first one.

    Args:
        objectives: float (n, n_objectives), minimised, the loss in the first column.

    Returns:
        Indices int64 (n_front,), sorted by the costs, cheapest first.
    """
    objectives = np.asarray(objectives, dtype=float)
    if not len(objectives):
        return np.zeros(0, dtype=np.int64)
    _, first = np.unique(objectives, axis=0, return_index=True)
    front = first[find_non_dominated(objectives[first])]
    return front[order_by_cost(objectives[front])]


def order_by_cost(objectives: np.ndarray) -> np.ndarray:
    """Sort points by their first cost, then by the further ones; equal points stay in order.

    Args:
        objectives: float (n, n_objectives), the loss in the first column.

    Returns:
        Indices, int64 (n,).
    """
    # `lexsort` takes the most important key last: the columns from the last to the second one.
    return np.lexsort(objectives[:, :0:-1].T)


def hypervolume_subset(
    objectives: np.ndarray, size: int, sparsities: Sequence[float] = (), reference: Sequence[float] = (1.0, 1.0)
) -> np.ndarray:
    """Thin a front: remove the member that contributes least to the hypervolume, until `size` members are left.

    Args:
        objectives: float (n, n_objectives), mutually non-dominated.
        size: Largest number of members to keep, at least 2.
        sparsities: For each of these, the member of least loss whose first cost is at most 1 - sparsity is protected:
            it is only removed when all members left are protected.
        reference: The reference point, see `hypervolume`.

    Returns:
        Indices int64, sorted by cost, cheapest first.
    """
    order = order_by_cost(objectives)
    kept = list(order)
    protected = np.zeros(len(objectives), dtype=bool)
    for sparsity in sparsities:
        within = order[objectives[order, 1] <= 1 - sparsity + _ROUNDING]
        if len(within):
            # Of equal losses (possible with two costs) the last one. With one cost the last one is always the best.
            protected[within[np.lexsort((-np.arange(len(within)), objectives[within, 0]))[0]]] = True
    contributions = _contributions_2d if objectives.shape[1] == 2 else _contributions
    while len(kept) > size:
        contributed = contributions(objectives[kept], np.asarray(reference, dtype=float))
        kept.pop(int(np.lexsort((contributed, protected[kept]))[0]))
    return np.array(kept, dtype=np.int64)


def _contributions_2d(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The area that no other member dominates, for each member, float (n,); `front` (n, 2) is sorted by cost."""
    # Sorted by rising cost, members have falling losses. So the area is a rectangle, which reaches to the loss of the
    # member before and to the cost of the member after.
    loss, cost = front[:, 0], front[:, 1]
    width = np.concatenate([reference[:1], loss[:-1]]) - loss
    height = np.concatenate([cost[1:], reference[1:]]) - cost
    return width * height


def _contributions(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The volume that no other member dominates, for each member, float (n,)."""
    return np.asarray(moocore.hv_contributions(front, ref=reference), dtype=float)


def knee(objectives: np.ndarray) -> int:
    """Find the member farthest below the straight line between the two ends of the front.

    All axes are scaled to the front's own range first. With one or two members it is the cheapest one.

    Args:
        objectives: float (n, n_objectives), non-dominated.

    Returns:
        Index of the knee.

    Raises:
        ValueError: The front is empty.

    Source:
        Das, "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection", 1999.
    """
    if not len(objectives):
        raise ValueError("expected a front with at least one member, found none")
    low, high = objectives.min(axis=0), objectives.max(axis=0)
    scaled = (objectives - low) / np.where(high > low, high - low, 1.0)
    # The ends are (0, 1) and (1, 0), so the distance below the line between them grows with -(x + y). With three
    # objectives it is a plane, and the sum has three terms.
    return int(np.lexsort((objectives[:, 1], scaled.sum(axis=1)))[0])


def _may_be_smaller(name: str, shape: Any, whole: dict[str, Any]) -> bool:
    """Whether a tensor of a smaller network can come from the whole network's tensors of these shapes."""
    if shape is None:
        return True
    if name not in whole:
        return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in whole
    return len(shape) == len(whole[name]) and all(n <= m for n, m in zip(shape, whole[name], strict=True))


def _n_weights(state: "Mapping[str, Tensor]") -> int:
    """Numbers in the matrices and kernels of a network."""
    return sum(tensor.numel() for tensor in state.values() if tensor.ndim > 1)


@dataclass
class Front:
    """Pruned networks, none of which dominates another.

    Attributes:
        masks: One mask for each member.
        objectives: float64 (n_members, n_objectives): the loss on the search split, and the costs.
        stages: The stage of the search that found each member.
        names: Names of the objectives, the loss first.
        dense: The network that the members are pruned from; None for a front from a file.
        states: The state of each member's finished network, as it was measured; None for a front from a file.
        units: What a unit of the masks is: `weights`, or `channels` whose networks are physically smaller.
        measured_latency: Time that each member's finished network takes relative to the dense one, float64
            (n_members,); None where it was not measured.

    Raises:
        ValueError: There are not as many objectives and stages as masks.
    """

    masks: PackedMasks
    objectives: np.ndarray
    stages: list[str]
    names: tuple[str, ...] = ERROR_AND_DENSITY
    dense: "nn.Module | None" = field(default=None, repr=False)
    states: "list[dict[str, Tensor]] | None" = field(default=None, repr=False)
    units: str = "weights"
    measured_latency: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.objectives = np.asarray(self.objectives, dtype=np.float64).reshape(-1, len(self.names))
        if not len(self.masks) == len(self.objectives) == len(self.stages):
            raise ValueError(
                f"expected as many objectives and stages as masks, found {len(self.masks)} masks, "
                f"{len(self.objectives)} objectives and {len(self.stages)} stages"
            )
        if self.measured_latency is not None and np.shape(self.measured_latency) != (len(self),):
            raise ValueError(
                f"expected a measured latency of each of {len(self)} members, found an array of shape "
                f"{np.shape(self.measured_latency)}"
            )

    def __len__(self) -> int:
        return len(self.masks)

    @classmethod
    def empty(cls, n_units: int, names: tuple[str, ...] = ERROR_AND_DENSITY) -> "Front":
        """A front without members, whose masks have `n_units` units."""
        return cls(PackedMasks.empty(n_units), np.zeros((0, len(names))), [], names)

    @property
    def error(self) -> np.ndarray:
        """The loss of each member, float64 (n_members,)."""
        return self.objectives[:, 0]

    @property
    def costs(self) -> np.ndarray:
        """The costs of each member relative to the dense network, float64 (n_members, n_objectives - 1)."""
        return self.objectives[:, 1:]

    @property
    def density(self) -> np.ndarray:
        """Share of prunable weights kept, float64 (n_members,); of smaller networks that are not there, of units."""
        if "density" in self.names:
            return self.objectives[:, self.names.index("density")]
        if self.units == "channels" and self.states is not None and self.dense is not None:
            whole = _n_weights(self.dense.state_dict())
            return np.array([_n_weights(state) / whole for state in self.states])
        return self.masks.density

    @property
    def sparsity(self) -> np.ndarray:
        """Share of prunable weights removed, float64 (n_members,)."""
        return 1.0 - self.density

    @property
    def sparsity_of_parameters(self) -> np.ndarray:
        """Removed parameters as a share of all, prunable or not, float64 (n_members,).

        Raises:
            RuntimeError: The front was read from a file, which holds no networks.
        """
        if self.dense is None:
            raise RuntimeError("this front was read from a file and knows no network; call pareto_prune")
        names = {name for name, _ in self.dense.named_parameters()}
        n_parameters = sum(parameter.numel() for parameter in self.dense.parameters())
        if self.units == "channels" and self.states is not None:
            # A layer that reads nothing has a bias, also where the dense network's has none.
            left = [
                sum(t.numel() for name, t in state.items() if name in names or name.endswith("bias"))
                for state in self.states
            ]
            return 1 - np.array(left) / n_parameters
        return np.asarray((self.masks.n_units - self.masks.n_kept) / n_parameters)

    @property
    def reference(self) -> tuple[float, ...]:
        """The reference point of the hypervolume."""
        return reference_point(self.names)

    def hypervolume(self) -> float:
        """The hypervolume in all objectives, up to `reference`."""
        return hypervolume(self.objectives, self.reference)

    def select(self, indices: np.ndarray) -> "Front":
        """The members at `indices`, int (n,) or bool (n_members,), in that order."""
        indices = np.arange(len(self))[np.asarray(indices)] if len(indices) else np.zeros(0, dtype=np.int64)
        return Front(
            self.masks.select(indices),
            self.objectives[indices],
            [self.stages[i] for i in indices],
            self.names,
            self.dense,
            None if self.states is None else [self.states[i] for i in indices],
            self.units,
            None if self.measured_latency is None else self.measured_latency[indices],
        )

    def merge(self, other: "Front") -> "Front":
        """The non-dominated members of both, cheapest first; of equal points this front's own member stays.

        The result has neither `dense` nor `states`, and measured latencies only if both have them.

        Raises:
            ValueError: The two fronts have masks of different numbers of units, or different objectives.
        """
        if self.names != other.names:
            raise ValueError(
                f"expected fronts of the same objectives, found {', '.join(self.names)} and {', '.join(other.names)}"
            )
        both = Front(
            self.masks.concatenate(other.masks),
            np.concatenate([self.objectives, other.objectives]),
            self.stages + other.stages,
            self.names,
            units=self.units,
        )
        if self.measured_latency is not None and other.measured_latency is not None:
            both.measured_latency = np.concatenate([self.measured_latency, other.measured_latency])
        return both.select(non_dominated(both.objectives))

    def thinned(self, size: int | None, sparsities: Sequence[float] = ()) -> "Front":
        """Thin the front to at most `size` members that keep most of the hypervolume, see `hypervolume_subset`.

        Args:
            size: At least 2; None for all members.
            sparsities: The best member beyond each of these stays, as far as `size` allows.
        """
        if size is None:
            return self
        return self.select(hypervolume_subset(self.objectives, size, sparsities, self.reference))

    def closest(self, *, sparsity: float | None = None, **cost: float) -> int:
        """Index of the member of the nearest sparsity or cost; of two equally near ones, that of less error.

        Args:
            sparsity: Share of the prunable units removed, 0 to 1.
            cost: Instead of it, one of the front's costs relative to the dense network, such as `macs=0.5`.

        Raises:
            ValueError: There is not one of the two, the front has no such cost, a share is not between 0 and 1, or the
                front is empty.
        """
        named = {**({} if sparsity is None else {"sparsity": sparsity}), **cost}
        unknown = [name for name in cost if name not in self.names[1:]]
        if len(named) != 1 or unknown:
            raise ValueError(
                f"expected a sparsity, or one of the costs {', '.join(self.names[1:])}, found "
                f"{', '.join(named) or 'nothing'}; for instance closest(sparsity=0.8)"
            )
        ((name, wanted),) = named.items()
        if not 0 <= wanted <= 1:
            raise ValueError(f"expected a {name} between 0 and 1, found {wanted}; 80 % is 0.8")
        if not len(self):
            raise ValueError("the front has no members")
        found = self.sparsity if name == "sparsity" else self.objectives[:, self.names.index(name)]
        return int(np.lexsort((self.error, np.abs(found - wanted)))[0])

    def knee(self) -> int:
        """Index of the knee of the front."""
        return knee(self.objectives)

    def network(self, index: int) -> "nn.Module":
        """Build the finished network of a member, as it was measured; it runs without this package.

        Args:
            index: Member of the front.

        Raises:
            RuntimeError: The front was read from a file, which holds no networks.
        """
        if self.dense is None or self.states is None:
            raise RuntimeError(
                "this front was read from a file and knows no network; call pareto_prune, read it with "
                "Front.load(path, network), or load the member's state from networks.safetensors with "
                "paretoprune.tensors.load_networks"
            )
        from paretoprune.copies import copied
        from paretoprune.shapes import with_state

        return with_state(copied(self.dense), self.states[index])

    def arrays(self) -> dict[str, np.ndarray]:
        """The front as plain arrays for an npz file; without names if the objectives are error and density."""
        names = {} if self.names == ERROR_AND_DENSITY else {"names": np.array(self.names, dtype=np.str_)}
        names |= {} if self.units == "weights" else {"units": np.array(self.units)}
        names |= {} if self.measured_latency is None else {"measured_latency": self.measured_latency}
        return {
            "words": self.masks.words,
            "n_weights": np.array(self.masks.n_units),
            "objectives": self.objectives,
            "stages": np.array(self.stages, dtype=np.str_),
            **names,
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> "Front":
        """Make a front from what `arrays` returned."""
        masks = PackedMasks(arrays["words"], int(arrays["n_weights"]))
        names = tuple(str(name) for name in arrays.get("names", ERROR_AND_DENSITY))
        units = str(arrays.get("units", "weights"))
        stages, measured = [str(stage) for stage in arrays["stages"]], arrays.get("measured_latency")
        return cls(masks, arrays["objectives"], stages, names, units=units, measured_latency=measured)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the front to an npz file with the arrays of `arrays`; a member's id is its position.

        If the front has networks, they are written to a safetensors file beside it, each tensor as `<member>/<name>`,
        with a fingerprint of the front.

        Raises:
            ValueError: The path is a folder.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            raise ValueError(f"expected a file to write the front to, found the folder '{path}'; add a name, front.npz")
        # The networks first: if writing stops in between, no front lacks its networks.
        if self.states is not None:
            save_networks(networks_beside(path), self.states, {"front": self._fingerprint})
        write_npz(path, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: "nn.Module | None" = None) -> "Front":
        """Read what `save` wrote.

        Args:
            path: The npz file.
            network: A network of the architecture that was pruned, trained or not, also in a wrapper; it is copied.
                With it, `network(i)` returns the saved networks, bit for bit. None to read only masks and numbers.

        Raises:
            FileNotFoundError: The file, or the file of the networks beside it, does not exist.
            ValueError: The file is no front, the networks belong to another, or have another architecture.
        """
        path = Path(path).expanduser()
        try:
            front = cls.of_arrays(read_npz(path))
        except (IsADirectoryError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"expected a front at '{path}', an npz file that Front.save wrote, found something else; give that file"
            ) from error
        if network is not None:
            front._read_networks(networks_beside(path), network)
        return front

    @classmethod
    def published(cls, masks: str | os.PathLike[str], networks: str | os.PathLike[str], dense: "nn.Module") -> "Front":
        """Read what a step of the workflow published.

        Args:
            masks: Its `masks.npz`.
            networks: Its `networks.safetensors`.
            dense: The network that was pruned.
        """
        return replace(cls.load(masks), dense=dense, states=load_networks(networks))

    def _read_networks(self, path: Path, network: "nn.Module") -> None:
        """Read the networks that `save` wrote into `dense` and `states`; errors as for `load`."""
        import torch

        from paretoprune.copies import check_module, copied, unwrapped

        check_module(network)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the networks of the front at '{path}', found no file; copy it beside the front, or load the "
                "front without a network"
            )
        if read_metadata(path).get("front") != self._fingerprint:
            raise ValueError(
                f"expected the networks of this front in '{path}', found those of another; save the front again"
            )
        states = load_networks(path)
        with torch.inference_mode(mode=False):
            dense = copied(unwrapped(network)).cpu().float()
            dense.eval()
        own = {name: tensor.shape for name, tensor in dense.state_dict().items()}
        found = [{name: tensor.shape for name, tensor in state.items()} for state in states]
        unfit = [
            name
            for shapes in found
            for name in {**own, **shapes}
            if shapes.get(name) != own.get(name)
            and not (self.units == "channels" and _may_be_smaller(name, shapes.get(name), own))
        ]
        if unfit:
            raise ValueError(
                f"expected a network of the architecture that was pruned, found another ({len(own)} tensors, "
                f"{unfit[0]} does not fit); build it with the same arguments"
            )
        self.dense, self.states = dense, states

    @property
    def _fingerprint(self) -> str:
        """A hash of masks and objectives, which tells fronts apart."""
        return hashlib.sha256(self.masks.words.tobytes() + self.objectives.tobytes()).hexdigest()
