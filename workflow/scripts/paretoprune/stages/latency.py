"""Latency in a search: what a table that was measured before says of small networks."""

import os

from torch import Tensor, nn

from paretoprune.deployment.latency import LatencyTable
from paretoprune.deployment.machines import check_machine, machine_of
from paretoprune.deployment.runtimes import Runtime
from paretoprune.settings import Timing
from paretoprune.structured.latency import LatencyCost
from paretoprune.structured.units import ChannelUnits

REMEDY = "snakemake ... --forcerun measure_latency"


def runtime_of(timing: Timing) -> Runtime:
    """What networks will run on."""
    return Runtime(timing.runtime, timing.batch_size, timing.threads)


def read_latency_cost(
    path: str | os.PathLike[str], network: nn.Module, units: ChannelUnits, image: Tensor, timing: Timing
) -> LatencyCost:
    """The cost of masks from the file of a table.

    Args:
        path: The file.
        network: The whole network, in evaluation mode.
        units: What can be cut.
        image: One image (1, ...), normalised.
        timing: What networks will run on.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: The table is damaged, of another machine, or of another network; the message says how to measure
            anew.
    """
    table = LatencyTable.load(path)
    check_machine(table.machine, machine_of(runtime_of(timing)), REMEDY)
    return LatencyCost.of_network(network, units, image, table)
