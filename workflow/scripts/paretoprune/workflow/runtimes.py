"""Whether networks can be timed here by the runtime that a configuration names, before anything starts.

Packages are looked for and not imported, which would take seconds.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from paretoprune.deployment.packages import INSTALL
from paretoprune.workflow.configuration import latency_of, timed_methods

# What writes a network for it, and what runs it.
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "torch": ("torch",), "torch.compile": ("torch",)}


def unusable_runtime(config: Mapping[str, Any]) -> Iterator[str]:
    """What keeps networks from being timed, a line each; nothing where none is, or where no input is needed.

    Args:
        config: A checked configuration.
    """
    if not (config["inputs_needed"] and timed_methods(config)):
        return
    latency = latency_of(config)
    if missing := [package for package in PACKAGES[latency.runtime] if find_spec(package) is None]:
        yield (
            f"latency.runtime: {latency.runtime} needs {', '.join(missing)}, found none; `{INSTALL}`, or `pip install "
            f"{' '.join(missing)}`"
        )
    # As torch looks for it.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if latency.runtime == "torch.compile" and shutil.which(compiler.split()[0]) is None:
        yield f"latency.runtime: torch.compile needs a C++ compiler, found no {compiler}; install it, or choose torch"
    cores = os.cpu_count() or 1
    if latency.threads > cores:
        yield f"latency.threads: expected at most the {cores} cores of this machine, found {latency.threads}; lower it"
