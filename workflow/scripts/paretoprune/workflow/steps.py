"""What every workflow step that computes does the same way: log, and choose the device."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from paretoprune.workflow.logs import logged


@contextmanager
def step(name: str, log_file: str, threads: int = 1, gpus: int = 0) -> Iterator[tuple[logging.Logger, torch.device]]:
    """Run a step with logging, on the threads and the GPU that were granted.

    Args:
        name: Shown before each line in the terminal.
        log_file: Gets every line, see `workflow.logs.logged`.
        threads: CPU threads for torch.
        gpus: Granted GPUs; 0 means the CPU, also on a machine that has a GPU.

    Yields:
        The logger and the device to compute on.
    """
    with logged(name, log_file) as logger:
        torch.set_num_threads(max(1, threads))
        device = torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")
        if gpus and device.type == "cpu":
            logger.warning("a GPU was granted but torch finds none; computing on the CPU")
        if device.type == "cuda":
            # Otherwise convolutions round to TF32 where float32 is asked for, and trainings cannot be repeated.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        # User factories are imported from the folder where the workflow runs.
        sys.path.append(str(Path.cwd()))
        yield logger, device
