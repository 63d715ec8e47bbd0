"""What networks run on where they are deployed; `deployment/running.py` runs them.

Nothing here imports torch before it is asked for a GPU.
"""

from dataclasses import dataclass

from paretoprune.settings import RUNTIMES


@dataclass(frozen=True)
class Runtime:
    """How networks are run where they are deployed.

    Attributes:
        name: onnxruntime, torch (eager), or torch.compile.
        batch_size: Images that arrive at a time.
        threads: That compute one batch; on a GPU, those of the CPU that feeds it.
        device: cpu, cuda, or cuda:<number>.

    Raises:
        ValueError: A value is none of these.
    """

    name: str = "onnxruntime"
    batch_size: int = 1
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise ValueError(f"runtime: expected one of {', '.join(RUNTIMES)}, found '{self.name}'")
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"runtime: expected a {name} of at least 1, found {value!r}")
        kind, colon, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
            raise ValueError(f"runtime: expected the device cpu, cuda or cuda:<number>, found '{self.device}'")

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device != "cpu"

    def check_device(self) -> None:
        """Refuse a GPU that is not there.

        Raises:
            ValueError: torch finds no such GPU.
        """
        if not self.is_gpu:
            return
        import torch

        number = int(self.device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"runtime: expected the GPU {self.device}, found {torch.cuda.device_count()} of them; measure with "
                "device 'cpu', or on the machine that has it"
            )
