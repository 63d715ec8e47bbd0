"""A machine without noise, in place of the one that the tests run on."""

import copy
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.deployment import measuring
from paretoprune.deployment.running import Prepared
from paretoprune.deployment.runtimes import Runtime
from paretoprune.deployment.timing import Timings
from paretoprune.structured import timing
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class Bench:
    """A machine whose times are sums over the layers that a network runs, of each a product of widths; no noise."""

    def __init__(self) -> None:
        self.n_timed = 0

    def prepare(self, network: nn.Module, example: Any, runtime: Runtime) -> Prepared:
        """In place of `running.prepare`."""
        seconds = 1e-6  # what a call costs
        network = copy.deepcopy(network).eval()

        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal seconds
            size = prod(output.shape[2:])
            weight = module.weight
            seconds += 1e-9 * size * (weight.numel() + 7 * output.shape[1] + 3 * inputs[0].shape[1] + 20)

        for module in network.modules():
            if isinstance(module, _ConvNd | nn.Linear):
                module.register_forward_hook(see)
        with torch.no_grad():
            network(example)
        return Prepared(partial(float, seconds))

    def measure(self, functions: list[Any], **options: Any) -> Timings:
        """In place of `timing.measure_interleaved`."""
        self.n_timed += len(functions)
        return Timings(np.array([[function() for function in functions]] * 2))


def installed(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Everything that is timed is timed on it."""
    made = Bench()
    for module in (measuring, timing):
        monkeypatch.setattr(module, "prepare", made.prepare)
    monkeypatch.setattr(timing, "measure_interleaved", made.measure)
    return made
