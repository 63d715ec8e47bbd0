"""Every setting of a method, once: its default, what it may be, and what it means.

The JSON schema, the defaults in `config.yaml` and the table in the documentation follow from these classes, or are held
to them by tests. The rules beside each default are those of JSON schema. Settings are data: nothing here computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self, get_type_hints

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
POSITIVE_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
LOSSES = ("error", "divergence")
# Flat algorithms that judge groups of weights before they start, see `search.sparse_ea`.
SPARSE_ALGORITHMS = ("sparse_ea", "mskea")
# The guide of Phase 2 that is no score: costs of drops and gains of grows as re-fitted for each candidate.
REFIT_GUIDE = "refit"


def setting(default: Any, description: str, **rule: Any) -> Any:
    """A field with its default, its meaning, and the JSON schema of its values; a list becomes a tuple."""
    if isinstance(default, list):
        default = tuple(default)
    return field(default=default, metadata={"description": description, "rule": rule})


def section(kind: type, description: str) -> Any:
    """A field that is a group of settings."""
    return field(default_factory=kind, metadata={"description": description})


@dataclass(frozen=True)
class Settings:
    """A group of settings."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from plain values, as they stand in a configuration; what is missing has its default.

        Args:
            values: Values by name; groups inside are mappings. Names that are no field are ignored.
        """
        types = get_type_hints(cls)
        found: dict[str, Any] = {}
        for one in fields(cls):
            if one.name not in values:
                continue
            value = values[one.name]
            if is_dataclass(types[one.name]) and isinstance(value, Mapping):
                value = types[one.name].of(value)
            elif isinstance(value, list):
                value = tuple(value)
            found[one.name] = value
        return cls(**found)

    def plain(self) -> dict[str, Any]:
        """Undo `of`: values that JSON and YAML can hold, in the order of the fields."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.plain()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Judging(Settings):
    """How a pruned network is put right, and what is measured of it."""

    repair: str = setting("batchnorm", "what is put right in a candidate before it is judged")
    repair_images: int | None = setting(
        256, "calibration images that batch-norm statistics of a candidate are corrected on", type="integer", minimum=1
    )
    damping: float = setting(
        0.01,
        "of re-fits: share of the mean diagonal of a layer's curvature that holds weights at the trained ones",
        **POSITIVE_SHARE,
    )
    refine: bool = setting(
        True,
        "with repair reconstruct, whether finished networks are re-fitted once more, each layer on inputs from the "
        "pruned layers before it; with the weights found and with each layer's chosen anew, of which the better "
        "is kept",
        type="boolean",
    )
    objective: str = setting("error", "the loss that is minimised", enum=list(LOSSES))


@dataclass(frozen=True)
class Compute(Settings):
    """What candidates are computed with; results do not depend on processes and memory."""

    precision: str = setting(
        "auto",
        "of weights and activations during the search; auto: bfloat16 where the device has arithmetic for it",
        enum=["auto", "float32", "bfloat16"],
    )
    batch_size: int | str = setting(
        "auto",
        "images per forward pass; auto: by their size",
        oneOf=[{"type": "integer", "minimum": 1}, {"const": "auto"}],
    )
    device: str = setting("cpu", "where to compute", type="string")
    workers: int = setting(1, "processes of one thread that candidates are judged with", type="integer", minimum=1)
    prefix_cache_mb: int = setting(
        0, "memory (MB) for activations that later candidates continue from", type="integer", minimum=0
    )


@dataclass(frozen=True)
class Searching(Judging):
    """How candidates are judged during a search, and which may be published.

    What `Judging` says holds for finished networks.
    """

    search_repair: str | None = setting(
        None, "what is put right while searching, where that is not `repair`; null for the same"
    )
    candidate_images: int | None = setting(
        None,
        "search images that candidates are judged on, null for all; published networks are judged on all of them",
        type=["integer", "null"],
        minimum=1,
    )
    empty_layers: str = setting(
        "allow", "whether networks with a layer that keeps nothing may be published", enum=["allow", "forbid"]
    )
    costs: Sequence[str] = setting(
        ["density"], "what is minimised beside the loss", type="array", minItems=1, maxItems=2
    )


