"""Worker processes of one thread each, which share what the evaluator has prepared.

Workers are forked: images, weights and kept activations are the same pages of memory in all of them, any network can
be used, and there is nothing to clean up by name. A worker that dies is replaced and its candidate evaluated again; a
worker whose parent is gone ends by itself.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

# How often one job may take its worker down before the run is given up.
MAX_DEATHS = 3
# Seconds between a worker's looks at whether its parent is still there.
HEARTBEAT = 1.0
_LOGGER = logging.getLogger("paretoprune")


def can_fork() -> bool:
    """Whether workers are available here.

    macOS's libraries do not survive a fork, Windows has none, and a daemon process may have no children.
    """
    return sys.platform.startswith("linux") and not multiprocessing.current_process().daemon


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: int | None = None


def _serve(function: Callable[..., Any], connection: Connection, others: Sequence[Connection], parent: int) -> None:
    """A worker's life: take a job, give back its result or its error, until the parent closes the pipe or is gone."""
    # Ctrl-C reaches the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Inherited ends of other pipes would keep them open after the parent's death.
    for other in others:
        other.close()
    torch.set_num_threads(1)
    try:
        while True:
            while not connection.poll(HEARTBEAT):
                if os.getppid() != parent:
                    return
            arguments = connection.recv()
            try:
                answer = (True, function(*arguments))
            except Exception as error:
                answer = (False, _portable(error))
            try:
                connection.send(answer)
            except Exception as error:
                connection.send((False, RuntimeError(f"a result cannot be sent: {error}")))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _portable(error: Exception) -> Exception:
    """An error that another process can be sent: itself, or its text where it cannot be taken apart or put together."""
    try:
        pickle.loads(pickle.dumps(error))  # its own bytes
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the pool is not the pool
    for worker in workers:
        worker.connection.close()
        worker.process.kill()
    for worker in workers:
        worker.process.join()
    workers.clear()


class WorkerPool:
    """Runs a function in several processes.

    Args:
        function: Called in the workers, as it is when they start: later changes do not reach them.
        n_workers: Processes.
    """

    def __init__(self, function: Callable[..., Any], n_workers: int) -> None:
        self._function, self._context = function, multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        for _ in range(n_workers):
            self._workers.append(self._start())
        # Also when the pool is forgotten, or the interpreter ends on an error.
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        others = [ours, *(worker.connection for worker in self._workers)]
        process = self._context.Process(
            target=_serve, args=(self._function, theirs, others, os.getpid()), name="paretoprune-worker", daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def run(
        self, jobs: Sequence[Any], arguments: Callable[[Any], tuple[Any, ...]], done: Callable[[Any, Any], None]
    ) -> None:
        """Run jobs on whichever worker is free.

        Args:
            jobs: What is to be done, begun in this order.
            arguments: Makes the function's arguments of a job, in this process, when it is begun.
            done: Called in this process with a job and its result, in the order in which they end.

        Raises:
            ChildProcessError: One job has taken several workers down.
            Exception: Whatever the function raised.
        """
        waiting, deaths, running = deque(range(len(jobs))), dict.fromkeys(range(len(jobs)), 0), 0
        sent: dict[int, tuple[Any, ...]] = {}
        try:
            while waiting or running:
                for worker in self._workers:
                    if worker.job is None and waiting:
                        worker.job = waiting.popleft()
                        running += 1
                        # A job that is begun again gets the same arguments.
                        if worker.job not in sent:
                            sent[worker.job] = arguments(jobs[worker.job])
                        # If it has died, its sentinel tells below.
                        with contextlib.suppress(OSError):
                            worker.connection.send(sent[worker.job])
                busy = [worker for worker in self._workers if worker.job is not None]
                ready = wait([w.connection for w in busy] + [w.process.sentinel for w in busy])
                for worker in busy:
                    if worker.connection not in ready and worker.process.sentinel not in ready:
                        continue
                    index = worker.job
                    assert index is not None
                    running -= 1
                    try:
                        succeeded, answer = worker.connection.recv() if worker.connection in ready else (None, None)
                        if succeeded is None:
                            raise EOFError
                    except (EOFError, OSError):
                        deaths[index] += 1
                        self._replace(worker, deaths[index])
                        waiting.appendleft(index)
                        continue
                    worker.job = None
                    if not succeeded:
                        assert isinstance(answer, Exception)
                        raise answer
                    del sent[index]
                    done(jobs[index], answer)
        except BaseException:
            # Workers may still be at a job whose answer nobody will take.
            self.close()
            raise

    def _replace(self, worker: _Worker, n_deaths: int) -> None:
        worker.process.join()
        code = worker.process.exitcode
        why = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        worker.connection.close()
        if n_deaths >= MAX_DEATHS:
            raise ChildProcessError(
                f"the same candidate has taken {n_deaths} workers down (the last by {why}); if it was the system "
                "running out of memory (SIGKILL), use a smaller threads_per_search, batch_size or prefix_cache_mb"
            )
        _LOGGER.warning("a worker died (%s); it is replaced, and its candidate is evaluated again", why)
        self._workers[self._workers.index(worker)] = self._start()

    def close(self) -> None:
        """End the workers at once."""
        self._finalizer()


def run_in_processes(
    function: Callable[[int], Any], n: int, n_workers: int, progress: Callable[[int], None] = lambda done: None
) -> list[Any]:
    """Results of a function for 0, ..., n - 1, in at most `n_workers` processes; with one of them or one job, in none.

    Args:
        function: From a number to its result.
        n: How many there are.
        n_workers: Processes.
        progress: Called after each result, with how many there are so far.

    Raises:
        ChildProcessError: One job has taken several workers down.
        Exception: Whatever the function raised.
    """
    found: dict[int, Any] = {}

    def keep(i: int, result: Any) -> None:
        found[i] = result
        progress(len(found))

    if n_workers < 2 or n < 2:
        for i in range(n):
            keep(i, function(i))
        return [found[i] for i in range(n)]
    pool = WorkerPool(function, min(n, n_workers))
    try:
        pool.run(range(n), lambda i: (i,), keep)
    finally:
        pool.close()
    return [found[i] for i in range(n)]
