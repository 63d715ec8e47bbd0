"""Recalibration: batch-norm statistics of a pruned network, corrected relative to the dense one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.networks.architectures import has_running_statistics

# Mean and variance per channel, each float32 (channels,).
Moments = tuple[Tensor, Tensor]
# Statistics to normalise by, from those of the trained, and from moments of the dense and of the pruned network.
Correction = Callable[[Moments, Moments, Moments], Moments]

# Numbers of a channel that are added up at a time.
PORTION = 8192
# Smallest variance that is told from rounding, as a share of the squared mean.
RESOLUTION = 1e-8


def _norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """Batch-norm layers that use running statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and has_running_statistics(module)
    }


def channel_moments(x: Tensor) -> Moments:
    """Mean and biased variance per channel of activations (n, channels, ...), in float32."""
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return mean, variance
    # The kernel of batch norm's own training mode: ten times faster on a CPU than torch.var_mean.
    # Running statistics, though not updated, make it answer in their type rather than in that of the activations.
    unused = torch.zeros(2, x.shape[1])
    # It adds up number by number; in portions, a channel that hardly varies keeps its digits.
    portions = x.split(max(1, PORTION // x[0, 0].numel()))
    moments = [torch.batch_norm_update_stats(portion, unused[0], unused[1], 0.0) for portion in portions]
    means, variances = (torch.stack(found) for found in zip(*moments, strict=True))
    weights = torch.tensor([len(portion) / len(x) for portion in portions])[:, None]
    mean = (means * weights).sum(dim=0)
    variance = ((variances + (means - mean).square()) * weights).sum(dim=0)
    # Less than the sums resolve is rounding: the channel is constant, and any of its numbers is the mean.
    constant = variance <= RESOLUTION * mean.square()
    first = x[0].reshape(x.shape[1], -1)[:, 0].float()
    return torch.where(constant, first, mean), torch.where(constant, 0.0, variance)


def corrected_statistics(trained: Moments, dense: Moments, pruned: Moments) -> Moments:
    """Batch-norm statistics of a pruned network, corrected relative to the dense one; see `Recalibration`.

    Args:
        trained: The dense network's running mean and variance, each float32 (channels,).
        dense: Mean and variance of its activations on the calibration images.
        pruned: Mean and variance of the pruned network's activations on the same images.

    Returns:
        Mean and variance to normalise by.
    """
    (mean, variance), (dense_mean, dense_variance), (pruned_mean, pruned_variance) = trained, dense, pruned
    # A channel that is constant in the dense network has no scale to compare with.
    ratio = torch.where(dense_variance > 0, pruned_variance / dense_variance.clamp_min(1e-30), 1.0)
    return pruned_mean + (mean - dense_mean) * ratio.sqrt(), variance * ratio


@contextmanager
def _before_each_norm(network: nn.Module, action: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: action(name, module, inputs[0]))
        for name, module in _norms(network).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recalibration:
    """Repair `batchnorm`: corrects batch-norm statistics on calibration images, relative to the dense network.

    With (m_d, v_d) the dense and (m_p, v_p) the pruned network's statistics on the same images and (m, v) the trained
    ones, a layer gets m' = m_p + (m - m_d) sqrt(v_p / v_d) and v' = v v_p / v_d. A network without pruned weights is
    therefore left as it was trained, which statistics taken afresh from a few images would not do. The layers are
    corrected in the order in which the network runs them, each on inputs from corrected layers, in one forward pass.

    Args:
        network: The dense network, in evaluation mode.
        images: Calibration images (n, channels, height, width), on the network's device; labels are not needed.
        correct: The rule.

    Raises:
        ValueError: There are no calibration images, or the dense network's statistics on them are not finite.

    Source:
        Statistics taken anew after pruning are common practice (Li et al., "EagleEye: fast sub-net evaluation for
        efficient neural network pruning", ECCV 2020); the form relative to the dense network is our own.
    """

    def __init__(self, network: nn.Module, images: Tensor, correct: Correction = corrected_statistics) -> None:
        if not len(images):
            raise ValueError("repair 'batchnorm' needs calibration images, found none; use repair 'none'")
        self._images, self._correct = images, correct
        self._trained: dict[str, Moments] = {}
        self._dense: dict[str, Moments] = {}
        for name, module in _norms(network).items():
            assert module.running_mean is not None  # by _norms
            assert module.running_var is not None
            self._trained[name] = (module.running_mean.float().clone(), module.running_var.float().clone())

        def observe(name: str, _: _BatchNorm, x: Tensor) -> None:
            # A layer that runs several times in one pass keeps the statistics of its first run.
            self._dense.setdefault(name, channel_moments(x))

        with torch.inference_mode(), _before_each_norm(network, observe):
            network(images)
        for name, moments in self._dense.items():
            if not all(bool(torch.isfinite(m).all()) for m in moments):
                raise ValueError(
                    f"the dense network's activations before '{name}' are not finite on the calibration images; check "
                    "the checkpoint and its input normalisation"
                )

    @property
    def n_layers(self) -> int:
        """Number of batch-norm layers that will be corrected; 0 makes this repair do nothing."""
        return len(self._dense)

    def __call__(self, network: nn.Module) -> None:
        """Correct a pruned copy of the dense network, in place."""
        if not self._dense:
            return
        done: set[str] = set()

        def correct(name: str, module: _BatchNorm, x: Tensor) -> None:
            if name in done or name not in self._dense:
                return
            done.add(name)
            mean, variance = self._correct(self._trained[name], self._dense[name], channel_moments(x))
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)

        with torch.inference_mode(), _before_each_norm(network, correct):
            network(self._images)
