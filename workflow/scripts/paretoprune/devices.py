"""What a device can do, how much it is given at a time, and how equal sums come out of it every time."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has arithmetic for bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and has_instructions and torch.backends.mkldnn.is_available()


def default_batch_size(images: Tensor, device: torch.device) -> int:
    """Images per forward pass: on a CPU as many as a core's caches hold activations of, on a GPU enough to fill it."""
    # 128 images of 32 x 32 were the fastest measured on a CPU; larger ones in proportion.
    fitting, least, most = (128, 3, 8) if device.type == "cpu" else (1024, 4, 10)
    fitting = fitting * 32 * 32 // max(1, images.shape[-1] * images.shape[-2])
    return int(2 ** np.clip(np.floor(np.log2(max(1, fitting))), least, most))


@contextmanager
def repeatable() -> Iterator[None]:
    """One torch thread inside, as in worker processes, and a GPU that does not round float32: equal sums everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error)
    # torch's allocator on Linux, elsewhere, and oneDNN's.
    return isinstance(error, RuntimeError) and any(
        text in told for text in ("can't allocate memory", "not enough memory", "could not create a memory")
    )
