"""Logging of a workflow step: to the terminal and to a file, expected errors as one clear line."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What users can mend: told in one line, with the traceback only in the log file.
EXPECTED_ERRORS = (ValueError, ArithmeticError, FileNotFoundError, ChildProcessError)


@contextmanager
def logged(name: str, log_file: str) -> Iterator[logging.Logger]:
    """Log what happens in the block; an expected error ends the program with one line.

    Args:
        name: Shown before each line in the terminal, where several steps write at once.
        log_file: Gets every line and, after an error, its traceback.

    Yields:
        The logger.
    """
    logger = logging.getLogger("paretoprune")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    to_file, to_terminal = logging.FileHandler(log_file, mode="w", encoding="utf-8"), logging.StreamHandler(sys.stderr)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal.setFormatter(logging.Formatter(f"[{name}] %(message)s"))
    logger.handlers = [to_file, to_terminal]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [to_file]
    try:
        yield logger
    except EXPECTED_ERRORS as error:
        logger.handlers = [to_file]
        logger.exception("%s", error)
        sys.exit(f"[{name}] ERROR: {error}")
    except Exception:
        logger.handlers = [to_file]
        logger.exception("an unexpected error; please report it with this log")
        raise
    finally:
        logging.captureWarnings(False)
        logger.handlers = []
        logging.getLogger("py.warnings").handlers = []
        to_file.close()
