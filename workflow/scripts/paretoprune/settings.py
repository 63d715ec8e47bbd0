"""Every setting of a method, once: its default, what it may be, and what it means.

The JSON schema, the defaults in `config.yaml` and the table in the documentation follow from these classes, or are held
to them by tests. The rules beside each default are those of JSON schema. Settings are data: nothing here computes, and
nothing here needs more than the standard library, so that a configuration can be checked at once.

Steps of the workflow get the slice of a method's settings that they depend on: `ThresholdStep` and what follows it. Any
other setting may change without running them again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self, TypeVar, get_type_hints

Part = TypeVar("Part", bound="Settings")

SHARE = {"type": "number", "minimum": 0, "maximum": 1}
POSITIVE_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}

# The guide of Phase 2 that is no score: costs of drops and gains of grows as re-fitted for each candidate.
REFIT_GUIDE = "refit"
ALGORITHMS = ("nsga2", "moead")
# Algorithms of the flat search that evaluate groups of weights before they start.
SPARSE_ALGORITHMS = ("sparse_ea", "mskea")
LOSSES = ("error", "divergence")
# The loss that suits a network, see `workflow.configuration.loss_of`.
AUTO = "auto"
COSTS = ("density", "parameters", "macs", "bytes")
# On a machine, as a table of the layers' times predicts it.
LATENCY = "latency"
# Costs of networks that are cut alone: a mask of zeros neither makes activations smaller nor anything faster.
CHANNEL_COSTS = ("memory", LATENCY)
RUNTIMES = ("onnxruntime", "torch", "torch.compile")
# Costs, relative to the whole network, at which a search over channels starts from three allocations each.
CHANNEL_START_COSTS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# With the whole network and the smallest one: candidates that it starts from, at most.
N_CHANNEL_STARTS = 2 + 3 * len(CHANNEL_START_COSTS)


def meaning(description: str, **rule: Any) -> dict[str, Any]:
    """What a field means, and the JSON schema of its values."""
    return {"description": description, "rule": rule}


def setting(default: Any, description: str, **rule: Any) -> Any:
    """A field with its default, its meaning, and the JSON schema of its values; a list stands for a tuple."""
    return field(
        default=tuple(default) if isinstance(default, list) else default, metadata=meaning(description, **rule)
    )


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

    def part(self, kind: type[Part], **changed: Any) -> Part:
        """The settings of another class that these hold too.

        Args:
            kind: The class. A field that these settings lack has its default.
            changed: Values that go first.
        """
        shared = {one.name: getattr(self, one.name) for one in fields(kind) if hasattr(self, one.name)}
        return kind(**{**shared, **changed})


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.plain()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Repairing(Settings):
    """How a pruned network is put right."""

    repair: str = setting("batchnorm", "what is put right in a candidate before it is evaluated", names="repairs")
    repair_images: int | None = setting(
        256, "calibration images that batch-norm statistics of a candidate are corrected on", type="integer", minimum=1
    )
    damping: float = setting(
        0.01,
        "of re-fits: share of the mean diagonal of a layer's curvature that holds weights at the trained ones",
        **POSITIVE_SHARE,
    )
    sequential_refit: bool = setting(
        True,
        "with repair reconstruct, whether finished networks are re-fitted once more, each layer on inputs from the "
        "pruned layers before it; with the weights found and with each layer's chosen anew, of which the better is "
        "kept",
        type="boolean",
    )


@dataclass(frozen=True)
class Evaluating(Repairing):
    """How a pruned network is put right, and what is measured of it."""

    objective: str = setting("error", "the loss that is minimised", enum=list(LOSSES))


@dataclass(frozen=True)
class Arithmetic(Settings):
    """What results of a search may depend on in the last digits."""

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


@dataclass(frozen=True)
class Compute(Arithmetic):
    """What candidates are computed with; results do not depend on processes and memory."""

    device: str = setting("cpu", "where to compute", type="string")
    workers: int = setting(1, "processes of one thread that candidates are evaluated with", type="integer", minimum=1)
    prefix_cache_mb: int = setting(
        0, "memory (MB) for activations that later candidates continue from", type="integer", minimum=0
    )


@dataclass(frozen=True)
class Candidates(Repairing, Arithmetic):
    """How candidates are put right and evaluated while searching, and networks when they are finished."""

    search_repair: str | None = setting(
        None,
        "what is put right while searching, where that is not `repair`; null for the same",
        names="search_repairs",
    )
    candidate_images: int | None = setting(
        None,
        "search images that candidates are evaluated on, null for all; published networks are evaluated on all of them",
        type=["integer", "null"],
        minimum=1,
    )
    empty_layers: str = setting(
        "allow", "whether networks with a layer that keeps nothing may be published", enum=["allow", "forbid"]
    )

    @property
    def repair_in_search(self) -> str:
        """What is put right in candidates."""
        return self.search_repair or self.repair


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
class Densities(Settings):
    """Densities of the methods that do not search, evenly spaced in their logarithm."""

    size: int = setting(40, "number of densities", type="integer", minimum=2)
    lowest: float = setting(0.02, "smallest density", **POSITIVE_SHARE)
    highest: float = setting(0.9, "largest density", **POSITIVE_SHARE)


@dataclass(frozen=True)
class Phase1(Settings):
    """The search over one threshold per layer."""

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
        names="starts",
    )
    start_densities: Sequence[float] = setting(
        [0.8, 0.6, 0.45, 0.35, 0.27, 0.2, 0.15, 0.12, 0.09, 0.07, 0.05, 0.03],
        "densities at which they are put there",
        type="array",
        uniqueItems=True,
        items=POSITIVE_SHARE,
    )

    @property
    def n_starts(self) -> int:
        """Classical allocations in the first population, at most."""
        return len(self.starts) * len(self.start_densities)

    def least_evaluations(self, population: int) -> int:
        """Candidates that Phase 1 needs at least: its starts, one population, and members chosen anew."""
        return self.n_starts + population + self.n_reselected


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

    algorithm: str = setting("nsga2", "evolutionary algorithm", enum=list(ALGORITHMS))
    guides: Sequence[str] = setting(
        ["magnitude", "fisher"],
        "importance scores that moves follow; the first also shapes the first population",
        type="array",
        minItems=1,
        uniqueItems=True,
        names="guides",
    )

    @property
    def scores(self) -> list[str]:
        """The importance scores among the guides."""
        return [guide for guide in self.guides if guide != REFIT_GUIDE]

    @property
    def follows_refits(self) -> bool:
        """Whether moves also follow costs and gains of each candidate as re-fitted."""
        return REFIT_GUIDE in self.guides


@dataclass(frozen=True)
class Flat(Settings):
    """The search over whole masks in one phase."""

    algorithm: str = setting(
        "nsga2",
        "evolutionary algorithm; sparse_ea and mskea first score groups of weights by evaluating networks without them",
        enum=[*ALGORITHMS, *SPARSE_ALGORITHMS],
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

    @property
    def has_scores(self) -> bool:
        """Whether part of the evaluations goes to scores of groups of weights."""
        return self.algorithm in SPARSE_ALGORITHMS


@dataclass(frozen=True)
class Budget(Settings):
    """How many candidates the two phases may evaluate together, and who gets them.

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
            spent: Candidates that Phase 1 has evaluated.
        """
        return self.total - spent if self.phase1 < self.total else 0


@dataclass(frozen=True)
class Method(Publishing, Candidates):
    """Everything that one method may have its own value of; what `search` holds in a configuration."""

    importance: str = setting("magnitude", "score whose ranks the thresholds cut", names="scores")
    objectives: Sequence[str] = setting(
        [AUTO, "density"],
        "what is minimised: one loss, then one or two costs; auto: the divergence from the dense network where a "
        "checkpoint may have seen the search images, the error elsewhere; memory (the largest activations) and "
        "latency, as a table predicts it, where all methods are of kind channels",
        type="array",
        minItems=2,
        maxItems=3,
        uniqueItems=True,
        prefixItems=[{"enum": [AUTO, *LOSSES]}],
        items={"enum": [*COSTS, *CHANNEL_COSTS]},
    )
    evaluations: int = setting(600, "candidates evaluated by a search", type="integer", minimum=1)
    population: int = setting(30, "candidates in a population", type="integer", minimum=4)
    densities: Densities = field(
        default_factory=Densities,
        metadata=meaning("densities of the methods that do not search, evenly spaced in their logarithm"),
    )
    phase1: Phase1 = field(default_factory=Phase1, metadata=meaning("the search over one threshold per layer"))
    anchors: Anchors = field(
        default_factory=Anchors,
        metadata=meaning(
            "the corridor's ends, as shares of the way from the dense network's error to that of guessing"
        ),
    )
    phase2: Phase2 = field(default_factory=Phase2, metadata=meaning("the search over a bit per corridor weight"))
    flat: Flat = field(default_factory=Flat, metadata=meaning("the search over whole masks in one phase"))

    @property
    def objective(self) -> str:
        """The loss; `AUTO` until it is known which network it is for."""
        return self.objectives[0]

    @property
    def costs(self) -> Sequence[str]:
        """What is minimised beside the loss."""
        return self.objectives[1:]

    @property
    def budget(self) -> Budget:
        """How the two phases share the evaluations."""
        return Budget(self.evaluations, self.phase1.share)

    @property
    def threshold_step(self) -> "ThresholdStep":
        """What Phase 1 depends on."""
        return self.part(
            ThresholdStep,
            # What does not matter has its default, so that nothing runs again for its sake.
            phase1=replace(self.phase1, share=Phase1.share),
            sparsities=self.sparsities if self.phase1.n_reselected else (),
            evaluations=self.budget.phase1,
        )

    @property
    def anchor_step(self) -> "AnchorStep":
        """What the choice of anchors depends on."""
        return self.anchors.part(AnchorStep, objective=self.objective)

    @property
    def corridor_step(self) -> "CorridorStep":
        """What Phase 2 depends on, beyond the results of Phase 1."""
        return self.part(CorridorStep, corridors=self.anchors.corridors)

    @property
    def flat_step(self) -> "FlatStep":
        """What a flat search depends on."""
        flat = self.flat if self.flat.has_scores else replace(self.flat, score_share=Flat.score_share)
        return self.part(FlatStep, flat=flat)


@dataclass(frozen=True)
class ComparedMethod(Method):
    """A method as `method_settings` names it."""

    kind: str = field(
        kw_only=True,
        metadata=meaning(
            "two_phase searches thresholds and then the corridor, flat whole masks, allocation does not search; "
            "channels searches in two phases what can be cut out (channels, heads, branches): networks get smaller",
            enum=["two_phase", "flat", "allocation", "channels"],
        ),
    )
    phase1_from: str | None = setting(None, "the method whose Phase 1 is continued instead of one's own", type="string")
    allocation: str | None = setting(None, "of kind allocation: how much each layer keeps", names="allocations")

    @property
    def allocation_step(self) -> "AllocationStep":
        """What an allocation baseline depends on."""
        return self.part(AllocationStep)

    @property
    def channel_step(self) -> "ChannelStep":
        """What a search over channels depends on."""
        return self.part(ChannelStep, share=self.phase1.share)


@dataclass(frozen=True)
class Timing(Settings):
    """What networks will run on, and how well their times are to be known."""

    runtime: str = setting("onnxruntime", "what networks will run on", enum=list(RUNTIMES))
    batch_size: int = setting(1, "images that will arrive at a time", type="integer", minimum=1)
    threads: int = setting(1, "threads that will compute one batch", type="integer", minimum=1)
    repeats: int = setting(20, "rounds of measurements at first", type="integer", minimum=2)
    bound: float = setting(
        0.02,
        "largest standard error of a time relative to another, as a share, that is good enough; above it further "
        "rounds are measured",
        **POSITIVE_SHARE,
    )
    most_repeats: int = setting(
        100, "rounds at most; if the bound is not met by then, log and report say so", type="integer", minimum=2
    )


@dataclass(frozen=True)
class Tabulating(Timing):
    """What the latency table of a network depends on."""

    checked: int = setting(
        20, "random smaller networks that the table's predictions are checked on", type="integer", minimum=1
    )


@dataclass(frozen=True)
class Latency(Tabulating):
    """Times of networks on this machine."""

    measure: bool = setting(
        False,
        "whether members of methods of kind channels are timed; those of a search after latency always are",
        type="boolean",
    )

    @property
    def timing(self) -> Timing:
        """What times of members depend on."""
        return self.part(Timing)

    @property
    def tabulating(self) -> Tabulating:
        """What the table depends on."""
        return self.part(Tabulating)


# What each step of the workflow depends on


@dataclass(frozen=True)
class Searching(Evaluating, Candidates):
    """What every step that evaluates candidates depends on.

    Attributes:
        costs: Names of what is minimised beside the loss.
    """

    costs: Sequence[str] = ("density",)

    @property
    def evaluating(self) -> Evaluating:
        """How finished networks are made and evaluated."""
        return self.part(Evaluating)

    @property
    def search_evaluating(self) -> Evaluating:
        """How candidates are put right and evaluated."""
        return self.part(Evaluating, repair=self.repair_in_search)

    def compute(self, device: str, workers: int = 1, prefix_cache_mb: int = 0) -> Compute:
        """What candidates are computed with, given what a step was granted."""
        return self.part(Compute, device=device, workers=workers, prefix_cache_mb=prefix_cache_mb)


@dataclass(frozen=True, kw_only=True)
class ThresholdStep(Searching):
    """What Phase 1 depends on.

    Attributes:
        importance: Score whose ranks the thresholds cut.
        phase1: Rungs, switches and starts; its share counts in `evaluations` alone.
        sparsities: Where members are chosen anew, those that are wanted; otherwise none.
        evaluations: Candidates of Phase 1.
        population: Candidates in a population.
    """

    importance: str
    phase1: Phase1
    sparsities: Sequence[float]
    evaluations: int
    population: int


@dataclass(frozen=True, kw_only=True)
class AnchorStep(Anchors):
    """What the choice of anchors depends on.

    Attributes:
        objective: The loss, which says what the dense network has of it.
    """

    objective: str


@dataclass(frozen=True, kw_only=True)
class CorridorStep(Searching, Publishing):
    """What Phase 2 depends on, beyond the results of Phase 1.

    Attributes:
        phase2: Algorithm, guides and moves.
        corridors: Corridors along the front; 0 searches all masks.
        budget: What both phases may evaluate together.
        population: Candidates in a population.
    """

    phase2: Phase2
    corridors: int
    budget: Budget
    population: int


@dataclass(frozen=True, kw_only=True)
class FlatStep(Searching, Publishing):
    """What a flat search depends on.

    Attributes:
        flat: Algorithm and moves.
        evaluations: Candidates.
        population: Candidates in a population.
    """

    flat: Flat
    evaluations: int
    population: int


@dataclass(frozen=True, kw_only=True)
class ChannelStep(Searching, Publishing):
    """What a search over channels depends on.

    Attributes:
        evaluations: Candidates of both phases.
        population: Candidates in a population.
        share: Phase 1's part of the evaluations.
        anchors: The corridor's ends.
        phase2: Algorithm and moves.
    """

    evaluations: int
    population: int
    share: float
    anchors: Anchors
    phase2: Phase2

    @property
    def phase1(self) -> Phase1:
        """Phase 1 as this step knows it."""
        return Phase1(share=self.share)


@dataclass(frozen=True, kw_only=True)
class AllocationStep(Searching, Publishing):
    """What an allocation baseline depends on.

    Attributes:
        importance: Score whose order decides within a layer.
        allocation: How much each layer keeps.
        densities: At which densities.
    """

    importance: str
    allocation: str
    densities: Densities
