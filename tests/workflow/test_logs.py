"""Logs: expected errors as one clear line with the traceback in the file, unexpected ones as they are."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from paretoprune.workflow.configuration import ConfigurationError
from paretoprune.workflow.logs import logged

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


@pytest.fixture(autouse=True)
def _global_logging() -> Iterator[None]:
    """A step is a program of its own and may change global logging; the tests put it back."""
    loggers = [logging.getLogger(name) for name in ("paretoprune", "py.warnings")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            handler.close()
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers


def fail(error: BaseException, log_file: Path) -> None:
    with logged("digits: dense", str(log_file)) as log:
        log.info("before")
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("expected a share, found 80"),
        ConfigurationError("expected a share, found 80"),
        FileNotFoundError("expected a share, found 80"),
        ZeroDivisionError("expected a share, found 80"),
    ],
)
def test_an_expected_error_ends_with_one_line_that_names_the_step(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fail(error, tmp_path / "step.log")
    assert ended.value.code == "[digits: dense] ERROR: expected a share, found 80"
    # What else the terminal shows was there before the error; Python itself prints the line above.
    assert capsys.readouterr().err == "[digits: dense] before\n"
    text = (tmp_path / "step.log").read_text()
    assert "ERROR expected a share, found 80" in text
    assert "Traceback (most recent call last)" in text
    assert "raise error" in text


def test_an_unexpected_error_stays_what_it_is_and_leaves_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="surprise"):
        fail(KeyError("surprise"), tmp_path / "step.log")
    assert capsys.readouterr().err == "[digits: dense] before\n"
    text = (tmp_path / "step.log").read_text()
    assert "an unexpected error; please report it with this log" in text
    assert "Traceback (most recent call last)" in text
    assert "surprise" in text


def test_an_interruption_is_no_error_to_report(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt(), tmp_path / "step.log")
    assert "ERROR" not in (tmp_path / "step.log").read_text()


def test_lines_go_to_the_file_and_named_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged("digits", str(tmp_path / "step.log")) as log:
        log.info("%d of %d", 1, 2)
        log.debug("never shown")
    assert capsys.readouterr().err == "[digits] 1 of 2\n"
    (line,) = (tmp_path / "step.log").read_text().splitlines()
    assert line.endswith(" INFO 1 of 2")


def test_a_second_run_starts_its_log_afresh_and_shows_each_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("first", "second"):
        with logged("digits", str(tmp_path / "step.log")) as log:
            log.info(text)
    assert capsys.readouterr().err == "[digits] first\n[digits] second\n"
    text = (tmp_path / "step.log").read_text()
    assert "second" in text
    assert "first" not in text


def test_warnings_go_to_the_log_file_and_not_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logged("digits", str(tmp_path / "step.log")):
            warnings.warn("of little interest", UserWarning, stacklevel=1)
    assert "of little interest" not in capsys.readouterr().err
    assert "of little interest" in (tmp_path / "step.log").read_text()


def test_a_program_that_fails_as_expected_prints_one_line_and_exits_with_1(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from paretoprune.workflow.logs import logged\n"
        f"with logged('report', {str(tmp_path / 'step.log')!r}):\n"
        "    raise ValueError('nothing to report')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr == "[report] ERROR: nothing to report\n"


def test_the_log_file_is_closed_when_the_block_ends(tmp_path: Path) -> None:
    with logged("digits", str(tmp_path / "step.log")) as log:
        (to_file,) = [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
        stream = to_file.stream
        assert stream is not None
        assert not stream.closed
    assert stream.closed
