"""Networks timed as the workflow's settings say: the latency table of a network, and the members of a front."""

from typing import Any

from torch import Tensor, nn

from paretoprune.deployment.latency import LatencyTable
from paretoprune.fronts import Front
from paretoprune.networks.costs import count_macs
from paretoprune.settings import LATENCY, Tabulating, Timing
from paretoprune.stages.latency import runtime_of
from paretoprune.structured.timing import front_times, measured_table
from paretoprune.structured.units import ChannelUnits

LATENCY_COLUMNS = ("id", "macs", "predicted", "measured", "uncertainty", "spread", "milliseconds", "bytes")
DENSE = "dense"


def make_table(network: nn.Module, units: ChannelUnits, image: Tensor, settings: Tabulating) -> LatencyTable:
    """Measure the table of a network, and check it.

    Args:
        network: The whole network, in evaluation mode.
        units: What can be cut.
        image: One image (1, ...), normalised.
        settings: What on, and how well.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: A layer or the network cannot be run by it.
    """
    return measured_table(
        network, units, image, runtime_of(settings), n_checked=settings.checked, **measuring_options(settings)
    )


def time_rows(front: Front, image: Tensor, timing: Timing) -> list[dict[str, Any]]:
    """Time the finished networks of a front in turn with the dense one, and describe each with `LATENCY_COLUMNS`.

    Args:
        front: With its networks.
        image: One image (1, ...), normalised.
        timing: What on, and how well.

    Returns:
        A row for the dense network, then one per member: its position in the front, multiply-adds, predicted time
        (empty where the search knew none) and measured time relative to the dense network, the standard error of the
        latter and the spread of single measurements as shares of it, milliseconds of a batch, and bytes of the file
        that the runtime reads (empty where it reads none).

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        RuntimeError: The front has no networks.
        ValueError: A network cannot be run by the runtime.
    """
    times = front_times(front, image, runtime_of(timing), **measuring_options(timing))
    assert front.dense is not None  # by front_times
    whole = count_macs(front.dense, image)
    ids = [DENSE, *range(len(front))]
    every_macs = [1.0, *(count_macs(front.network(i), image) / whole for i in range(len(front)))]
    known = LATENCY in front.names
    predicted = [1.0, *front.objectives[:, front.names.index(LATENCY)].tolist()] if known else [""] * len(ids)
    return [
        dict(zip(LATENCY_COLUMNS, row, strict=True))
        for row in zip(
            ids,
            every_macs,
            predicted,
            times.relative.tolist(),
            times.uncertainties.tolist(),
            times.spreads.tolist(),
            (1e3 * times.seconds).tolist(),
            ["" if size is None else size for size in times.file_bytes],
            strict=True,
        )
    ]


def measuring_options(timing: Timing) -> dict[str, Any]:
    """The settings in the words of `deployment.timing.measure_interleaved`."""
    return {"repeats": timing.repeats, "bound": timing.bound, "most_repeats": timing.most_repeats}
