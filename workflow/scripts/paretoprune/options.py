"""The options of the library's functions, checked before any work: each error names the option and what it may be."""

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretoprune.deployment.latency import LatencyTable
from paretoprune.deployment.machines import check_machine, machine_of
from paretoprune.deployment.running import check_runtime
from paretoprune.deployment.runtimes import Runtime
from paretoprune.networks.costs import COSTS
from paretoprune.repair.repairs import REPAIRS
from paretoprune.settings import LATENCY, LOSSES
from paretoprune.structured.units import SLIM_COSTS

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Defaults:
    """What `pareto_prune` does where nothing is said, for one kind of units.

    Attributes:
        repair: The repair.
        evaluations: Number of candidates.
        objectives: The loss, and a cost.
        costs: Costs that these units can have.
    """

    repair: str
    evaluations: int
    objectives: tuple[str, ...]
    costs: tuple[str, ...]


UNITS = {
    "weights": Defaults("batchnorm", 2000, ("error", "density"), tuple(COSTS)),
    # A candidate takes seconds, as it is re-fitted layer by layer; on a few hundred images the divergence says more.
    "channels": Defaults("reconstruct", 300, ("divergence", "macs"), (*SLIM_COSTS, LATENCY)),
}


def defaults_of(units: Any) -> Defaults:
    """The defaults for a kind of units.

    Raises:
        ValueError: There is no such kind.
    """
    if not isinstance(units, str) or units not in UNITS:
        raise ValueError(f"expected `units` among {', '.join(UNITS)}, found {units!r}; choose one")
    return UNITS[units]


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number in a range; a float that is one is taken, as 1e3.

    Raises:
        ValueError: It is none, or lies outside.
    """
    span = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    found = None
    if isinstance(value, float | np.floating):
        found = int(value) if float(value).is_integer() else None
    elif not isinstance(value, bool | np.bool_):
        try:
            found = operator.index(value)
        except TypeError:
            found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"expected `{name}` as a whole number{span}, found {value!r}; give one, such as {least or 1}")
    return found


def truth(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ValueError: It is anything else.
    """
    if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
        raise ValueError(f"expected `{name}` as True or False, found {value!r}; give one of them")
    return bool(value)


def repair_name(value: Any) -> str:
    """The name of a repair.

    Raises:
        ValueError: There is no such repair.
    """
    if not isinstance(value, str) or value not in REPAIRS:
        raise ValueError(f"`repair`: expected a repair mode among {', '.join(REPAIRS)}, found {value!r}; choose one")
    return value


def objective_names(values: Any, known: Sequence[str] = tuple(COSTS)) -> tuple[str, list[str]]:
    """The loss, and the costs, which are among those that are known.

    Raises:
        ValueError: They are no loss and one or two costs, or unknown.
    """
    usage = "give a loss and costs, such as ('error', 'density')"
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"expected `objectives` as a sequence of names, found {values!r}; {usage}")
    if len(values) not in (2, 3) or len(set(values)) < len(values):
        found = ", ".join(values) or "nothing"
        raise ValueError(f"`objectives`: expected a loss and one or two costs, each once, found {found}; {usage}")
    loss, *costs = values
    if loss not in LOSSES:
        raise ValueError(
            f"`objectives`: expected a loss among {', '.join(LOSSES)} as first objective, found '{loss}'; {usage}"
        )
    unknown = [cost for cost in costs if cost not in known]
    if unknown:
        raise ValueError(f"`objectives`: expected costs among {', '.join(known)}, found {', '.join(unknown)}; {usage}")
    return loss, costs


@dataclass(frozen=True)
class LatencySource:
    """Where predicted times of networks come from.

    Attributes:
        runtime: What networks are timed by.
        table: Times of layers; None to measure them.
        path: Where a table that is measured is written; None for nowhere.
    """

    runtime: Runtime
    table: LatencyTable | None
    path: Path | None


def latency_source(objectives: Sequence[str], runtime: Any, table: Any) -> LatencySource | None:
    """The options for a search after latency; None where that is no objective.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: They are given without that objective, are of another type, or the table is of another machine.
    """
    if LATENCY not in objectives:
        if runtime is not None or table is not None:
            raise ValueError(
                f"expected neither `runtime` nor `latency_table` with the objectives {', '.join(objectives)}; give "
                "objectives=('divergence', 'latency'), or leave them out"
            )
        return None
    path = None
    if isinstance(table, str | os.PathLike):
        path = Path(table).expanduser()
        table = LatencyTable.load(path) if path.exists() else None
    if not isinstance(table, LatencyTable | None):
        raise ValueError(
            f"expected `latency_table` as a LatencyTable, or the path of its file, found {type(table).__name__}; leave "
            "it out to measure one"
        )
    if runtime is None and table is not None:
        known = table.machine
        device = "cpu" if known.device == "cpu" else "cuda"
        runtime = Runtime(known.runtime, known.batch_size, known.threads, device)
    runtime = Runtime() if runtime is None else runtime
    if not isinstance(runtime, Runtime):
        raise ValueError(
            f"expected `runtime` as a Runtime, found {runtime!r}; give "
            "paretoprune.deployment.runtimes.Runtime('onnxruntime', batch_size=1)"
        )
    check_runtime(runtime)
    if table is not None:
        check_machine(table.machine, machine_of(runtime), "pareto_prune(..., latency_table=None)")
    return LatencySource(runtime, table, path)


def patterns(name: str, values: Any) -> tuple[str, ...]:
    """Shell patterns; a single one may stand by itself.

    Raises:
        ValueError: They are no strings.
    """
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"expected `{name}` as names or patterns of weights, found {values!r}; give ['head.*'] or ()")
    return tuple(values)


def usable_device(value: Any) -> torch.device:
    """The device of a name; None for a GPU where there is one, the CPU otherwise.

    Raises:
        ValueError: There is no such device here, or nothing can be computed on it.
    """
    has_gpu = torch.cuda.is_available()
    if value is None:
        return torch.device("cuda" if has_gpu else "cpu")
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if has_gpu else 0))]
    remedy = f"this machine has {', '.join(here)}; choose one, or None for the fastest"
    if isinstance(value, bool) or not isinstance(value, str | torch.device | int):
        raise ValueError(f"expected `device` as a name or a torch.device, found {value!r}; {remedy}")
    try:
        device = torch.device(value)
        if float(torch.ones(1, device=device).item()) != 1:
            raise RuntimeError("it does not compute")
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"expected `device` to be one that torch can use, found {str(value)!r} ({reason}); {remedy}"
        ) from error
    return device
