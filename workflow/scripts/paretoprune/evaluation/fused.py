"""Pruned networks as fused programs: weights masked and folded with batch norm, one kernel for each convolution.

On a CPU a step is one oneDNN kernel that convolves, adds the shortcut and applies ReLU on folded weights; on other
devices the same program runs on torch's own operations. Everything from the mask's words to the logits is tensor
arithmetic without a look at the values, so that a GPU can record it once and replay it, see `evaluation.captured`.
"""

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.masks.packed import WORD_BITS
from paretoprune.masks.units import MaskLayout
from paretoprune.networks.architectures import channels_last, has_running_statistics
from paretoprune.networks.tracing import Call, Convolution, Cut, NotTraceableError, reads, run_call, trace
from paretoprune.repair.batchnorm import Moments, channel_moments
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import repair_named

# Where activations are worth keeping for children that differ later on: shares of the network's arithmetic.
CUT_SHARES = (1 / 3, 2 / 3, 5 / 6)

# Calibration images on which folded weights are compared with measured ones.
N_CENTRING = 16

Registers = dict[fx.Node, Any]


def unpack_words(words: Tensor, n_weights: int) -> Tensor:
    """Masks' words as a tensor of booleans, on the words' own device.

    Args:
        words: int64 (n_words,), the bits of `masks.PackedMasks` reinterpreted as signed.
        n_weights: Bits in use.

    Returns:
        bool (n_weights,).
    """
    shifts = torch.arange(WORD_BITS, device=words.device)
    return ((words[:, None] >> shifts) & 1).view(-1)[:n_weights].to(torch.bool)


