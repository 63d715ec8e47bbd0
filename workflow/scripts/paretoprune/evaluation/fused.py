"""Pruned networks as fused programs: weights masked and folded with batch norm, one kernel for each convolution.

On a CPU a step is one oneDNN kernel that convolves, adds the shortcut and applies ReLU on folded weights; on other
devices the same program runs on torch's own operations. Everything from the mask's words to the logits is tensor
arithmetic without a look at the values, so that a GPU can record it once and replay it, see `evaluation.captured`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.evaluation.compile import Registers, compile_network
from paretoprune.evaluation.kernels import Kernels
from paretoprune.masks.packed import WORD_BITS
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import channels_last
from paretoprune.networks.tracing import Convolution, Cut, NotTraceableError, run_call
from paretoprune.repair.batchnorm import Moments, channel_moments
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import repair_named

# Calibration images on which folded weights are compared with measured ones.
N_CENTRING = 16


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
        layout: WeightUnits,
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
        self.layout = layout
        self._dtype, self._kernels = sample.dtype, Kernels(sample.device, sample.dtype, onednn)
        self.compiled = compile_network(network, layout, sample[:2], self._kernels)
        self._steps, self._modules = self.compiled.steps, dict[str, Any](self.compiled.modules)
        self._parts = list(zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), layout.shapes, strict=True))
        self._pruned = self.compiled.dense
        self._folded: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._statistics: dict[str, Moments] = dict(self.compiled.trained)
        self._correct = correct if self.compiled.trained else None
        self._refit = refit
        self._calibration = calibration_images
        self._dense_moments: dict[str, Moments] = {}
        if self._correct is not None:
            with torch.inference_mode():
                self._calibrate(0, calibration_images, {}, observe=True)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Where activations can be kept, first to last."""
        return self.compiled.cuts

    # -------------------------------------------------------------------------------------------------- one candidate

    def prepare(
        self,
        kept: Tensor,
        cut: Cut | None = None,
        calibrated: Tensor | None = None,
        keep: dict[Cut, Tensor] | None = None,
    ) -> None:
        """Mask, repair and fold, see `evaluation.prunable.PrunableNetwork`."""
        start = 0 if cut is None else cut.after + 1
        self._masked(kept, self.compiled.unused.get(start, frozenset()))
        if self._correct is not None:
            self._statistics = dict(self.compiled.trained)
            first = self._calibration if cut is None else calibrated
            assert first is not None
            self._calibrate(start, first, keep or {}, observe=False, cut=cut)
        else:
            self._fold_all(start)

    def answer(self, images: Tensor, cut: Cut | None = None, keep: dict[Cut, Tensor] | None = None) -> Tensor:
        """Logits of a batch, see `evaluation.prunable.PrunableNetwork`."""
        # What was kept at a cut serves others too, and sums are written over their shortcut.
        registers: Registers = {self.compiled.image: images} if cut is None else {cut.register: images.clone()}

        def convolve(index: int, step: Convolution) -> Tensor:
            weight, bias = self._folded[index]
            x = registers[step.input]
            if step.other is None:
                return self._kernels.convolve(self._modules[step.module], x, weight, bias, relu=step.relu)
            if self._kernels.onednn and index in self.compiled.fitting:
                in_place = index in self.compiled.overwriting
                add = self._kernels.convolve_onto if in_place else self._kernels.convolve_and_add
                module, other = self._modules[step.module], registers[step.other]
                return add(module, x, other, (weight, bias), relu=step.relu)
            y = self._kernels.convolve(self._modules[step.module], x, weight, bias, relu=False)
            return self._finish(index, step, registers, y)

        self._run(registers, 0 if cut is None else cut.after + 1, convolve, keep or {})
        logits = registers[self.compiled.answer]
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

    def _masked(self, kept: Tensor, unused: frozenset[str]) -> None:
        """Put the weights of a mask in place; `unused` tensors may be left wrong."""
        if self._refit is None:
            # where, not a product: 0 times an infinite weight would be NaN.
            self._pruned = torch.where(kept, self.compiled.dense, 0.0)
        else:
            refitted = self._refit(kept, unused)
            self._pruned = self.compiled.dense.clone()
            for name, (start, stop, _) in zip(self.layout.names, self._parts, strict=True):
                if name in refitted:
                    self._pruned[start:stop] = refitted[name].reshape(-1)
            for module, bias in self._refit.bias(refitted).items():
                self._modules[module].bias.data.copy_(bias)
        for tensor, place in self.compiled.called:
            start, stop, shape = self._parts[place]
            tensor.data.copy_(self._pruned[start:stop].view(shape))

    def _weight(self, module: str) -> Tensor:
        place = self.compiled.prunable[module]
        if place is None:
            return self.compiled.fixed[module]
        start, stop, shape = self._parts[place]
        return self._pruned[start:stop].view(shape)

    def _fold(self, index: int, step: Convolution) -> None:
        """Fold a convolution with its batch norm, by the statistics as they stand."""
        norm = None if step.norm is None else self._modules[step.norm]
        statistics = None if step.norm is None else self._statistics[step.norm]
        module = self._modules[step.module]
        self._folded[index] = self._kernels.fold(module, self._weight(step.module), norm, statistics)

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
        found = self._kernels.convolve(self._modules[step.module], x, weight, bias, relu=False)
        shift = (found.float() - expected.float()).mean(dim=(0, 2, 3))
        self._folded[index] = (weight, (bias.float() - shift).to(self._dtype))

    def _fold_all(self, start: int = 0) -> None:
        for index, step in enumerate(self._steps[start:], start):
            if isinstance(step, Convolution):
                self._fold(index, step)

    def _calibrate(
        self, start: int, images: Tensor, keep: dict[Cut, Tensor], *, observe: bool, cut: Cut | None = None
    ) -> None:
        """Run the calibration images through masked layers, correct each batch norm on the way, and fold.

        With `observe` the network is dense: its statistics are only noted.
        """
        registers: Registers = {self.compiled.image if cut is None else cut.register: images}
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
                self._statistics[norm] = self._correct(self.compiled.trained[norm], self._dense_moments[norm], moments)

        def convolve(index: int, step: Convolution) -> Tensor:
            module, x, bias = self._modules[step.module], registers[step.input], None
            weight = self._kernels.lay_out(self._weight(step.module))
            if step.norm is None and module.bias is not None:
                bias = module.bias.to(self._dtype)
            y = self._kernels.convolve(module, x, weight, bias, relu=False)
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
            return self._finish(index, step, registers, y)

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
                registers[step.output] = run_call(step, registers, self.compiled.network)
            for node in step.dead:
                del registers[node]
            if index in cuts:
                cut = cuts[index]
                # Kept activations have one layout, so the rest must always begin with it: kernels choose by it.
                registers[cut.register] = channels_last(registers[cut.register])
                if cut in keep:
                    keep[cut].copy_(registers[cut.register])

    def _finish(self, index: int, step: Convolution, registers: Registers, y: Tensor) -> Tensor:
        """Add the shortcut and apply ReLU to a convolution that is done; in place, as `y` is nobody else's."""
        if step.other is not None:
            fits = index in self.compiled.fitting
            y = y.add_(registers[step.other]) if fits else y + registers[step.other]
        return y.relu_() if step.relu else y
