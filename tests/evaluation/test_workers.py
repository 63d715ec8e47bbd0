"""Worker processes: results and errors come home, the dead are replaced, and nobody is left behind."""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paretoprune.evaluation import workers
from paretoprune.evaluation.workers import WorkerPool, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="worker processes are forked, which only Linux does well")

SCRIPTS = Path(workers.__file__).parents[2]
# Seconds until something counts as stuck. Ending an interpreter with torch takes a second of CPU time, which can be a
# long wait on a machine that is busy with other things; whoever is stuck here is so for LONGER.
PATIENCE = 120.0
LONGER = 3600


@pytest.fixture(autouse=True)
def _nobody_left() -> Iterator[None]:
    """Every test ends without child processes."""
    yield
    gc.collect()
    assert multiprocessing.active_children() == []


def run(pool: WorkerPool, jobs: list[Any]) -> dict[Any, Any]:
    """Results by job, in the order in which they came."""
    found: dict[Any, Any] = {}
    pool.run(jobs, lambda job: (job,), found.__setitem__)
    return found


def is_alive(pid: int) -> bool:
    try:
        # A zombie is dead; somebody has only not looked yet.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_every_job_is_done_once(n_workers: int) -> None:
    pool = WorkerPool(lambda x: (x * x, os.getpid()), n_workers)
    for n_jobs in (0, 1, 2, 20):
        found = run(pool, list(range(n_jobs)))
        assert {job: square for job, (square, _) in found.items()} == {i: i * i for i in range(n_jobs)}
        assert {pid for _, pid in found.values()} <= set(pool.pids)
    assert os.getpid() not in pool.pids
    pool.close()


def test_jobs_begin_in_order_on_whoever_is_free() -> None:
    started: list[int] = []

    def arguments(job: int) -> tuple[int]:
        started.append(job)
        return (job,)

    others_are_done = multiprocessing.get_context("fork").Event()

    def work(job: int) -> int:
        if job == 0:
            others_are_done.wait(PATIENCE)
        return os.getpid()

    pool = WorkerPool(work, 2)
    done: dict[int, int] = {}

    def finish(job: int, pid: int) -> None:
        done[job] = pid
        if len(done) == 5:
            others_are_done.set()

    pool.run(range(6), arguments, finish)
    assert started == list(range(6))
    # The first job takes as long as all others, which the other worker has done meanwhile.
    assert list(done)[-1] == 0
    assert len({done[job] for job in range(1, 6)}) == 1
    pool.close()


def test_workers_know_what_was_there_when_they_started() -> None:
    table = torch.arange(5.0)
    pool = WorkerPool(lambda i: (float(table[i]), torch.get_num_threads()), 2)
    table[2] = 100
    assert run(pool, [2]) == {2: (2.0, 1)}
    pool.close()


def test_memory_that_is_shared_is_written_by_workers_and_read_by_the_parent() -> None:
    import mmap

    shared = torch.frombuffer(mmap.mmap(-1, 80), dtype=torch.float32)

    def work(i: int) -> None:
        shared[i] = i + 1

    pool = WorkerPool(work, 2)
    run(pool, list(range(20)))
    assert shared.tolist() == [i + 1 for i in range(20)]
    pool.close()


# ----------------------------------------------------------------------------------------------------------- errors


class Unpicklable(Exception):
    """An error that holds what cannot travel."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.action = lambda: None


class TwoArguments(Exception):
    """An error that travels, but cannot be made again from its message alone."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{what} in {where}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("expected more"), ValueError, "expected more"),
        (KeyError("layer"), KeyError, "layer"),
        (torch.OutOfMemoryError("none left"), torch.OutOfMemoryError, "none left"),
        (Unpicklable("it has a lambda"), RuntimeError, "it has a lambda"),
        (TwoArguments("layer1", "something odd"), Exception, "something odd in layer1"),
    ],
)
def test_an_error_of_the_function_is_raised_in_the_parent(
    error: Exception, kind: type[Exception], message: str
) -> None:
    def work(job: int) -> int:
        if job == 3:
            raise error
        return job

    pool = WorkerPool(work, 2)
    with pytest.raises(kind, match=message):
        run(pool, list(range(8)))
    assert pool.pids == []


def test_a_result_that_cannot_travel_is_an_error() -> None:
    pool = WorkerPool(lambda job: lambda: job, 1)
    with pytest.raises(RuntimeError):
        run(pool, [0])


def test_an_error_in_the_parent_ends_the_workers() -> None:
    def failing(job: int) -> tuple[int]:
        raise KeyboardInterrupt

    pool = WorkerPool(lambda job: job, 2)
    with pytest.raises(KeyboardInterrupt):
        pool.run(range(4), failing, lambda job, result: None)
    assert pool.pids == []


# ------------------------------------------------------------------------------------------------------------ deaths


