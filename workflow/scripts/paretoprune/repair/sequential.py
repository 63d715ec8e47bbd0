"""Sequential refit of finished networks: once more, layer by layer, on inputs from the layers already pruned.

`repair.refit` re-fits each layer on the dense network's inputs, so that layers can be put together
freely while a search runs. Here the dense and the pruned network run side by side, and every layer makes up for the
errors of those before it: also for what a shortcut brings in, where the layer's result is added to one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paretoprune.copies import copied
from paretoprune.importance.curvature import damped, elimination_losses
from paretoprune.importance.layer_statistics import (
    POSITIONS,
    Moments,
    im2col,
    output_matrix,
    prunable_modules,
    some_positions,
    weight_matrix,
)
from paretoprune.networks.tracing import Call, Convolution, run_call, trace
from paretoprune.repair.batchnorm import channel_moments, corrected_statistics
from paretoprune.repair.refit import Refit, refit

BATCH_SIZE = 64
# Samples of a layer's columns, for each of its columns: so many output positions of all images are looked at.
SAMPLES_PER_COLUMN = 64
# A channel whose normalised output hardly depends on the convolution cannot make up for a shortcut.
_LEAST_SCALE = 1e-3
Registers = dict[fx.Node, Any]


@dataclass(frozen=True)
class Refined:
    """A finished network.

    Attributes:
        network: A module of its own, on the CPU, in evaluation mode.
        kept: bool (n_weights,), its mask.
    """

    network: nn.Module
    kept: Tensor


class SequentialRefit:
    """Re-fits pruned versions of one dense network, each layer on inputs from the pruned layers before it.

    Args:
        network: The dense network, in evaluation mode, on the device to compute on; it is left as it is.
        refit: Re-fits its layers by themselves. Its weights stay in layers that this pass cannot re-fit; its damping
            and its statistics, which say how much outputs matter, hold here too.
        images: Calibration images (n, c, h, w), normalised, on the same device; all activations of one place in the
            network are held at a time, twice.

    Raises:
        NotTraceableError: The network cannot be turned into a sequence of steps.
    """

    def __init__(self, network: nn.Module, refit: Refit, images: Tensor) -> None:
        self._original, self._refit, self._images = network, refit, images
        self.layout = refit.layout
        self._program = trace(network)
        self._program.network.to(images.device).float()
        held = prunable_modules(network, self.layout)
        runs = Counter(module_of(step) for step in self._program.steps)
        # Of a tensor that several modules or several runs use, no one may take possession.
        self._tensor_of = {
            modules[0][0]: name for name, modules in held.items() if len(modules) == 1 and runs[modules[0][0]] == 1
        }

    def __call__(self, kept: Tensor, *, reselect: bool = False) -> Refined:
        """Build the network of one mask.

        Args:
            kept: bool (n_weights,), on the device.
            reselect: Choose anew which weights of a layer are kept, as many as `kept` says, by the order of elimination
                on the pruned network's own inputs.
        """
        pruned = copied(self._program.network)
        parameters = dict(pruned.named_parameters())
        masks = {
            name: part.view(shape)
            for name, shape, part in zip(
                self.layout.names, self.layout.shapes, kept.split(self.layout.sizes.tolist()), strict=True
            )
        }
        with torch.inference_mode():
            start = self._refit(kept)
            for name, mask in masks.items():
                parameters[name].data = torch.where(mask, start[name].to(parameters[name]), 0.0)
            masks |= _Pass(self, pruned, masks, reselect).run(self._images)
        # Tensors made in inference mode cannot be trained; these are for users, who may fine-tune them.
        with torch.inference_mode(mode=False):
            network = copied(self._original).cpu()
            network.load_state_dict({key: value.clone() for key, value in pruned.state_dict().items()})
        network.eval()
        return Refined(network, torch.cat([masks[name].reshape(-1) for name in self.layout.names]))


class _Pass:
    """One run of the dense and the pruned network side by side."""

    def __init__(self, owner: SequentialRefit, pruned: nn.Module, masks: Mapping[str, Tensor], reselect: bool) -> None:
        self._owner, self._masks, self._reselect = owner, masks, reselect
        self._dense, self._pruned = owner._program.network, pruned
        self._dense_modules = dict(self._dense.named_modules())
        self._modules = dict(pruned.named_modules())
        self._chosen: dict[str, Tensor] = {}
        self._corrected: set[str] = set()
        self._generator = torch.Generator().manual_seed(0)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Re-fit everything on the way from the images to the answer; returns the masks that were chosen anew."""
        program = self._owner._program
        before: Registers = {program.image: images}
        after: Registers = {program.image: images}
        for step in program.steps:
            if isinstance(step, Convolution):
                before[step.output], after[step.output] = self._convolution(step, before, after)
            else:
                before[step.output], after[step.output] = self._call(step, before, after)
            for node in step.dead:
                del before[node], after[node]
        return self._chosen

    def _convolution(self, step: Convolution, before: Registers, after: Registers) -> tuple[Tensor, Tensor]:
        dense, pruned = self._dense_modules[step.module], self._modules[step.module]
        x, x_pruned = before[step.input], after[step.input]
        y = aim = in_batches(dense, x)
        norm = None if step.norm is None else self._dense_modules[step.norm]
        if step.other is not None:
            missing = before[step.other] - after[step.other]
            if norm is not None:
                missing = missing * before_norm(norm).view(1, -1, 1, 1)
            missing = missing.expand(torch.broadcast_shapes(missing.shape, y.shape))
            # One output that is added in many places can make up for their mean.
            wider = [i for i, size in enumerate(y.shape) if size < missing.shape[i]]
            aim = y + (missing.mean(dim=wider, keepdim=True) if wider else missing)
        self._fit(step.module, x_pruned, aim)
        y_pruned = in_batches(pruned, x_pruned)
        if step.norm is not None and norm is not None:
            self._correct(step.norm, channel_moments(aim), channel_moments(y_pruned))
        return (
            completed(y, norm, None if step.other is None else before[step.other], step.relu),
            completed(
                y_pruned,
                None if step.norm is None else self._modules[step.norm],
                None if step.other is None else after[step.other],
                step.relu,
            ),
        )

    def _call(self, step: Call, before: Registers, after: Registers) -> tuple[Any, Any]:
        node = step.output
        result = run_call(step, before, self._dense)
        if node.op == "call_module" and str(node.target) in self._owner._tensor_of:
            self._fit(str(node.target), after[node.all_input_nodes[0]], result)
        if step.norm is not None:
            read = node.all_input_nodes[0]
            self._correct(step.norm, channel_moments(before[read]), channel_moments(after[read]))
        return result, run_call(step, after, self._pruned)

    def _correct(self, norm: str, aim: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
        if norm in self._corrected:
            return
        # One that runs several times keeps what its first run says, as in `repair.batchnorm`.
        self._corrected.add(norm)
        trained, module = self._dense_modules[norm], self._modules[norm]
        mean, variance = corrected_statistics((trained.running_mean, trained.running_var), aim, found)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)

    def _fit(self, module_name: str, x: Tensor, aim: Tensor) -> None:
        """Re-fit one layer so that it makes `aim` of `x`, as well as it can."""
        name = self._owner._tensor_of.get(module_name)
        if name is None or name not in self._owner._refit.statistics:
            return
        dense, module, mask = self._dense_modules[module_name], self._modules[module_name], self._masks[name]
        free = self._owner._refit.statistics[name].shifts_freely
        n_columns = dense.weight[0].numel()
        n_positions = min(POSITIONS, max(1, -(-SAMPLES_PER_COLUMN * n_columns // len(x))))
        moments = Moments()
        for inputs, outputs in zip(x.split(BATCH_SIZE), aim.split(BATCH_SIZE), strict=True):
            at = some_positions(module, outputs, n_positions, self._generator)
            moments.add(im2col(module, inputs, at), output_matrix(module, outputs, at))
        bias = dense.bias
        trained = weight_matrix(module, dense.weight.double())
        held, cross = normal_equations(moments, trained, bias, free, self._owner._refit.damping)
        grouped = weight_matrix(module, mask)
        if self._reselect and not bool(mask.all()):
            grouped = self._selected(name, grouped, held, cross)
            self._chosen[name] = grouped.reshape(mask.shape)
        fitted = refit(trained, grouped, held, cross)
        module.weight.copy_(fitted.reshape(mask.shape).float())
        if bias is not None and free:
            module.bias.copy_(fitted_bias(moments, fitted))

    def _selected(self, name: str, mask: Tensor, curvature: Tensor, cross: Tensor) -> Tensor:
        """As many weights as the mask keeps, those that are eliminated last."""
        best = torch.linalg.solve(curvature, cross.mT).mT
        sensitivity = self._owner._refit.statistics[name].sensitivity.to(mask.device).view(*mask.shape[:2], 1)
        losses = (elimination_losses(best.float().cpu(), curvature.cpu()).to(mask.device) * sensitivity).flatten()
        chosen = torch.zeros_like(losses, dtype=torch.bool)
        chosen[losses.argsort(descending=True, stable=True)[: int(mask.sum())]] = True
        return chosen.view(mask.shape)


def normal_equations(
    moments: Moments, trained: Tensor, bias: Tensor | None, free: bool, damping: float
) -> tuple[Tensor, Tensor]:
    """What the weights that come nearest to the targets solve: curvature @ weights' = cross'.

    Args:
        moments: Of a layer's columns and of its targets.
        trained: float64 (groups, n_rows, n_columns), the weights that the damping holds on to.
        bias: Of the layer; None for none.
        free: Whether the outputs may be off by a constant.
        damping: See `importance.curvature.damped`.

    Returns:
        The damped curvature, float64 (groups, n_columns, n_columns), and float64 (groups, n_rows, n_columns).
    """
    curvature = moments.second(about_mean=free)
    cross = moments.cross(about_mean=free)
    if bias is not None and not free:
        # Without the freedom to shift, the bias is part of what the outputs are.
        cross = cross - bias.double().view(len(trained), -1, 1) * moments.mean[:, None, :]
    held = damped(curvature, damping)
    # The damping holds what the images leave open at the trained weights, not at 0.
    return held, cross + trained * (held - curvature).diagonal(dim1=1, dim2=2)[:, None]


def fitted_bias(moments: Moments, fitted: Tensor) -> Tensor:
    """The bias, float32 (n_rows,), with which re-fitted weights (groups, n_rows, n_columns) meet the targets' means."""
    shift = moments.target_mean - (fitted @ moments.mean[:, :, None])[:, :, 0]
    return shift.reshape(-1).float()


def before_norm(norm: Any) -> Tensor:
    """What one unit behind a batch norm is before it, (channels,); 0 where the norm hardly passes anything on."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    able = scale.abs() > _LEAST_SCALE * scale.abs().max()
    return torch.where(able, 1 / scale, 0.0)


def module_of(step: Convolution | Call) -> str | None:
    """Name of the module that a step runs."""
    if isinstance(step, Convolution):
        return step.module
    return str(step.output.target) if step.output.op == "call_module" else None


def in_batches(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of many images, batch by batch."""
    return torch.cat([module(batch) for batch in x.split(BATCH_SIZE)])


def completed(y: Tensor, norm: nn.Module | None, other: Tensor | None, relu: bool) -> Tensor:
    """Outputs of a convolution after its batch norm, shortcut and ReLU; in place where they keep their shape."""
    if other is not None and torch.broadcast_shapes(y.shape, other.shape) != y.shape:
        y = (y if norm is None else norm(y)) + other
        return y.relu() if relu else y
    # Batch by batch, as all images at once would go through memory in each of the steps.
    for i in range(0, len(y), BATCH_SIZE):
        batch = slice(i, i + BATCH_SIZE)
        z = y[batch] if norm is None else norm(y[batch])
        if other is not None:
            z = z + (other[batch] if len(other) == len(y) else other)
        y[batch] = z.relu() if relu else z
    return y
