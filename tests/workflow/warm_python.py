"""A Python whose programs start at once, as the libraries that they need are imported already.

A run of the workflow starts some thirty programs, and importing torch, pymoo and Snakemake takes longer than what most
of them do in a test. So one process imports these libraries, and nothing of the project. It forks a process for each
program, which has the arguments, folder, environment and output of whoever asked, and ends as any program does.

`started` gives a file that is called as Python is: with a script, or with -m and a module.
"""

import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    "moocore",
    "pymoo.algorithms.moo.moead",
    "pymoo.algorithms.moo.nsga2",
    "safetensors.torch",
    "scipy.stats",
    "seaborn",
    "sklearn.datasets",
    "sklearn.model_selection",
    "snakemake.cli",
    "torch",
)
# What is called: as little as passes on a program and waits for its end, so that it needs no site packages.
CALLED = """#!/bin/sh
exec '{python}' -SE -c '
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [1, 2])
    server.sendall(request)
    code = server.recv(1)
sys.exit(code[0] if code else "the process that programs are forked from has ended")
' "$@"
"""


@contextmanager
def started() -> Iterator[str]:
    """A file to call in place of Python as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="warm") as folder:
        called, address = Path(folder) / "python", Path(folder) / "socket"
        called.write_text(CALLED.format(python=sys.executable, address=address), encoding="utf-8")
        called.chmod(0o700)
        # It ends with its input, however the tests end.
        command = [sys.executable, __file__, str(address), str(called)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield str(called)
            server.communicate()
        assert server.returncode == 0


def serve(address: str) -> list[str] | None:
    """Fork a process for each program asked for: its arguments in that process, None where the input has ended."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        # A program that ends leaves the libraries alone; looking through all their objects takes a second.
        gc.freeze()
        print("ready", flush=True)
        n_forked = 0
        while sys.stdin not in select.select([sys.stdin, server], [], [])[0]:
            asking, _ = server.accept()
            n_forked += 1
            if os.fork():
                asking.close()
                continue
            # Between the two is a process that waits for the program and tells how it ended.
            if program := os.fork():
                _, status = os.waitpid(program, 0)
                asking.sendall(bytes([os.waitstatus_to_exitcode(status) & 255]))
                os._exit(0)
            return enter(asking)
        for _ in range(n_forked):
            os.wait()
    return None


def enter(asking: socket.socket) -> list[str]:
    """Take on the folder, the environment and the output of whoever asks, and return the arguments."""
    size, outputs, _, _ = socket.recv_fds(asking, 8, 2)
    with asking, asking.makefile("rb") as sent:
        arguments, folder, environment = json.loads(sent.read(int.from_bytes(size, "big")))
    for descriptor, output in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
        os.dup2(output, descriptor)
        os.close(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def execute(arguments: list[str]) -> None:
    """Run a script, or a module after -m, as Python does."""
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path[0] = os.getcwd() if is_module else str(Path(arguments[0]).parent)  # noqa: PTH109
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    _, where, sys.executable = sys.argv
    found = serve(where)
    if found is not None:
        execute(found)