@dataclass(frozen=True)
class Phase1(Settings):
    """The search over one threshold per group."""

    share: float = setting(0.5, "share of the evaluations that Phase 1 gets; 1 for no Phase 2", **POSITIVE_SHARE)
    rungs: int | None = setting(
        None,
        "densities that a layer may have, so that what is worked out for one serves all; null for any",
        type=["integer", "null"],
        minimum=2,
        maximum=1000,
    )
    level_switches: float = setting(
        0.0, "share of the children that move layers along the rungs at constant total density", **SHARE
    )
    n_reselected: int = setting(
        0,
        "members of the front whose weights are chosen anew on the pruned network's own inputs",
        type="integer",
        minimum=0,
    )
    starts: Sequence[str] = setting(
        ["uniform", "global_magnitude", "lamp", "erdos_renyi_kernel"],
        "classical allocations in the first population",
        type="array",
        uniqueItems=True,
    )
    start_densities: Sequence[float] = setting(
        [0.8, 0.6, 0.45, 0.35, 0.27, 0.2, 0.15, 0.12, 0.09, 0.07, 0.05, 0.03],
        "densities at which they are put there",
        type="array",
        uniqueItems=True,
        items=POSITIVE_SHARE,
    )


@dataclass(frozen=True)
class Anchors(Settings):
    """The corridor's ends, as shares of the way from the dense network's error to that of guessing."""

    light_tolerance: float = setting(0.01, "the light anchor is the sparsest member within this", **SHARE)
    heavy_tolerance: float = setting(0.8, "the heavy anchor is the sparsest member within this", **SHARE)
    corridors: int = setting(
        1,
        "corridors along the front, searched one by one; 0 searches all masks",
        type="integer",
        minimum=0,
        maximum=100,
    )


@dataclass(frozen=True)
class Moves(Settings):
    """How candidates of Phase 2 are varied."""

    adaptive: bool = setting(True, "whether the choice and the size of moves learn from their success", type="boolean")
    softness: float = setting(0.05, "noise on importance, in ranks within a layer (0 to 1)", **POSITIVE_SHARE)
    first_rate: float = setting(0.02, "share of the corridor's bits that a move changes at first", **POSITIVE_SHARE)
    crossover_probability: float = setting(0.3, "probability that a child mixes two parents", **SHARE)


@dataclass(frozen=True)
class Phase2(Moves):
    """The search over a bit per corridor weight."""

    algorithm: str = setting("nsga2", "evolutionary algorithm")
    guides: Sequence[str] = setting(
        ["magnitude", "fisher"],
        "importance scores that moves follow; the first also shapes the first population",
        type="array",
        minItems=1,
        uniqueItems=True,
    )


@dataclass(frozen=True)
class Flat(Settings):
    """The search over whole masks in one phase."""

    algorithm: str = setting(
        "nsga2",
        "evolutionary algorithm; sparse_ea and mskea first score groups of weights by judging networks without them",
    )
    flip_rate: float = setting(
        0.001,
        "probability of each bit to flip in a mutation; of sparse_ea and mskea the smallest step, as a share of the "
        "kept weights",
        **POSITIVE_SHARE,
    )
    score_share: float = setting(
        0.05,
        "share of the evaluations that sparse_ea and mskea spend on scores",
        type="number",
        exclusiveMinimum=0,
        exclusiveMaximum=1,
    )


@dataclass(frozen=True)
class Densities(Settings):
    """Densities of the methods that do not search, evenly spaced in their logarithm."""

    size: int = setting(40, "number of densities", type="integer", minimum=2)
    lowest: float = setting(0.02, "smallest density", **POSITIVE_SHARE)
    highest: float = setting(0.9, "largest density", **POSITIVE_SHARE)


@dataclass(frozen=True)
class Publishing(Settings):
    """Which members of a front are published."""

    front_size: int | None = setting(
        60, "largest number of members that are published, null for all", type=["integer", "null"], minimum=2
    )
    sparsities: Sequence[float] = setting(
        [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
        "the least pruned members beyond these stay when a front is thinned",
        type="array",
        uniqueItems=True,
        items=SHARE,
    )


@dataclass(frozen=True)
class Budget:
    """How many candidates the two phases may judge together, and who gets them.

    Attributes:
        total: Candidates of both phases.
        share: Of Phase 1; 1 for no Phase 2.
    """

    total: int
    share: float

    @property
    def phase1(self) -> int:
        """Candidates of Phase 1."""
        return round(self.total * self.share)

    def phase2(self, spent: int) -> int:
        """Candidates of Phase 2: its own, and those that Phase 1 left, as a small front fills no reselection.

        Args:
            spent: Candidates that Phase 1 has judged.
        """
        return self.total - spent if self.phase1 < self.total else 0
