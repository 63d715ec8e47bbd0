"""The machine that times belong to."""

import json
import platform
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from paretoprune.deployment.machines import Machine, check_machine, described_processor, machine_of
from paretoprune.deployment.runtimes import Runtime

MACHINE = Machine("a processor avx2", 2, "cpu", "onnxruntime", "1.30.0", 1, 64)


def test_a_machine_is_what_json_holds() -> None:
    assert Machine.of(json.loads(json.dumps(MACHINE.plain()))) == MACHINE


def test_this_machine_is_the_same_each_time_and_differs_by_how_it_is_used() -> None:
    machine = machine_of(Runtime("torch", batch_size=4, threads=2))
    assert machine == machine_of(Runtime("torch", batch_size=4, threads=2))
    assert (machine.runtime, machine.version, machine.threads, machine.batch_size, machine.device) == (
        "torch",
        metadata.version("torch"),
        2,
        4,
        "cpu",
    )
    assert machine.processor not in ("", "unknown")
    check_machine(machine, machine_of(Runtime("torch", batch_size=4, threads=2)), "again")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"processor": "another"}, "processor 'a processor avx2', found 'another'"),
        ({"cores": 64}, "cores '2', found '64'"),
        ({"device": "a GPU"}, "device 'cpu', found 'a GPU'"),
        ({"version": "1.29.0"}, "version '1.30.0', found '1.29.0'"),
        ({"threads": 2}, "threads '1', found '2'"),
        ({"batch_size": 1}, "batch_size '64', found '1'"),
        ({"runtime": "torch", "threads": 8}, "runtime 'onnxruntime', found 'torch'; expected threads '1', found '8'"),
    ],
)
def test_a_table_of_another_machine_is_refused_with_the_command_that_measures_anew(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"measured elsewhere: expected {named}; .*: `snakemake measure_latency`"):
        check_machine(replace(MACHINE, **changed), MACHINE, "snakemake measure_latency")


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx avx2 avx512f avx512_bf16

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
Features\t: fp asimd evtstrm
CPU implementer\t: 0x41
CPU variant\t: 0x3
CPU part\t: 0xd0c
"""


def test_processors_are_told_apart() -> None:
    assert described_processor(X86) == "AMD EPYC (family 25, model 17, stepping 1) avx512f"
    assert described_processor(X86.replace("avx512f ", "")) == "AMD EPYC (family 25, model 17, stepping 1) avx2"
    arm = f"{platform.machine()} (implementer 0x41, part 0xd0c, variant 0x3) asimd"
    assert described_processor(ARM) == arm
    assert described_processor("") == ""


def test_a_runtime_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(
        ModuleNotFoundError, match="onnxruntime or onnxruntime-gpu, found none; `pip install onnxruntime`"
    ):
        machine_of(Runtime("onnxruntime"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the GPU cuda:3, found 0 of them"):
        machine_of(Runtime("torch", device="cuda:3"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_named() -> None:
    assert machine_of(Runtime("torch", device="cuda")).device == torch.cuda.get_device_name(0)
