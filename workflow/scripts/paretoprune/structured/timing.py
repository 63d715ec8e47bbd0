"""Networks against the clock: the latency table of a network, what it predicts, and how long networks really take."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from paretoprune.deployment.latency import Checked, LatencyTable
from paretoprune.deployment.measuring import measure_table
from paretoprune.deployment.running import prepare
from paretoprune.deployment.runtimes import Runtime
from paretoprune.deployment.timing import BOUND, Timings, measure_interleaved
from paretoprune.fronts import Front
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import keep_top, ranks_within_groups
from paretoprune.structured.latency import LatencyCost, layers_of
from paretoprune.structured.units import ChannelUnits
from paretoprune.telling import Telling

# Random networks that the line is fitted to, and those that its error is reported on.
N_FITTED, N_CHECKED = 8, 20
# Share of the branches that vanish in them, of those that may.
VANISHED = 0.15
# Networks that are timed in turn with the whole one.
AT_ONCE = 8
_LOGGER = logging.getLogger("paretoprune")


def measure_latency(
    network: nn.Module,
    units: ChannelUnits,
    image: Tensor,
    runtime: Runtime,
    **options: Any,
) -> LatencyTable:
    """Time every layer of a network at its possible widths, on this machine; progress is logged.

    Args:
        network: The whole network, in evaluation mode; it is left as it is.
        units: What can be cut.
        image: One image (1, ...), normalised.
        runtime: What networks are run by.
        options: Of `deployment.timing.measure_interleaved`.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: A layer or the network cannot be run by it.
    """
    layers = layers_of(network, units, image)
    blocks = [layer.block for layer in layers]
    return measure_table(blocks, runtime, dense=(network, image), measure=measure_interleaved, **options)


def fitted_to_random_networks(
    network: nn.Module,
    units: ChannelUnits,
    image: Tensor,
    table: LatencyTable,
    runtime: Runtime,
    n: int = N_CHECKED,
    seed: int = 0,
    *,
    n_fitted: int = N_FITTED,
    **options: Any,
) -> LatencyTable:
    """Time random small networks beside the whole one, fit a table to some of them, and check it on the others.

    What the table has for each number that is laid out anew, and the line from its predictions to times of networks
    (`LatencyTable.corrected`), are fitted to the first `n_fitted` of them and the whole network.

    Args:
        network: The whole network, in evaluation mode; it is left as it is.
        units: What can be cut.
        image: One image (1, ...), normalised.
        table: Of this network and machine.
        runtime: What networks are run by.
        n: Networks to check predictions on.
        seed: Fixes the networks.
        n_fitted: Networks to fit to, at least 3; 0 leaves the table's times as they are.
        options: Of `deployment.timing.measure_interleaved`.

    Returns:
        The table, which knows how it did on the `n` others (`checked`).

    Raises:
        ValueError: The table is of another network.
    """
    masks = random_networks(units, n_fitted + n, seed)
    cost = LatencyCost.of_network(network, units, image, table)
    slim = (units.slim(network, masks.unpack(i)) for i in range(len(masks)))
    times = time_networks(network, slim, image, runtime, **options)
    measured, fitted = times.relative[1:], np.arange(len(masks)) < n_fitted
    if n_fitted:
        table = _fitted(cost, masks.select(np.flatnonzero(fitted)), measured[fitted])
        cost = LatencyCost(cost.sizes, cost.layers, table)
    predicted = cost.of(masks)
    others = tuple(predicted[~fitted].tolist()), tuple(measured[~fitted].tolist())
    return replace(table, checked=Checked(*others, uncertainty=float(times.uncertainties.max())))


def _fitted(cost: LatencyCost, masks: PackedMasks, measured: np.ndarray) -> LatencyTable:
    """The table of a cost after a fit to networks that take `measured` (n_masks,), relative to the whole one."""
    whole = PackedMasks.pack_each([np.ones(masks.n_units, dtype=bool)], masks.n_units)
    # The whole network counts as much as all others, so that relative latencies start where they should.
    masks = masks.concatenate(whole.select(np.zeros(len(masks), dtype=np.int64)))
    target = np.append(measured, np.ones_like(measured)) * cost.whole
    columns = np.column_stack([cost.seconds(masks), np.full(len(masks), cost.whole), cost.laid_out_anew(masks)])
    scale = np.abs(columns).max(axis=0) + 1e-30
    (slope, _, price), *_ = np.linalg.lstsq(columns / scale / target[:, None], np.ones(len(target)), rcond=None)
    slope, price = slope / scale[0], price / scale[2]
    table = cost.table
    if slope > 0 and price > 0:
        price = price / slope / table.correction.slope
        odd = {layer.name: layer.n_made for layer in cost.layers if layer.aligned is False}
        blocks = {
            name: {widths: seconds + price * odd.get(name, 0) for widths, seconds in times.items()}
            for name, times in table.blocks.items()
        }
        table = replace(table, blocks=blocks)
    corrected = table.corrected(LatencyCost(cost.sizes, cost.layers, table).seconds(masks), target)
    if corrected.correction.slope <= 0:
        # Wider networks would be said to be faster, and a search would keep everything.
        _LOGGER.warning(
            "times of random small networks have nothing to do with those of their layers: the table is not fitted to "
            "them; stop what else runs here and measure again"
        )
        return cost.table
    return corrected


def random_networks(units: ChannelUnits, n: int, seed: int) -> PackedMasks:
    """Masks of networks of all sizes: each keeps a random share of every coupling, and lacks some of the branches.

    Args:
        units: What can be cut.
        n: Number of networks.
        seed: Fixes them.
    """
    rng = np.random.default_rng(seed)
    may_vanish = np.array([coupling.may_vanish for coupling in units.couplings])
    rows = []
    for _ in range(n):
        shares = rng.uniform(rng.uniform(0.0, 0.9), 1.0, units.n_groups)
        n_keep = np.maximum(1, np.rint(shares * units.sizes)).astype(np.int64)
        n_keep[may_vanish & (rng.random(units.n_groups) < VANISHED)] = 0
        rows.append(keep_top(ranks_within_groups(rng.random(units.n_units), units), n_keep, units))
    return PackedMasks.pack_each(rows, units.n_units)


@dataclass(frozen=True)
class NetworkTimes:
    """How long networks take that were timed in turn, the whole one first; arrays are float64 (1 + n_networks,).

    Attributes:
        relative: To the whole network.
        uncertainties: Standard errors of that, as shares of it (`Timings.uncertainties`).
        spreads: How noisy single measurements are (`Timings.spreads`).
        seconds: Of a batch, medians.
        file_bytes: Sizes of the files that the runtime would read; None where it reads none.
    """

    relative: np.ndarray
    uncertainties: np.ndarray
    spreads: np.ndarray
    seconds: np.ndarray
    file_bytes: list[int | None]


def time_networks(
    network: nn.Module,
    slim: Iterable[nn.Module],
    image: Tensor,
    runtime: Runtime,
    **options: Any,
) -> NetworkTimes:
    """Time networks in turn with the whole one; progress is logged, noise is not.

    Args:
        network: The whole network, in evaluation mode.
        slim: Others that take the same images, at least one.
        image: One image (1, ...), normalised.
        runtime: What they are run by.
        options: Of `deployment.timing.measure_interleaved`.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: A network cannot be run by it.
    """
    telling = Telling("timing small networks")
    whole = prepare(network, image, runtime)
    found: list[Timings] = []
    sizes = [whole.file_bytes]
    waiting = iter(slim)
    while group := list(islice(waiting, AT_ONCE)):
        functions = [whole]
        for one in group:
            telling(f"making number {len(sizes)}")
            functions.append(prepare(one, image, runtime))
            sizes.append(functions[-1].file_bytes)
        found.append(measure_interleaved(functions, progress=telling, says_noise=False, **options))

    return NetworkTimes(
        relative=_joined([one.relative() for one in found]),
        uncertainties=_joined([one.uncertainties() for one in found]),
        spreads=_joined([one.spreads for one in found]),
        seconds=_joined([one.medians for one in found]),
        file_bytes=sizes,
    )


def _joined(values: list[np.ndarray]) -> np.ndarray:
    """Values of the whole network and some others, of several groups that each had it; its own are one median."""
    return np.append(np.median([each[0] for each in values]), np.concatenate([each[1:] for each in values]))


def measured_table(
    network: nn.Module,
    units: ChannelUnits,
    image: Tensor,
    runtime: Runtime,
    *,
    n_checked: int = N_CHECKED,
    seed: int = 0,
    **options: Any,
) -> LatencyTable:
    """Measure the latency table of a network, fit it to random small networks, and check it on others.

    Args:
        network: The whole network, in evaluation mode; it is left as it is.
        units: What can be cut.
        image: One image (1, ...), normalised.
        runtime: What networks are run by.
        n_checked: Networks to check predictions on.
        seed: Fixes the random networks.
        options: Of `deployment.timing.measure_interleaved`.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: A layer or the network cannot be run by it.
    """
    _LOGGER.info("measuring a latency table of %s", type(network).__name__)
    table = measure_latency(network, units, image, runtime, **options)
    table = fitted_to_random_networks(network, units, image, table, runtime, n_checked, seed, **options)
    table.report(_LOGGER)
    return table


def front_times(front: Front, image: Tensor, runtime: Runtime, *, bound: float = BOUND, **options: Any) -> NetworkTimes:
    """Time the finished networks of a front in turn with the dense one, and say if they are not known well enough.

    Args:
        front: With its networks.
        image: One image (1, ...), normalised.
        runtime: What networks are run by.
        bound: Of the uncertainty, see `deployment.timing.measure_interleaved`.
        options: Further ones of it.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        RuntimeError: The front has no networks.
        ValueError: A network cannot be run by the runtime.
    """
    if front.dense is None:
        raise RuntimeError("expected a front with its networks, found none; give its dense network and states")
    networks = (front.network(i) for i in range(len(front)))
    times = time_networks(front.dense, networks, image, runtime, bound=bound, **options)
    if times.uncertainties.max() > bound:
        _LOGGER.warning(
            "the machine was noisy: %d of %d networks' times are known worse than to %.1f %%, the worst to %.1f %%; "
            "stop what else runs here and measure again, or allow more rounds",
            (times.uncertainties > bound).sum(), len(front), 100 * bound, 100 * times.uncertainties.max(),
        )  # fmt: skip
    return times


def time_members(front: Front, image: Tensor, runtime: Runtime) -> Front:
    """Time the finished networks of a front in turn with the dense one.

    Args:
        front: With its networks.
        image: One image (1, ...), normalised.
        runtime: What networks are run by.

    Returns:
        The same front with `measured_latency`; without it, and with a warning, if one of the networks cannot be run, as
        a search is not to be lost for that.
    """
    _LOGGER.info("timing %d members beside the dense network", len(front))
    try:
        times = front_times(front, image, runtime)
    except ValueError as error:
        _LOGGER.warning("the members' latencies were not measured: %s", error)
        return front
    return replace(front, measured_latency=times.relative[1:])