def test_a_killed_worker_is_replaced_and_its_job_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(job: int) -> int:
        mark = tmp_path / str(job)
        if job in (2, 5) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * job

    made: list[int] = []

    def arguments(job: int) -> tuple[int]:
        made.append(job)
        return (job,)

    pool = WorkerPool(work, 2)
    found: dict[int, int] = {}
    before = set(pool.pids)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        pool.run(range(8), arguments, found.__setitem__)
    assert found == {job: 10 * job for job in range(8)}
    assert made == list(range(8))
    assert caplog.messages == 2 * [
        "a worker died (signal SIGKILL); it is replaced, and its candidate is evaluated again"
    ]
    assert len(set(pool.pids)) == 2
    assert set(pool.pids) != before
    assert run(pool, [1, 2]) == {1: 10, 2: 20}
    pool.close()


def test_a_worker_that_dies_between_jobs_is_replaced_too(caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool(lambda job: job, 2)
    run(pool, [0, 1])
    os.kill(pool.pids[0], signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pool.pids[0]))
    with caplog.at_level(logging.WARNING, "paretoprune"):
        assert sorted(run(pool, list(range(6)))) == list(range(6))
    assert len(caplog.messages) == 1
    pool.close()


@pytest.mark.parametrize(("how", "why"), [("kill", "signal SIGKILL"), ("exit", "exit status 7")])
def test_a_job_that_always_takes_its_worker_down_ends_in_an_error_with_a_remedy(
    how: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work(job: int) -> int:
        if job == 1:
            if how == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    pool = WorkerPool(work, 2)
    expected = rf"has taken 3 workers down \(the last by {why}\).* use a smaller threads_per_search, batch_size"
    with pytest.raises(ChildProcessError, match=expected):
        run(pool, list(range(4)))
    assert len(caplog.messages) == 2
    assert pool.pids == []


def test_closing_ends_all_workers_at_once_also_busy_ones() -> None:
    pool = WorkerPool(time.sleep, 2)
    pids = pool.pids
    assert all(map(is_alive, pids))
    for worker in pool._workers:
        worker.connection.send((LONGER,))
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < PATIENCE
    assert not any(map(is_alive, pids))
    pool.close()


def test_a_pool_that_is_forgotten_leaves_nobody() -> None:
    pool = WorkerPool(lambda job: job, 2)
    pids = pool.pids
    run(pool, [1, 2, 3])
    del pool
    gc.collect()
    assert wait_until(lambda: not any(map(is_alive, pids)))


# ----------------------------------------------------------------------------------------- the end of the whole program

PROGRAM = """
import signal, sys, time
# Whoever starts the tests in the background makes everything below them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {scripts!r})
from paretoprune.evaluation.workers import WorkerPool

pools = [WorkerPool(time.sleep, 2) for _ in range(2)]
print(*[pid for pool in pools for pid in pool.pids], flush=True)
if sys.argv[1] == "busy":
    pools[0].run([0, 1], lambda job: (1.0 if job else 2.0,), lambda job, result: None)
    pools[0].run([0, 1], lambda job: ({longer},), lambda job, result: None)
elif sys.argv[1] == "error":
    raise ValueError("on purpose")
elif sys.argv[1] == "idle":
    time.sleep({longer})
"""


def program(what: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A program with two pools of two workers, in a process group of its own, and the numbers of the workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(scripts=str(SCRIPTS), longer=LONGER), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 4
    return process, pids


def ended(process: subprocess.Popen[str], pids: list[int]) -> bool:
    """Whether a program and its workers come to an end; those that do not are ended by force."""
    try:
        process.communicate(timeout=PATIENCE)
        return wait_until(lambda: not any(map(is_alive, pids)))
    finally:
        for pid in [process.pid, *filter(is_alive, pids)]:
            if process.returncode is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("what", ["end", "error"])
def test_no_worker_outlives_a_program_that_ends(what: str) -> None:
    process, pids = program(what)
    assert ended(process, pids)
    assert process.returncode == (0 if what == "end" else 1)


def test_no_idle_worker_outlives_a_parent_that_is_killed() -> None:
    process, pids = program("idle")
    shared = set(Path("/dev/shm").iterdir())
    process.kill()
    assert ended(process, pids)
    assert set(Path("/dev/shm").iterdir()) <= shared


def test_a_ctrl_c_ends_the_program_and_its_workers() -> None:
    for what in ("idle", "busy"):
        process, pids = program(what)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        assert ended(process, pids)
        assert process.returncode != 0


def test_nothing_appears_in_dev_shm() -> None:
    before = set(Path("/dev/shm").iterdir())
    pool = WorkerPool(lambda job: torch.ones(10), 2)
    run(pool, [0])
    assert set(Path("/dev/shm").iterdir()) <= before
    pool.close()
