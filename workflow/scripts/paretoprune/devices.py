"""What a device can do, how much it is given at a time, and how equal sums come out of it every time."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod

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
    fitting = fitting * 32 * 32 // max(1, prod(images.shape[2:]))
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


# Whose turn it is; a process that is forked while another thread has it starts with its own.
_turns = [threading.RLock()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _turns.__setitem__(0, threading.RLock()))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Threads of a process take turns: tracing and default types are the same for all of them."""
    with _turns[0]:
        yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """Torch inside as a program finds it, whatever modes the caller has set: those come back afterwards.

    Gradients are on, inference mode and autocast off, new tensors float32 on the CPU; numpy warns of what overflows.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error)
    # torch's allocator on Linux, elsewhere, and oneDNN's.
    return isinstance(error, RuntimeError) and any(
        text in told for text in ("can't allocate memory", "not enough memory", "could not create a memory")
    )
