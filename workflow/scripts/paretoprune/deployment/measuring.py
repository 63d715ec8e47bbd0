"""Measuring a latency table: every block at each of its widths, beside one yardstick."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.deployment.blocks import Block
from paretoprune.deployment.export import Inputs
from paretoprune.deployment.latency import LatencyTable, Widths
from paretoprune.deployment.machines import machine_of
from paretoprune.deployment.running import prepare
from paretoprune.deployment.runtimes import Runtime
from paretoprune.deployment.timing import BOUND, Timings, measure_interleaved
from paretoprune.telling import Telling


def measure_table(
    blocks: Sequence[Block],
    runtime: Runtime,
    *,
    dense: tuple[nn.Module, Inputs] | None = None,
    measure: Callable[..., Timings] = measure_interleaved,
    bound: float = BOUND,
    **options: Any,
) -> LatencyTable:
    """Time every block at each of its points, a block's points in turn.

    The first block at its widest is the yardstick: it is timed beside the points of every block, times are ratios to
    it, and its own is the median of all its measurements. So blocks that were measured at different times compare. What
    a call costs by itself (a module that does nothing) is taken off every time.

    Args:
        blocks: With different names.
        runtime: What they run on.
        dense: The dense network and images for it; what it takes beyond its blocks becomes the table's constant.
            Without it, the constant is the overhead of one call.
        measure: Times functions in turn.
        bound: How well times are to be known, see `measure_interleaved`. The table says whether they are.
        options: Further ones of `measure_interleaved`.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: There is no block, two have one name, two of a kind have different widths, points are no grid, or
            a block cannot be run by the runtime (which is named).
    """
    names = [block.name for block in blocks]
    if not blocks or len(set(names)) < len(names):
        raise ValueError(f"expected blocks with different names, found {', '.join(names) or 'none'}")
    # The first of each kind.
    kinds: dict[tuple[str, str], Block] = {}
    for block in blocks:
        first = kinds.setdefault(_kind(block), block)
        if set(first.points) != set(block.points):
            raise ValueError(
                f"expected blocks of the kind '{block.kind}' with the same widths, found others at '{first.name}' than "
                f"at '{block.name}'; give them different kinds"
            )
    machine = machine_of(runtime)
    yardstick = _prepared(blocks[0], blocks[0].widest, runtime)
    nothing = prepare(nn.Identity(), torch.ones(1, 1), runtime)
    seconds_of_yardstick: list[np.ndarray] = []
    ratios: list[np.ndarray] = []
    overheads: list[float] = []
    uncertainty = 0.0
    telling = Telling("timing blocks")
    options = {"bound": bound, "says_noise": False, **options}
    for i, block in enumerate(kinds.values()):
        # What follows a colon says what its time depends on.
        place = block.name.partition(":")[0]
        telling.what = f"timing block {i + 1} of {len(kinds)}, {place}, at {len(block.points)} widths"
        functions = [yardstick, nothing]
        for point in block.points:
            telling(f"making it {' x '.join(map(str, point))} wide")
            functions.append(_prepared(block, point, runtime))
        timings = measure(functions, progress=telling, **options)
        relative = timings.relative()
        seconds_of_yardstick.append(timings.seconds[:, 0])
        overheads.append(float(relative[1]))
        ratios.append(relative[2:])
        uncertainty = max(uncertainty, float(timings.uncertainties()[2:].max()))
    whole = None
    if dense is not None:
        telling.what = "timing the whole network"
        timings = measure([yardstick, prepare(*dense, runtime)], progress=telling, **options)
        seconds_of_yardstick.append(timings.seconds[:, 0])
        whole = float(timings.relative()[1])
        uncertainty = max(uncertainty, float(timings.uncertainties()[1]))
    unit = float(np.median(np.concatenate(seconds_of_yardstick)))
    overhead = float(np.median(overheads))
    times = {
        kind: {
            point: unit * max(float(ratio) - overhead, 0.0) for point, ratio in zip(block.points, of_block, strict=True)
        }
        for (kind, block), of_block in zip(kinds.items(), ratios, strict=True)
    }
    constant = unit * overhead
    if whole is not None:
        constant = unit * whole - sum(times[_kind(block)][block.widest] for block in blocks if block.is_dense)
    return LatencyTable(
        machine,
        {block.name: times[_kind(block)] for block in blocks},
        constant,
        uncertainty=uncertainty,
        bound=bound,
    )


def _kind(block: Block) -> tuple[str, str]:
    # A kind and a name may be the same word.
    return ("kind", block.kind) if block.kind else ("name", block.name)


def _prepared(block: Block, point: Widths, runtime: Runtime) -> Callable[[], object]:
    try:
        return prepare(*block.make(point), runtime)
    except ValueError as error:
        raise ValueError(f"block '{block.name}' at {point}: {error}") from error
