"""What a report is about: its runs, its methods and their reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paretoprune.objectives import reference_point
from paretoprune.settings import Timing

METHOD_KINDS = ("two_phase", "channels", "flat", "allocation")
OBJECTIVES = ("error", "divergence")
DENSITY = ("density",)
# Columns of a front's table that are no costs.
_RESERVED = ("id", "stage", "sparsity", "search_error", "test_error", "method", "seed")


@dataclass(frozen=True)
class Run:
    """One dataset and network, over seeds.

    Attributes:
        dataset: Name of the data.
        network: Name of the network.
        seeds: Seeds, in the order asked for.
        objective: The loss that the search minimised: "error" or "divergence".
        costs: What it minimised beside the loss: density, parameters, macs, bytes, memory or latency, relative to
            the dense network.

    Raises:
        ValueError: The objective is unknown; there is no cost; a cost is named twice, or like another column.
    """

    dataset: str
    network: str
    seeds: tuple[int, ...]
    objective: str
    costs: tuple[str, ...] = DENSITY

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"{self.dataset}/{self.network}: expected objective 'error' or 'divergence', found {self.objective!r}"
            )
        if not self.costs or len(set(self.costs)) < len(self.costs) or set(self.costs) & set(_RESERVED):
            raise ValueError(
                f"{self.dataset}/{self.network}: expected costs with names of their own, each once, found "
                f"{', '.join(self.costs) or 'none'}; name what the search minimised beside the loss, as in front.csv"
            )

    @property
    def only_density(self) -> bool:
        """Whether the density is its only cost."""
        return self.costs == DENSITY

    @property
    def reference_point(self) -> tuple[float, ...]:
        """The reference point of its hypervolumes, on (loss, costs)."""
        return reference_point(("error", *self.costs))

    @property
    def largest_hypervolume(self) -> float:
        """The largest possible hypervolume, of a network without loss and cost."""
        return math.prod(self.reference_point)

    @property
    def title(self) -> str:
        """Its name on the page."""
        return f"{self.dataset} / {self.network}"

    @property
    def anchor(self) -> str:
        """Its name in links and file names."""
        return f"{self.dataset}-{self.network}"


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        runs: In the order of the page.
        kinds: "two_phase", "flat" or "allocation" per method, in the order of tables and legends.
        finetuned: The methods that have a finetuned.csv.
        reference: The method that the others are tested against.
        timed: The methods whose members were timed.
        timing: What on, and how well.
    """

    runs: tuple[Run, ...]
    kinds: dict[str, str]
    finetuned: tuple[str, ...]
    reference: str
    timed: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing)

    @classmethod
    def of(
        cls,
        runs: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        methods: Sequence[str],
        settings: Mapping[str, Any],
    ) -> "Subject":
        """Check what the workflow asks for and make the subject of it.

        Args:
            runs: `dataset`, `network` and `objective` of each run. `seeds` if they differ from the argument `seeds`,
                and `costs` if the density is not the only one.
            seeds: Seeds of a run that does not name its own.
            methods: Methods of every run.
            settings: `method_kinds` has the kind of each method. `finetuned_methods` names those that have a
                finetuned.csv. `reference` is the first method where it is missing or None. `timed_methods`, where there
                are any, have a latency.csv, of times measured as `timing` says.

        Raises:
            ValueError: There is no run, seed or method, a method has no kind, or the reference is not a method.
        """
        for name, wanted in (("runs", runs), ("seeds", seeds), ("methods", methods)):
            if not wanted:
                raise ValueError(f"expected at least one of {name}, found none; name what the report is about")
        kinds = _method_kinds(methods, settings["method_kinds"])
        reference = settings.get("reference") or methods[0]
        if reference not in methods:
            raise ValueError(
                f"expected settings['reference'] to be one of {', '.join(methods)}, found '{reference}'; "
                "correct it, or leave it out for the first"
            )
        about = tuple(
            Run(
                run["dataset"],
                run["network"],
                tuple(run.get("seeds", seeds)),
                run["objective"],
                tuple(run.get("costs", DENSITY)),
            )
            for run in runs
        )
        timed, timing = tuple(settings.get("timed_methods", ())), Timing.of(settings.get("timing", {}))
        return cls(about, kinds, tuple(settings["finetuned_methods"]), reference, timed, timing)


def _method_kinds(methods: Sequence[str], kinds: Mapping[str, str]) -> dict[str, str]:
    """The kind of each compared method.

    Raises:
        ValueError: A method has none, or an unknown one.
    """
    for method in methods:
        if kinds.get(method) not in METHOD_KINDS:
            raise ValueError(
                f"expected the kind of method '{method}' to be one of {', '.join(METHOD_KINDS)}, "
                f"found {kinds.get(method)!r}; correct settings['method_kinds']"
            )
    return {method: kinds[method] for method in methods}
