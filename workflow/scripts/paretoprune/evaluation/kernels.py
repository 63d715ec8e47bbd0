"""The kernels of fused programs: convolutions with folded weights, which add the shortcut and apply ReLU.

On a CPU these are oneDNN's, where torch was built with them; elsewhere torch's own operations.
"""

from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.repair.batchnorm import Moments


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


def _geometry(module: Any) -> tuple[Any, Any, Any, int]:
    return module.padding, module.stride, module.dilation, module.groups


class Kernels:
    """Convolutions in one type.

    Args:
        device: Where to compute.
        dtype: Type of weights and activations.
        onednn: Whether to use oneDNN's fused kernels; None for where they are.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, onednn: bool | None = None) -> None:
        self.dtype = dtype
        self.onednn = has_fused_kernels(device, dtype) if onednn is None else onednn

    def lay_out(self, weight: Tensor) -> Tensor:
        """A weight (n_rows, channels, height, width) in the type and memory layout of the kernels."""
        return weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def fold(
        self, module: nn.Module, weight: Tensor, norm: nn.Module | None, statistics: Moments | None
    ) -> tuple[Tensor, Tensor | None]:
        """Fold a convolution with its batch norm.

        Args:
            module: The convolution: its bias and geometry.
            weight: Its weights, float32.
            norm: Its batch norm, or None.
            statistics: What that normalises by, mean and variance, each float32 (n_rows,).

        Returns:
            Weight and bias for `convolve`.
        """
        bias: Any = None if module.bias is None else module.bias.float()
        if norm is not None and statistics is not None:
            mean, variance = statistics
            scale = torch.rsqrt(variance + norm.eps)  # type: ignore[operator]
            if norm.weight is not None:
                scale = scale * norm.weight.float()  # type: ignore[operator]
            weight = weight * scale[:, None, None, None]
            bias = (0.0 if bias is None else bias) - mean
            bias = bias * scale
            if norm.bias is not None:
                bias = bias + norm.bias.float()
        weight = self.lay_out(weight)
        if self.onednn:
            # oneDNN's own order of weights, which it would otherwise make again for every batch.
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(module), None)
        return weight, None if bias is None else bias.to(self.dtype)

    def convolve(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
        """Convolve in the geometry of a module, and apply ReLU where that is asked for."""
        padding, stride, dilation, groups = _geometry(module)
        if self.onednn:
            found: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, padding, stride, dilation, groups, "relu" if relu else "none", [], ""
            )
            return found
        y = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y.relu_() if relu else y

    def convolve_and_add(
        self, module: nn.Module, x: Tensor, other: Tensor, folded: tuple[Tensor, Tensor | None], *, relu: bool
    ) -> Tensor:
        """Convolve by oneDNN and add another tensor of the same shape and type."""
        return _as_tensor(torch.ops.mkldnn._convolution_pointwise.binary(x, other, *_added(module, folded, relu)))

    def convolve_onto(
        self, module: nn.Module, x: Tensor, other: Tensor, folded: tuple[Tensor, Tensor | None], *, relu: bool
    ) -> Tensor:
        """As `convolve_and_add`, but the sum is written over the other tensor."""
        return _as_tensor(torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *_added(module, folded, relu)))


def _as_tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _added(module: nn.Module, folded: tuple[Tensor, Tensor | None], relu: bool) -> tuple[Any, ...]:
    """Arguments of oneDNN's convolution with a sum, after the two summands."""
    return (*folded, *_geometry(module), "add", 1.0, "relu" if relu else None, [], "")
