"""Re-fit of small networks: every layer anew in closed form, on its own inputs, towards the whole network's outputs.

All outputs of a layer read the same channels, so that one linear system serves them all. What the whole network says is
gathered once, at some output positions; then a small network needs one pass of its own over the calibration images.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from paretoprune.attention import with_plain_attention
from paretoprune.copies import copied
from paretoprune.importance.curvature import DAMPING
from paretoprune.importance.layer_statistics import (
    POSITIONS,
    Moments,
    im2col,
    output_matrix,
    some_positions,
    weight_matrix,
)
from paretoprune.networks.tracing import Call, Convolution, Program, run_call, trace
from paretoprune.repair.batchnorm import channel_moments, corrected_statistics
from paretoprune.repair.sequential import (
    BATCH_SIZE,
    SAMPLES_PER_COLUMN,
    before_norm,
    completed,
    fitted_bias,
    in_batches,
    module_of,
    normal_equations,
)
from paretoprune.shapes import Emptied
from paretoprune.structured.units import ChannelUnits

Registers = dict[fx.Node, Any]
# Name of a module, and which of the operations of one kind in it.
Place = tuple[str, str, int]


@dataclass(frozen=True)
class Target:
    """What the whole network says of one layer, at some output positions.

    Attributes:
        positions: For each batch of images, flat output positions; None for all.
        outputs: For each batch (groups, n_samples, n_rows).
        other: What is added to the layer's outputs after its norm, in the same form; None for nothing.
        other_place: Where in the network it comes from, see `_places`.
        norm: Name of the batch norm that follows.
        shifts_freely: Whether the outputs may be off by a constant, which the norm or the bias takes.
        spatial: Spatial shape of the outputs.
    """

    positions: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    other: tuple[Tensor, ...] | None
    other_place: Place | None
    norm: str | None
    shifts_freely: bool
    spatial: tuple[int, ...]


class SlimRefit:
    """Builds small networks of one whole network and re-fits them.

    Args:
        network: The whole network, in evaluation mode, on the CPU or the device to compute on; it is left as it is.
        units: What is cut.
        images: Calibration images (n, ...), normalised, on the same device, in random order.
        damping: See `importance.curvature.damped`.
        fits: Whether layers are re-fitted; otherwise the statistics of batch norms are corrected alone.
        seed: Fixes the output positions that are looked at.
        samples_per_column: So many samples of a layer's columns, for each of its columns.

    Raises:
        NotTraceableError: The network cannot be turned into a sequence of steps.
    """

    def __init__(
        self,
        network: nn.Module,
        units: ChannelUnits,
        images: Tensor,
        *,
        fits: bool = True,
        damping: float = DAMPING,
        seed: int = 0,
        samples_per_column: int = SAMPLES_PER_COLUMN,
    ) -> None:
        self._fits, self._samples_per_column = fits, samples_per_column
        self._network, self._units, self._images, self._damping = network, units, images, damping
        self._program = trace(with_plain_attention(copied(network)))
        self._places = _places(self._program)
        self._generator = torch.Generator().manual_seed(seed)
        self._modules = dict(self._program.network.named_modules())
        self._targets: dict[str, Target] = {}
        self._norm_moments: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode():
            self._look()

    def __call__(self, bits: np.ndarray) -> nn.Module:
        """Build and re-fit the network of a mask; layers before the first cut stay as they were trained.

        Args:
            bits: bool (n_units,).

        Returns:
            The network, in evaluation mode.
        """
        kept = self._units.split(bits)
        with torch.inference_mode(mode=False):
            # Tensors made in inference mode could not be trained; this network may be.
            small = self._units.slim(self._network, bits)
            if bits.all():
                return small.eval()
            program = trace(with_plain_attention(copied(small, shares_tensors=True)))
        with torch.inference_mode():
            _Pass(self, program, self._kept_outputs(kept), self._cut_modules(kept)).run(self._images)
        small.load_state_dict(program.network.state_dict())
        return small.eval()

    def _cut_modules(self, kept: dict[str, np.ndarray]) -> set[str]:
        """Names of the modules that lose channels or inputs."""
        return {
            part.tensor.rpartition(".")[0]
            for coupling in self._units.couplings
            if not kept[coupling.name].all()
            for part in coupling.parts
        }

    def _kept_outputs(self, kept: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Which channels each cut layer and norm still has, int64, by the name of its module."""
        stays: dict[str, np.ndarray] = {}
        for coupling in self._units.couplings:
            # Channels of several couplings may lie side by side in a norm.
            found: dict[str, np.ndarray] = {}
            for part in coupling.parts:
                if not part.reads:
                    found[part.tensor.rpartition(".")[0]] = part.stays(kept[coupling.name])
            for name, mask in found.items():
                stays[name] = stays[name] & mask if name in stays else mask
        return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in stays.items()}

    def _look(self) -> None:
        """One pass of the whole network over the images: what each layer says."""
        program, images = self._program, self._images
        registers: Registers = {program.image: images}
        uses = Counter(module_of(step) for step in program.steps)
        for step in program.steps:
            name = module_of(step)
            fits = name is not None and uses[name] == 1 and _can_be_fitted(self._modules[name])
            if isinstance(step, Convolution):
                module = self._modules[step.module]
                outputs = in_batches(module, registers[step.input])
                other = None if step.other is None else registers[step.other]
                if fits:
                    self._note(step.module, outputs, other, step)
                norm = None if step.norm is None else self._modules[step.norm]
                registers[step.output] = completed(outputs, norm, other, step.relu)
            else:
                result = registers[step.output] = run_call(step, registers, program.network)
                if fits and name is not None:
                    self._note(name, result, None, step)
                if step.norm is not None:
                    self._norm_moments[step.norm] = channel_moments(registers[step.output.all_input_nodes[0]])
            for node in step.dead:
                del registers[node]

    def _note(self, name: str, outputs: Tensor, other: Tensor | None, step: Convolution | Call) -> None:
        module: Any = self._modules[name]
        n_columns = module.weight[0].numel()
        n_positions = min(POSITIONS, max(1, -(-self._samples_per_column * n_columns // len(outputs))))
        positions, taken, others = [], [], []
        for i, batch in enumerate(outputs.split(BATCH_SIZE)):
            at = some_positions(module, batch, n_positions, self._generator)
            positions.append(at)
            taken.append(output_matrix(module, batch, at).clone())
            if other is not None:
                others.append(output_matrix(module, _batch(other, i).expand_as(batch), at).clone())
        norm = step.norm if isinstance(step, Convolution) else None
        self._targets[name] = Target(
            tuple(positions),
            tuple(taken),
            tuple(others) if other is not None else None,
            self._places[step.other] if isinstance(step, Convolution) and step.other is not None else None,
            norm,
            norm is not None or module.bias is not None,
            tuple(outputs.shape[2:]) if isinstance(module, nn.modules.conv._ConvNd) else (),
        )


class _Pass:
    """One run of a small network over the images, layer by layer re-fitted.

    Args:
        owner: Knows what the whole network says.
        program: Of the small network, which is changed.
        kept: Channels that cut modules still have, by their names.
        cut: Modules that lose channels or inputs.
    """

    def __init__(self, owner: SlimRefit, program: Program, kept: dict[str, Tensor], cut: set[str]) -> None:
        self._owner, self._program, self._kept, self._cut = owner, program, kept, cut
        self._modules = dict(program.network.named_modules())
        self._corrected: set[str] = set()
        self._begun = False
        self._places = _places(program)

    def run(self, images: Tensor) -> None:
        """Re-fit everything from the first cut layer on."""
        registers: Registers = {self._program.image: images}
        nodes: dict[Place, fx.Node] = {}
        first = next((i for i, step in enumerate(self._program.steps) if self._is_cut(step)), 0)
        for i, step in enumerate(self._program.steps):
            nodes[self._places[step.output]] = step.output
            # Up to here everything is as in the whole network.
            self._begun = i >= first
            if isinstance(step, Convolution):
                self._convolution(step, registers, nodes)
            else:
                self._call(step, registers, nodes)
            for node in step.dead:
                del registers[node]

    def _is_cut(self, step: Convolution | Call) -> bool:
        """Whether a step runs a module that is cut, a part of one, or one that holds some."""
        name = module_of(step)
        return name is not None and any(
            f"{name}.".startswith(f"{cut}.") or f"{cut}.".startswith(f"{name}.") for cut in self._cut
        )

    def _target(self, name: str) -> Target | None:
        """What a module should say, if it is to be re-fitted."""
        return self._owner._targets.get(name) if self._begun else None

    def _convolution(self, step: Convolution, registers: Registers, nodes: dict[Place, fx.Node]) -> None:
        module, x = self._modules[step.module], registers[step.input]
        target = self._target(step.module)
        aims = None
        if target is not None:
            aims = self._aims(step.module, target, registers, nodes)
            self._fit(module, target, x, aims)
        outputs = in_batches(module, x)
        norm = None if step.norm is None else self._modules[step.norm]
        if norm is not None and step.norm is not None and target is not None and aims is not None:
            # Both at the same positions, so that what the choice of positions does to them cancels out.
            found = [_samples(_batch(outputs, i), at) for i, at in enumerate(target.positions)]
            self._correct(step.norm, norm, channel_moments(torch.cat(aims)), channel_moments(torch.cat(found)))
        other = None if step.other is None else registers[step.other]
        registers[step.output] = completed(outputs, norm, other, step.relu)

    def _call(self, step: Call, registers: Registers, nodes: dict[Place, fx.Node]) -> None:
        node = step.output
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        name = str(node.target)
        target = self._target(name) if module is not None else None
        if target is not None and isinstance(module, Emptied):
            if module.bias is not None:
                self._set_constant(name, module, target, registers, nodes)
            if target.norm is not None:
                self._corrected.add(target.norm)
        elif target is not None and module is not None:
            aims = self._aims(name, target, registers, nodes)
            self._fit(module, target, registers[node.all_input_nodes[0]], aims)
        if self._begun and step.norm is not None and step.norm in self._owner._norm_moments and module is not None:
            mean, variance = self._owner._norm_moments[step.norm]
            rows = self._kept.get(step.norm, torch.arange(len(mean)))
            found = channel_moments(registers[node.all_input_nodes[0]])
            self._correct(step.norm, module, (mean[rows], variance[rows]), found)
        registers[node] = run_call(step, registers, self._program.network)

    def _aims(self, name: str, target: Target, registers: Registers, nodes: dict[Place, fx.Node]) -> list[Tensor]:
        """What the layer should make, for each batch: the whole network's outputs, and what its shortcut lacks."""
        rows = self._kept.get(name)

        def own(matrix: Tensor) -> Tensor:
            # Rows of all groups side by side, in the order of the outputs.
            groups, n, n_rows = matrix.shape
            flat = matrix.permute(1, 0, 2).reshape(n, groups * n_rows)
            return flat if rows is None else flat[:, rows]

        outputs = [own(one) for one in target.outputs]
        if target.other is None or target.other_place not in nodes or not self._owner._fits:
            return outputs
        small = registers[nodes[target.other_place]]
        scale = self._scale(target, rows)
        aims = []
        for i, (batch, at, other) in enumerate(zip(outputs, target.positions, target.other, strict=True)):
            now = _batch(small, i)
            if target.spatial:
                now = now.expand(*now.shape[:2], *target.spatial)
            aims.append(batch + (own(other) - _samples(now, at)) * scale)
        return aims

    def _scale(self, target: Target, rows: Tensor | None) -> Tensor | float:
        """What a unit after the norm is before it, for each row; 0 where the norm hardly passes anything on."""
        if target.norm is None:
            return 1.0
        inverse = before_norm(self._owner._modules[target.norm])
        return inverse if rows is None else inverse[rows]

    def _set_constant(
        self, name: str, module: Emptied, target: Target, registers: Registers, nodes: dict[Place, fx.Node]
    ) -> None:
        """A layer that reads nothing makes the mean of what it should make."""
        assert module.bias is not None
        aims = self._aims(name, target, registers, nodes)
        module.bias.copy_(torch.cat(aims).mean(dim=0))

    def _fit(self, module: Any, target: Target, x: Tensor, aims: list[Tensor]) -> None:
        """Re-fit one layer so that it makes its aims of `x`, as well as it can."""
        if not self._owner._fits:
            return
        free, groups = target.shifts_freely, getattr(module, "groups", 1)
        moments = Moments()
        for i, (aim, at) in enumerate(zip(aims, target.positions, strict=True)):
            rows = aim.reshape(len(aim), groups, -1).permute(1, 0, 2)
            moments.add(im2col(module, _batch(x, i), at), rows)
        trained = weight_matrix(module, module.weight.double())
        held, cross = normal_equations(moments, trained, module.bias, free, self._owner._damping)
        factor = torch.linalg.cholesky(held)
        fitted = torch.cholesky_solve(cross.mT, factor).mT
        module.weight.copy_(fitted.reshape(module.weight.shape).float())
        if module.bias is not None and free:
            module.bias.copy_(fitted_bias(moments, fitted))

    def _correct(self, name: str, norm: Any, aim: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
        """Correct the statistics of a batch norm by how its inputs differ from what they should be."""
        if name in self._corrected or norm.running_mean is None:
            return
        self._corrected.add(name)
        if self._owner._fits:
            # Least squares has chosen how large the outputs are: smaller where the inputs say less. To scale them up to
            # the variance of the aims would scale up what they get wrong.
            found = found[0], aim[1]
        mean, variance = corrected_statistics((norm.running_mean, norm.running_var), aim, found)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def _places(program: Program) -> dict[fx.Node, Place]:
    """Where each node of a program stands, which stays the same when other modules lose what they did."""
    counts: Counter[tuple[str, str]] = Counter()
    places = {}
    for node in program.image.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}))
        kind = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", node.op)
        place = (stack[-1] if stack else "", kind)
        places[node] = (*place, counts[place])
        counts[place] += 1
    return places


def _samples(outputs: Tensor, positions: Tensor | None) -> Tensor:
    """Outputs (n, channels, ...) at some flat positions, (n * n_positions, channels); those of a linear layer all."""
    if outputs.ndim < 3:
        return outputs.reshape(-1, outputs.shape[-1])
    flat = outputs.flatten(2)
    flat = flat if positions is None else flat[:, :, positions]
    return flat.permute(0, 2, 1).reshape(-1, flat.shape[1])


def _batch(x: Tensor, i: int) -> Tensor:
    """The i-th batch of images; what is the same for all images is all of it."""
    return x if len(x) == 1 else x[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]


def _can_be_fitted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not isinstance(module, _ConvTransposeNd)
