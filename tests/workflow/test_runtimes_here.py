"""A runtime that cannot be used is named before anything starts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from paretoprune.settings import RUNTIMES
from paretoprune.workflow import runtimes
from paretoprune.workflow.configuration import merge
from paretoprune.workflow.runtimes import PACKAGES, unusable_runtime

ROOT = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def found(**latency: Any) -> list[str]:
    return list(unusable_runtime(merge(DEFAULT, {"latency": {"measure": True, **latency}})))


def test_every_runtime_says_what_it_needs() -> None:
    assert tuple(PACKAGES) == RUNTIMES


def test_packages_that_are_missing_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name.startswith("onnx") else object())
    assert found(runtime="onnxruntime") == [
        "latency.runtime: onnxruntime needs onnxruntime, onnx, onnxscript, found none; "
        "`pip install 'paretoprune[deploy]'`, or `pip install onnxruntime onnx onnxscript`"
    ]
    assert found(runtime="torch") == []


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    (problem,) = found(runtime="torch.compile")
    assert re.search(r"needs a C\+\+ compiler, found no no-such-compiler -O2; install it, or choose torch", problem)
    assert found(runtime="torch") == []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert found(runtime="torch.compile") == []


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert found(runtime="torch", threads=4) == []
    assert found(runtime="torch", threads=5) == [
        "latency.threads: expected at most the 4 cores of this machine, found 5; lower it"
    ]


def test_nothing_is_looked_for_where_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: pytest.fail(f"looked for {name}"))
    assert found(measure=False) == []
    assert list(unusable_runtime(merge(DEFAULT, {"latency": {"measure": True}, "inputs_needed": False}))) == []


def test_what_is_looked_for_is_not_imported() -> None:
    code = (
        "import sys, yaml; from paretoprune.workflow.runtimes import unusable_runtime;"
        "config = yaml.safe_load(open('config.yaml')); config['latency']['measure'] = True;"
        "list(unusable_runtime(config)); print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(ROOT / "workflow" / "scripts")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.workflow
def test_the_workflow_asks_at_its_door() -> None:
    """Cores that no machine has stand for a package that is not installed."""
    changed = ["latency={measure: true, runtime: torch, threads: 100000}", "methods=[channels]"]
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--config", *changed]
    command += ["finetune={methods: []}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "latency.threads: expected at most the" in run.stdout + run.stderr