def has_fused_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's convolutions with sum and ReLU for a device and a type.

    For bfloat16 oneDNN wants instructions (AVX-512 or newer) that many CPUs lack.
    """
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


class FusedNetwork:
    """One dense network, ready to take any mask.

    Args:
        network: The trained dense network, in evaluation mode; it is left as it is.
        layout: Where its prunable weights lie in a mask.
        sample: A few images (n, c, h, w) as it will be given, on the device and in the type to compute in.
        repair: A key of `repair.repairs.REPAIRS` that changes nothing but batch-norm statistics.
        calibration_images: Images for the repair, like `sample`.
        refit: What re-fits the kept weights; None to leave them as they are.
        onednn: Whether to use oneDNN's fused kernels; by default where they are: on CPUs that torch was built with them
            for, in types that the CPU has instructions for.

    Raises:
        NotTraceableError: The network cannot be turned into a program; the message says why.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: MaskLayout,
        sample: Tensor,
        *,
        repair: str,
        calibration_images: Tensor,
        refit: Refit | None = None,
        onednn: bool | None = None,
    ) -> None:
        correct = repair_named(repair).correct
        if not repair_named(repair).only_recalibrates:
            raise NotTraceableError(f"repair '{repair}' works layer by layer")
        self._dtype, self._device = sample.dtype, sample.device
        self._onednn = has_fused_kernels(sample.device, sample.dtype) if onednn is None else onednn
        self.layout = layout
        program = trace(network)
        self._steps, self._image, self._answer = program.steps, program.image, program.answer
        self._work = program.network.to(self._device)
        self._modules = dict(self._work.named_modules())
        parameters = dict(self._work.named_parameters())
        owner = {id(parameters[name]): i for i, name in enumerate(layout.names)}
        # Prunable tensor of each convolution, by its place in the layout; a weight that two layers share has one place.
        self._prunable = {
            step.module: owner.get(id(self._modules[step.module].weight))
            for step in self._steps
            if isinstance(step, Convolution)
        }
        self._dense = torch.cat([parameters[name].detach().float().reshape(-1) for name in layout.names])
        self._parts = list(zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), layout.shapes, strict=True))
        with torch.no_grad():
            self._fixed = {
                step.module: self._modules[step.module].weight.detach().float().clone()
                for step in self._steps
                if isinstance(step, Convolution) and self._prunable[step.module] is None
            }
        self._called = self._place_calls(owner)
        self._trained = {
            name: (module.running_mean.float().clone(), module.running_var.float().clone())
            for name, module in self._modules.items()
            if has_running_statistics(module)
        }
        self._folded: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._statistics: dict[str, Moments] = dict(self._trained)
        self._correct = correct if self._trained else None
        self._refit = refit
        self._calibration = calibration_images
        self._dense_moments: dict[str, Moments] = {}
        self._sums: dict[int, bool] = {}
        self.cuts: list[Cut] = []
        with torch.inference_mode():
            self.cuts = self._inspect(sample[:2])
            # What runs before a cut may run after it too.
            self._unused = {
                cut.after + 1: cut.parameters - self._weights_of(self._steps[cut.after + 1 :]) for cut in self.cuts
            }
            if self._correct is not None:
                self._masked(None)
                self._calibrate(0, calibration_images, {}, observe=True)

    # ------------------------------------------------------------------------------------------------- preparation

    def _place_calls(self, owner: dict[int, int]) -> list[tuple[Tensor, int]]:
        """Give what calls use its type, and find the prunable tensors that they read.

        Returns:
            Pairs of a tensor that a call reads and the place in the layout that it is filled from.
        """
        types: dict[int, torch.dtype] = {}
        used: dict[int, Tensor] = {}
        for step in self._steps:
            if not isinstance(step, Call):
                continue
            node, dtype = step.output, torch.float32 if step.tail else self._dtype
            if node.op == "call_module":
                module = self._modules[str(node.target)]
                # Statistics rounded to bfloat16 would shift every activation; normalisation mixes the two types.
                keeps_float32 = isinstance(module, _BatchNorm)
                tensors = [*module.parameters(), *module.buffers()]
            elif node.op == "get_attr":
                readers = [s for s in self._steps if isinstance(s, Call) and node in s.output.all_input_nodes]
                dtype = torch.float32 if all(reader.tail for reader in readers) else self._dtype
                keeps_float32, tensors = False, [operator.attrgetter(str(node.target))(self._work)]
            else:
                continue
            for tensor in tensors:
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or keeps_float32:
                    continue
                if types.setdefault(id(tensor), dtype) != dtype:
                    raise NotTraceableError("a weight is shared by layers that compute in different types")
                used[id(tensor)] = tensor
        for key, tensor in used.items():
            tensor.data = tensor.data.to(types[key])
        return [(tensor, owner[key]) for key, tensor in used.items() if key in owner]

    def _inspect(self, sample: Tensor) -> list[Cut]:
        """Run once, see which sums can be written in place, and find the cuts.

        Raises:
            NotTraceableError: The answer is no matrix, or a convolution is given something else than images.
        """
        self._masked(None)
        self._fold_all()
        work: list[float] = []
        alone: list[tuple[int, fx.Node, tuple[int, ...]]] = []
        registers: Registers = {self._image: sample}
        own = {t.untyped_storage().data_ptr() for t in [sample, *self._work.parameters(), *self._work.buffers()]}
        for index, step in enumerate(self._steps):
            work.append(0.0)
            if isinstance(step, Convolution):
                module = self._modules[step.module]
                x = registers[step.input]
                if x.ndim != 4 or x.dtype != self._dtype:
                    raise NotTraceableError(f"'{step.module}' convolves something else than batches of images")
                bare = self._convolve(step, x, *self._folded[index], relu=False)
                work[-1] = bare[0].numel() * prod(module.weight.shape[1:])
                if step.other is not None:
                    other = registers[step.other]
                    same = isinstance(other, Tensor) and other.shape == bare.shape and other.dtype == bare.dtype
                    self._sums[index] = same
                    kept = [v for n, v in registers.items() if n not in step.dead and isinstance(v, Tensor)]
                    busy = own | {v.untyped_storage().data_ptr() for v in kept}
                    step.overwrites_other = (
                        same
                        and step.other in step.dead
                        and step.other is not step.input
                        and other.untyped_storage().data_ptr() not in busy
                        and other.is_contiguous(memory_format=torch.channels_last)
                    )
                registers[step.output] = self._finish(index, step, registers, bare, fused=False)
            else:
                registers[step.output] = run_call(step, registers, self._work)
            for node in step.dead:
                del registers[node]
            live = [node for node in registers if node is not self._image]
            reads_image = any(self._image in reads(later) for later in self._steps[index + 1 :])
            if len(live) == 1 and not reads_image and isinstance(registers[live[0]], Tensor):
                held = registers[live[0]]
                if held.ndim == 4 and held.dtype == self._dtype:
                    alone.append((index, live[0], tuple(held.shape[1:])))
        answer = registers[self._answer]
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(sample):
            raise NotTraceableError("its output is no matrix of logits")
        return self._choose_cuts(alone, work)

    def _choose_cuts(self, alone: list[tuple[int, fx.Node, tuple[int, ...]]], work: list[float]) -> list[Cut]:
        total = sum(work)
        if not total:
            return []
        shares = torch.tensor(work).double().cumsum(0) / total
        chosen: dict[int, Cut] = {}
        norms = [step.norm for step in self._steps]
        # A batch norm is corrected where it runs first, which must not depend on where a candidate begins.
        alone = [entry for entry in alone if not {*norms[: entry[0] + 1]} & {*norms[entry[0] + 1 :]} - {None}]
        for wanted in CUT_SHARES:
            # Of places with the same share the smallest tensor; the last steps before a convolution cost nothing.
            near = [(abs(float(shares[i]) - wanted), prod(shape), i, node, shape) for i, node, shape in alone]
            near = [entry for entry in near if entry[0] < 0.15]
            if near:
                _, _, index, node, shape = min(near, key=lambda entry: entry[:3])
                names = frozenset(self._weights_of(self._steps[: index + 1]))
                chosen[index] = Cut(index, node, shape, names, float(shares[index]))
        return [chosen[index] for index in sorted(chosen)]

    def _weights_of(self, steps: Sequence[Convolution | Call]) -> set[str]:
        """Names of the prunable tensors that some steps read."""
        found: set[str] = set()
        for step in steps:
            if isinstance(step, Convolution):
                place = self._prunable[step.module]
                found.update([] if place is None else [self.layout.names[place]])
            else:
                node = step.output
                tensors = (
                    list(self._modules[str(node.target)].parameters())
                    if node.op == "call_module"
                    else [operator.attrgetter(str(node.target))(self._work)]
                    if node.op == "get_attr"
                    else []
                )
                ids = {id(tensor) for tensor in tensors}
                found.update(self.layout.names[place] for tensor, place in self._called if id(tensor) in ids)
        return found

    # -------------------------------------------------------------------------------------------------- one candidate

    def prepare(
        self,
        kept: Tensor,
        cut: Cut | None = None,
        calibrated: Tensor | None = None,
        keep: dict[Cut, Tensor] | None = None,
    ) -> None:
        """Mask, repair and fold; what `answer` computes afterwards is this candidate.

        Args:
            kept: bool (n_weights,), on the device.
            cut: Begin after this cut: what lies before it is not touched and must not be run.
            calibrated: The calibration images' activations at `cut`, (n_calibration, *cut.shape).
            keep: Gets the calibration images' activations at these cuts: tensors to write into.
        """
        start = 0 if cut is None else cut.after + 1
        self._masked(kept, self._unused.get(start, frozenset()))
        if self._correct is not None:
            self._statistics = dict(self._trained)
            first = self._calibration if cut is None else calibrated
            assert first is not None
            self._calibrate(start, first, keep or {}, observe=False, cut=cut)
        else:
            self._fold_all(start)

    def answer(self, images: Tensor, cut: Cut | None = None, keep: dict[Cut, Tensor] | None = None) -> Tensor:
        """Logits of a batch, float32 (n, n_classes).

        Args:
            images: Images (n, c, h, w), or their activations at `cut`; they are left as they are.
            cut: Where to begin.
            keep: Gets the activations at these cuts: tensors to write into.
        """
        # What was kept at a cut serves others too, and sums are written over their shortcut.
        registers: Registers = {self._image: images} if cut is None else {cut.register: images.clone()}

        def convolve(index: int, step: Convolution) -> Tensor:
            weight, bias = self._folded[index]
            x = registers[step.input]
            if step.other is None:
                return self._convolve(step, x, weight, bias, relu=step.relu)
            if self._sums[index] and self._onednn:
                return self._convolve_and_add(step, x, registers[step.other], weight, bias)
            return self._finish(index, step, registers, self._convolve(step, x, weight, bias, relu=False), fused=True)

        self._run(registers, 0 if cut is None else cut.after + 1, convolve, keep or {})
        logits = registers[self._answer]
        assert isinstance(logits, Tensor)
        return logits.float()

    def logits(self, words: Tensor, batches: Sequence[Tensor]) -> Tensor:
        """From a mask's words to the logits of all images: what a GPU records.

        Args:
            words: int64 (n_words,), see `unpack_words`.
            batches: Images, cut into batches.

        Returns:
            float32 (n, n_classes).
        """
        self.prepare(unpack_words(words, self.layout.n_weights))
        return torch.cat([self.answer(batch) for batch in batches])

    @property
    def can_be_recorded(self) -> bool:
        """Whether all from the mask to the logits is arithmetic of fixed shapes, as a GPU's recording needs."""
        return self._refit is None

    def _masked(self, kept: Tensor | None, unused: frozenset[str] = frozenset()) -> None:
        """Put the weights of a mask in place, or the dense ones; `unused` tensors may be left wrong."""
        if kept is None:
            self._pruned = self._dense
        elif self._refit is None:
            # where, not a product: 0 times an infinite weight would be NaN.
            self._pruned = torch.where(kept, self._dense, 0.0)
        else:
            refitted = self._refit(kept, unused)
            self._pruned = self._dense.clone()
            for name, (start, stop, _) in zip(self.layout.names, self._parts, strict=True):
                if name in refitted:
                    self._pruned[start:stop] = refitted[name].reshape(-1)
            for module, bias in self._refit.bias(refitted).items():
                self._modules[module].bias.data.copy_(bias)
        for tensor, place in self._called:
            start, stop, shape = self._parts[place]
            tensor.data.copy_(self._pruned[start:stop].view(shape))

    def _weight(self, module: str) -> Tensor:
        place = self._prunable[module]
        if place is None:
            return self._fixed[module]
        start, stop, shape = self._parts[place]
        return self._pruned[start:stop].view(shape)

    def _fold(self, index: int, step: Convolution) -> None:
        """Fold a convolution with its batch norm, by the statistics as they stand."""
        module = self._modules[step.module]
        weight, bias = self._weight(step.module), module.bias
        bias = None if bias is None else bias.float()
        if step.norm is not None:
            norm = self._modules[step.norm]
            mean, variance = self._statistics[step.norm]
            scale = torch.rsqrt(variance + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.float()
            weight = weight * scale[:, None, None, None]
            bias = (0.0 if bias is None else bias) - mean
            bias = bias * scale
            if norm.bias is not None:
                bias = bias + norm.bias.float()
        weight = self._lay_out(weight)
        if self._onednn:
            # oneDNN's own order of weights, which it would otherwise make again for every batch.
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry(step), None)
        self._folded[index] = (weight, None if bias is None else bias.to(self._dtype))

    def _centre(self, index: int, step: Convolution, x: Tensor, expected: Tensor) -> None:
        """Take from a folded bias what rounding the folded weights has added to each channel's mean.

        Where pruning leaves a channel almost constant, its small variance magnifies such a shift.

        Args:
            index: Of the step.
            step: The convolution, folded.
            x: Its input for some calibration images.
            expected: Its normalised output for them, as measured.
        """
        weight, bias = self._folded[index]
        assert bias is not None
        found = self._convolve(step, x, weight, bias, relu=False)
        shift = (found.float() - expected.float()).mean(dim=(0, 2, 3))
        self._folded[index] = (weight, (bias.float() - shift).to(self._dtype))

    def _fold_all(self, start: int = 0) -> None:
        for index, step in enumerate(self._steps[start:], start):
            if isinstance(step, Convolution):
                self._fold(index, step)

    def _lay_out(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype).contiguous(memory_format=torch.channels_last)

    def _calibrate(
        self, start: int, images: Tensor, keep: dict[Cut, Tensor], *, observe: bool, cut: Cut | None = None
    ) -> None:
        """Run the calibration images through masked layers, correct each batch norm on the way, and fold.

        With `observe` the network is dense: its statistics are only noted.
        """
        registers: Registers = {self._image if cut is None else cut.register: images}
        done: set[str] = set()

        def meet(norm: str, x: Tensor, offset: Tensor | float) -> None:
            """A layer that runs several times keeps what its first run says."""
            if norm in done:
                return
            done.add(norm)
            mean, variance = channel_moments(x)
            moments = (mean + offset, variance)
            if observe:
                self._dense_moments[norm] = moments
            elif norm in self._dense_moments and self._correct is not None:
                self._statistics[norm] = self._correct(self._trained[norm], self._dense_moments[norm], moments)

        def convolve(index: int, step: Convolution) -> Tensor:
            module, x, bias = self._modules[step.module], registers[step.input], None
            if step.norm is None and module.bias is not None:
                bias = module.bias.to(self._dtype)
            y = self._convolve(step, x, self._lay_out(self._weight(step.module)), bias, relu=False)
            if step.norm is not None:
                # The bias only moves the mean; left out, it costs the activations no digits.
                offset = 0.0 if module.bias is None else module.bias.float()
                meet(step.norm, y, offset)
                norm, (mean, variance) = self._modules[step.norm], self._statistics[step.norm]
                y = nn.functional.batch_norm(
                    y, mean - offset, variance, norm.weight, norm.bias, training=False, eps=norm.eps
                )
            self._fold(index, step)
            if step.norm is not None and self._dtype != torch.float32:
                self._centre(index, step, x[:N_CENTRING], y[:N_CENTRING])
            return self._finish(index, step, registers, y, fused=True)

        def before_call(norm: str, x: Tensor) -> None:
            meet(norm, x, 0.0)
            module, (mean, variance) = self._modules[norm], self._statistics[norm]
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)

        self._run(registers, start, convolve, keep, before_call)

    def _run(
        self,
        registers: Registers,
        start: int,
        convolve: Callable[[int, Convolution], Tensor],
        keep: dict[Cut, Tensor],
        before_norm: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        cuts = {cut.after: cut for cut in self.cuts}
        for index in range(start, len(self._steps)):
            step = self._steps[index]
            if isinstance(step, Convolution):
                registers[step.output] = convolve(index, step)
            else:
                if step.norm is not None and before_norm is not None:
                    before_norm(step.norm, registers[step.output.all_input_nodes[0]])
                registers[step.output] = run_call(step, registers, self._work)
            for node in step.dead:
                del registers[node]
            if index in cuts:
                cut = cuts[index]
                # Kept activations have one layout, so the rest must always begin with it: kernels choose by it.
                registers[cut.register] = channels_last(registers[cut.register])
                if cut in keep:
                    keep[cut].copy_(registers[cut.register])

    # -------------------------------------------------------------------------------------------------------- kernels

    def _finish(self, index: int, step: Convolution, registers: Registers, x: Tensor, *, fused: bool) -> Tensor:
        """Add the shortcut and apply ReLU to a convolution that is done; in place where `x` is nobody else's."""
        if step.other is not None:
            x = x.add_(registers[step.other]) if fused and self._sums[index] else x + registers[step.other]
        return x.relu_() if step.relu else x

    def _geometry(self, step: Convolution) -> tuple[Any, Any, Any, int]:
        module = self._modules[step.module]
        return module.padding, module.stride, module.dilation, module.groups

    def _convolve(self, step: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
        padding, stride, dilation, groups = self._geometry(step)
        if self._onednn:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, padding, stride, dilation, groups, "relu" if relu else "none", [], ""
            )
        y = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y.relu_() if relu else y

    def _convolve_and_add(
        self, step: Convolution, x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        padding, stride, dilation, groups = self._geometry(step)
        geometry: tuple[Any, ...] = (
            weight,
            bias,
            padding,
            stride,
            dilation,
            groups,
            "add",
            1.0,
            "relu" if step.relu else None,
            [],
            "",
        )
        if step.overwrites_other:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *geometry)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *geometry)
