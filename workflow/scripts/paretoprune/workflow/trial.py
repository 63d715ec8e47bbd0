"""Networks built once before anything starts, in a process of their own: only a call tells what a factory returns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretoprune.networks.names import CIFAR_RESNETS

# Classes and channels of the sets that come with the workflow.
KNOWN_SETS = {"digits": (10, 1), "cifar10": (10, 3), "cifar100": (100, 3), "fashion_mnist": (10, 1)}
GUESSED = (10, 3)
# A factory that takes longer, because it downloads or computes, is left to its step.
TIMEOUT = 60


def unbuildable_networks(config: Mapping[str, Any]) -> Iterator[str]:
    """What keeps networks of the runs from being built, a line each.

    Nothing is tried where no input is needed, and of networks that are only named, without arguments.

    Args:
        config: A checked configuration.
    """
    trials: dict[str, dict[str, Any]] = {}
    for run in config["runs"]:
        dataset, network = config["datasets"][run["dataset"]], config["networks"][run["network"]]
        architecture, arguments = network["architecture"], network["arguments"]
        if architecture in CIFAR_RESNETS or not (arguments or ":" in architecture.removeprefix("torchvision:")):
            continue
        n_classes, n_channels = KNOWN_SETS.get(dataset["source"], GUESSED)
        trials[run["network"]] = {
            "name": architecture,
            "arguments": dict(arguments),
            "num_classes": n_classes,
            "in_channels": dataset.get("channels", n_channels),
            "certain": dataset["source"] in KNOWN_SETS,
        }
    if config["inputs_needed"] and trials:
        for network, problem in _tried(trials).items():
            yield f"networks.{network}.architecture: {problem}"


def _tried(trials: Mapping[str, Any]) -> dict[str, str]:
    """Problems by network; none where the trial itself could not be made."""
    command = [sys.executable, "-m", "paretoprune.workflow.trial", json.dumps(trials)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        # Factories may print.
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return {}
    return found


def _problem(trial: Mapping[str, Any]) -> str | None:
    """Why one network cannot be built."""
    from paretoprune.networks.architectures import Architecture

    arguments = trial["arguments"]
    architecture = Architecture(trial["name"], trial["num_classes"], trial["in_channels"], arguments)
    try:
        architecture.build()
    except ValueError as error:
        return str(error)
    # Whatever the user's own code raises.
    except Exception as error:
        if trial["certain"]:
            return f"'{trial['name']}' cannot be built with {arguments}: {type(error).__name__}: {error}; correct it"
    return None


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))
    found = {name: problem for name, trial in json.loads(sys.argv[1]).items() if (problem := _problem(trial))}
    print(json.dumps(found))
