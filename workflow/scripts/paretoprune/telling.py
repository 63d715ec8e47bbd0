"""Progress in the log: a word from time to time, however often there is something to say."""

import logging
import time
from collections.abc import Callable

# Seconds without a word after which one is said.
TELLS_EVERY = 5.0


class Telling:
    """Says in the log how far something is, whenever some seconds have passed without a word.

    Args:
        what: What is being done; stands before each line.
        log: Where it is said; None for the package's own logger.
        clock: Tells the time (seconds).
    """

    def __init__(
        self, what: str, log: logging.Logger | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self._clock = what, clock
        self._log = logging.getLogger("paretoprune") if log is None else log
        self._last = clock()

    def __call__(self, how_far: str, *values: object) -> None:
        """Say how far it is, if it is time to; `values` fill in the text as in `logging`."""
        if self._clock() - self._last >= TELLS_EVERY:
            self._log.info(f"{self.what}: {how_far}", *values)
            self._last = self._clock()
