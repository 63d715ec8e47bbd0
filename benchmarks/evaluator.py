"""Images per second of the evaluator on one core, against the usual loop, a tuned loop, and the core's peak."""

import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from paretoprune.devices import computes_bfloat16
from paretoprune.evaluation.evaluator import PopulationEvaluator
from paretoprune.evaluation.task import Task
from paretoprune.masks.packed import PackedMasks
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import to_channels_last
from paretoprune.settings import Compute, Evaluating
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.inputs import images_and_labels, resnet, seconds, side_by_side

USUAL_BATCH, TUNED_BATCH = 1000, 64
DENSITY = 0.3
# Images in a batch of the convolutions that are timed by themselves.
BARE_BATCH = 128
# Products of square matrices that find a core's peak.
PEAK_SIZES = (1024, 2048)


def forward_flop(network: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one image (1, c, h, w) in convolutions and linear layers, two per multiply-add."""
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += 2 * output[0].numel() * weight[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    return total


class EagerLoop:
    """Candidates in torch's eager mode: weights masked and copied into a network, then all images in batches.

    Args:
        network: The dense network.
        layout: Where its prunable weights lie in a mask.
        images: Images (n, c, h, w).
        tuned: bfloat16 and channels last in cache-sized batches; otherwise float32 in large ones.
    """

    def __init__(self, network: nn.Module, layout: WeightUnits, images: Tensor, *, tuned: bool) -> None:
        self._dense = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self._layout, self._images = layout, images
        self._network, self._batch_size = copy.deepcopy(network), USUAL_BATCH
        if tuned:
            dtype = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
            self._network, self._batch_size = to_channels_last(self._network.to(dtype)), TUNED_BATCH
            for module in self._network.modules():
                if isinstance(module, _BatchNorm):
                    module.float()
            self._images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        self._parameters = dict(self._network.named_parameters())

    def __call__(self, mask: np.ndarray) -> Tensor:
        """Logits of all images under a mask bool (n_weights,)."""
        with torch.inference_mode():
            for name, part in self._layout.split(mask).items():
                self._parameters[name].data.copy_(self._dense[name] * torch.from_numpy(part))
            return torch.cat([self._network(batch) for batch in self._images.split(self._batch_size)])


def peak_flop_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest dense matrix product of `PEAK_SIZES` on one core."""
    best = 0.0
    for n in PEAK_SIZES:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        with torch.inference_mode():
            best = max(best, 2 * n**3 / min(seconds(partial(torch.mm, a, b)) for _ in range(3)))
    return best


def bare_convolutions(network: nn.Module, image: Tensor, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Input, weight, stride and padding of every convolution of a network, in the type and layout of the fused path."""
    found: list[tuple[Tensor, ...]] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = (batch, *inputs[0].shape[1:])
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = module.get_parameter("weight").detach().to(dtype).contiguous(memory_format=torch.channels_last)
        found.append((x, weight, torch.tensor(module.stride), torch.tensor(module.padding)))

    handles = [m.register_forward_pre_hook(remember) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    return found


def measure(depths: tuple[int, ...], n_images: int, repeats: int, data: Path | None) -> list[dict[str, Any]]:
    """Measure one row for each depth: images per second of the three loops, and shares of the core's peak."""
    torch.set_num_threads(1)
    images, labels = images_and_labels(n_images, data)
    return [_measure(depth, images, labels, repeats, data) for depth in depths]


def _measure(depth: int, images: Tensor, labels: Tensor, repeats: int, data: Path | None) -> dict[str, Any]:
    dtype = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
    network, n_images = resnet(depth, data), len(images)
    layout = WeightUnits.of(network)
    mask = np.random.default_rng(0).random(layout.n_weights) < DENSITY
    packed = PackedMasks.pack(mask)
    task = Task(network, layout, images, labels, images[:0])
    ours = PopulationEvaluator(task, Evaluating(repair="none"), Compute())
    usual, tuned = (EagerLoop(network, layout, images, tuned=tuned) for tuned in (False, True))
    convolutions = bare_convolutions(network, images[:1], BARE_BATCH, dtype)
    rates: list[float] = []

    def convolve() -> None:
        with torch.inference_mode():
            for x, weight, stride, padding in convolutions:
                functional.conv2d(x, weight, None, stride.tolist(), padding.tolist())

    found = side_by_side(
        {
            "ours": partial(ours, packed),
            "tuned": partial(tuned, mask),
            "usual": partial(usual, mask),
            "convolutions": convolve,
            "peak": lambda: rates.append(peak_flop_rate(dtype)),
        },
        repeats,
    )
    flop, peak = forward_flop(network, images[:1]), median(rates)
    return {
        "depth": depth,
        "precision": ours.precision,
        "images_per_second": round(n_images / found["ours"], 1),
        "images_per_second_tuned": round(n_images / found["tuned"], 1),
        "images_per_second_usual": round(n_images / found["usual"], 1),
        "ratio_usual": round(found["usual"] / found["ours"], 3),
        "ratio_tuned": round(found["tuned"] / found["ours"], 3),
        "mflop_per_image": round(flop / 1e6, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(n_images / found["ours"] * flop / peak, 3),
        "share_of_convolutions": round(found["convolutions"] * n_images / BARE_BATCH / found["ours"], 3),
    }


def measure_workers(depth: int, n_images: int, n_candidates: int, repeats: int, data: Path | None) -> dict[str, Any]:
    """Measure how much faster two worker processes evaluate a population than one process."""
    torch.set_num_threads(1)
    images, labels = images_and_labels(n_images, data)
    network = resnet(depth, data)
    layout = WeightUnits.of(network)
    masks = PackedMasks.pack(np.random.default_rng(0).random((n_candidates, layout.n_weights)) < DENSITY)
    task = Task(network, layout, images, labels, images[:0])
    evaluators = {
        f"workers_{n}": PopulationEvaluator(task, Evaluating(repair="none"), Compute(workers=n)) for n in (1, 2)
    }
    found = side_by_side({name: partial(evaluate, masks) for name, evaluate in evaluators.items()}, repeats)
    for evaluator in evaluators.values():
        evaluator.close()
    return {
        "depth": depth,
        "candidates": n_candidates,
        "images": n_images,
        **{f"seconds_{name}": round(value, 3) for name, value in found.items()},
        "scaling": round(found["workers_1"] / found["workers_2"], 3),
    }
