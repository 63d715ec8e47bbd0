"""One forward pass, watched layer by layer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Name of the layer, the layer, its arguments by position and by name, and what it makes.
See = Callable[[str, nn.Module, tuple[Any, ...], Mapping[str, Any], Any], None]


def run_watched(network: nn.Module, image: Tensor, is_watched: Callable[[nn.Module], Any], see: See) -> None:
    """Run a network on one image and show each call of some of its layers.

    Args:
        network: In evaluation mode; it is left as it is.
        image: One image (1, ...).
        is_watched: Whether a module is looked at.
        see: Called for each call, in their order.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, inputs, options, output: see(name, layer, inputs, options, output)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in network.named_modules()
        if is_watched(module)
    ]
    try:
        with torch.inference_mode():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
