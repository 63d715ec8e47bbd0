"""The machine that times were measured on: what they depend on, and the refusal of those from elsewhere.

Nothing here imports torch before it is asked for a GPU's name.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from paretoprune.deployment.runtimes import Runtime

_CPU_INFO = Path("/proc/cpuinfo")
# What names a processor in /proc/cpuinfo; the first is missing on ARM, and says little on some virtual machines.
_NAME = "model name"
_DETAILS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
# What the speed of a convolution depends on most, and what a virtual machine may hide: the widest one is named.
_INSTRUCTIONS = ("amx_tile", "avx512f", "avx2", "avx", "sve", "asimd")
# A GPU is driven by another package of the same runtime.
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "torch.compile": ("torch",),
}


@dataclass(frozen=True)
class Machine:
    """What measured times depend on; text and numbers only, so that JSON holds it.

    Attributes:
        processor: The CPU's model and its widest instructions.
        cores: That the system has.
        device: What computes: the processor, or a GPU by name.
        runtime: Name of the runtime.
        version: Of the runtime.
        threads: That one batch is computed by.
        batch_size: Images of a batch.
    """

    processor: str
    cores: int
    device: str
    runtime: str
    version: str
    threads: int
    batch_size: int

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Undo `plain`.

        Raises:
            ValueError: A field is missing, is not known, or has a value of another type.
        """
        types = {field.name: field.type for field in fields(cls)}
        found = {name: type(value) for name, value in values.items()}
        if found != types:
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items() if isinstance(kind, type))
            told = ", ".join(f"{name} ({kind.__name__})" for name, kind in found.items()) or "nothing"
            raise ValueError(f"a machine: expected {expected}, found {told}; measure anew")
        return cls(**values)


def machine_of(runtime: "Runtime") -> Machine:
    """This machine, as a runtime uses it.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: There is no such GPU.
    """
    if runtime.is_gpu:
        import torch

        runtime.check_device()
        device = torch.cuda.get_device_name(torch.device(runtime.device))
    else:
        device = "cpu"
    return Machine(
        processor=processor(),
        cores=os.cpu_count() or 1,
        device=device,
        runtime=runtime.name,
        version=_version(runtime.name),
        threads=runtime.threads,
        batch_size=runtime.batch_size,
    )


def check_machine(found: Machine, expected: Machine, command: str) -> None:
    """Refuse times that were measured under other conditions.

    Args:
        found: Where the times come from.
        expected: Where they are to be used.
        command: What measures anew, as it is to be typed.

    Raises:
        ValueError: They differ; all that does is named.
    """
    differences = [
        f"{name} '{ours}', found '{theirs}'"
        for (name, ours), theirs in zip(expected.plain().items(), found.plain().values(), strict=True)
        if ours != theirs
    ]
    if differences:
        raise ValueError(
            f"the latency table was measured elsewhere: expected {'; expected '.join(differences)}; times do not carry "
            f"over, measure them on this machine: `{command}`"
        )


def processor() -> str:
    """The CPU's model as the system names it, with family and model numbers and its widest instructions."""
    if _CPU_INFO.exists():
        found = described_processor(_CPU_INFO.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def described_processor(cpu_info: str) -> str:
    """One line about the first processor in the text of /proc/cpuinfo; empty if it names none."""
    lines = [line.partition(":") for line in cpu_info.split("\n\n")[0].splitlines()]
    told = {key.strip(): value.strip() for key, _, value in lines}
    details = ", ".join(
        f"{key.removeprefix('CPU ').removeprefix('cpu ')} {told[key]}" for key in _DETAILS if key in told
    )
    flags = f" {told.get('flags', told.get('Features', ''))} "
    widest = next((name for name in _INSTRUCTIONS if f" {name} " in flags), "")
    named = f"{told.get(_NAME, platform.machine())} ({details})" if details else told.get(_NAME, "")
    return f"{named} {widest}".strip()


def _version(runtime: str) -> str:
    for package in _PACKAGES[runtime]:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    names = " or ".join(_PACKAGES[runtime])
    raise ModuleNotFoundError(
        f"times by {runtime}: expected the package {names}, found none; `pip install {_PACKAGES[runtime][0]}`",
        name=_PACKAGES[runtime][0],
    )
