"""Pruned networks evaluated layer by layer, as they are: the path that takes any network, and the reference.

It has the same methods as `evaluation.fused.FusedNetwork`, which is faster where a network can be traced.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paretoprune.copies import copied
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.architectures import to_channels_last
from paretoprune.networks.tracing import Cut
from paretoprune.repair.refit import Refit
from paretoprune.repair.repairs import make_repair


class LayerwiseNetwork:
    """One dense network, ready to take any mask.

    Args:
        network: The trained dense network, in evaluation mode; it is copied and left as it is.
        layout: Where its prunable weights lie in a mask.
        sample: A few images (n, c, h, w) as it will be given, on the device and in the type to compute in.
        repair: A key of `repair.repairs.REPAIRS`.
        calibration_images: Images for the repair, like `sample`.
        refit: What re-fits the kept weights; None to leave them as they are.
    """

    # Nothing can be kept of a network that is only seen from outside.
    cuts: tuple[Cut, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        layout: WeightUnits,
        sample: Tensor,
        *,
        repair: str,
        calibration_images: Tensor,
        refit: Refit | None = None,
    ) -> None:
        self.layout = layout
        self.network = copied(network).to(sample.device, sample.dtype)
        self.network.eval()
        for module, trained in zip(self.network.modules(), network.modules(), strict=True):
            if isinstance(module, _BatchNorm):
                # Statistics rounded to bfloat16 would shift every activation; normalisation mixes the two types.
                module.float().load_state_dict(trained.state_dict())
        to_channels_last(self.network)
        parameters = dict(self.network.named_parameters())
        self._weights = [parameters[name] for name in layout.names]
        self._refit = refit
        self._dense_weights = [weight.detach().clone() for weight in self._weights]
        # Everything a repair may change, to be put back before the next candidate.
        self._dense_buffers = {name: buffer.detach().clone() for name, buffer in self.network.named_buffers()}
        self._repair = make_repair(repair, self.network, calibration_images)

    def prepare(
        self,
        kept: Tensor,
        cut: Cut | None = None,
        calibrated: Tensor | None = None,
        keep: dict[Cut, Tensor] | None = None,
    ) -> None:
        """Mask and repair, see `evaluation.prunable.PrunableNetwork`; there are no cuts, so nothing else is of use."""
        buffers = dict(self.network.named_buffers())
        with torch.no_grad():
            for name, original in self._dense_buffers.items():
                buffers[name].copy_(original)
            if self._refit is not None:
                self._put_refitted(self._refit, kept)
            else:
                for weight, dense, part in zip(
                    self._weights, self._dense_weights, kept.split(self.layout.sizes.tolist()), strict=True
                ):
                    # where, not a product: 0 times an infinite weight would be NaN.
                    weight.copy_(torch.where(part.view(dense.shape), dense, torch.zeros_like(dense)))
        self._repair(self.network)

    def _put_refitted(self, refit: Refit, kept: Tensor) -> None:
        refitted = refit(kept)
        for name, weight in zip(self.layout.names, self._weights, strict=True):
            weight.copy_(refitted[name])
        for module, bias in refit.bias(refitted).items():
            self.network.get_submodule(module).bias.copy_(bias)  # type: ignore[operator]

    def answer(self, images: Tensor, cut: Cut | None = None, keep: dict[Cut, Tensor] | None = None) -> Tensor:
        """Logits of a batch (n, c, h, w), float32 (n, n_classes); `cut` and `keep` are of no use here."""
        answer: Tensor = self.network(images)
        return answer.float()
