"""What a device can compute in, how many images it takes at a time, and deterministic computing."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 and need not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and has_instructions and torch.backends.mkldnn.is_available()


def default_batch_size(images: Tensor, device: torch.device) -> int:
    """Choose the number of images in a forward pass.

    Args:
        images: (n, channels, height, width); only their size matters.
        device: Where they are computed on.

    Returns:
        A power of 2: 8 to 256 on a CPU, so that a core's caches hold the activations, and 16 to 1024 on a GPU, so that
        it is busy.
    """
    # 128 images of 32 x 32 were the fastest measured on a CPU. Images of other sizes get as many pixels in all.
    n_images, lowest_power, highest_power = (128, 3, 8) if device.type == "cpu" else (1024, 4, 10)
    n_images = n_images * 32 * 32 // max(1, images.shape[-1] * images.shape[-2])
    return int(2 ** np.clip(np.floor(np.log2(max(1, n_images))), lowest_power, highest_power))


@contextmanager
def repeatable() -> Iterator[None]:
    """Compute deterministically inside the block: equal inputs give equal bits, in any process.

    torch runs one thread, as worker processes do, because the order of a sum depends on the number of threads. A GPU
    uses deterministic convolutions and no TF32.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the CPU or of a GPU ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    # In the order of the texts: torch's allocator on Linux, torch's allocator elsewhere, oneDNN.
    return isinstance(error, RuntimeError) and any(
        text in message for text in ("can't allocate memory", "not enough memory", "could not create a memory")
    )
