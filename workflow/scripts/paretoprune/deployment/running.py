"""One batch through a network, by the runtimes that people deploy with."""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.deployment.export import Inputs, of_batch, onnx_bytes, plain, plain_inputs, quiet, session_options
from paretoprune.deployment.packages import needed
from paretoprune.deployment.runtimes import Runtime
from paretoprune.devices import plain_modes


@dataclass(frozen=True)
class Prepared:
    """A network that is ready: a call runs one batch, and returns when the answers are there.

    Attributes:
        run: What is called.
        file_bytes: Size of the file that the runtime would read it from; None where it reads none.
    """

    run: Callable[[], Any]
    file_bytes: int | None = None

    def __call__(self) -> Any:
        """Run one batch."""
        return self.run()


def check_runtime(runtime: Runtime) -> None:
    """Run next to nothing, so that what is missing is said before any long work.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: It does not work here, or there is no such GPU.
    """
    prepare(nn.ReLU(), torch.ones(1, 1), runtime)()


@plain_modes()
def prepare(network: nn.Module, example: Inputs, runtime: Runtime) -> Prepared:
    """Make a network ready: what comes back runs one batch, and returns when the answers are there.

    It is run in float32 and evaluation mode, on inputs that lie on the device already. torch's number of threads is set
    for the time of each call.

    Args:
        network: It is copied.
        example: Images (n, c, h, w), or all inputs; repeated or cut to the batch size.
        runtime: What is to run it.

    Raises:
        ModuleNotFoundError: The runtime is not installed.
        ValueError: The network cannot be run by it, there are no images, or there is no such GPU.
    """
    runtime.check_device()
    network = plain(network)
    inputs = tuple(of_batch(tensor, runtime.batch_size) for tensor in plain_inputs(example))
    if runtime.name == "onnxruntime":
        return _by_onnxruntime(network, inputs, runtime)
    return _by_torch(network, inputs, runtime)


def _by_torch(network: nn.Module, inputs: tuple[Tensor, ...], runtime: Runtime) -> Prepared:
    device = torch.device(runtime.device)
    network = network.to(device)
    inputs = tuple(tensor.to(device) for tensor in inputs)
    forward: Callable[..., Any] = network
    if runtime.name == "torch.compile":
        # The compiler warns of its own parts when it is first loaded.
        with quiet():
            forward = torch.compile(_of_its_own(network), dynamic=False)

    def run() -> None:
        before = torch.get_num_threads()
        # Setting it to what it is would still cost some microseconds.
        if before != runtime.threads:
            torch.set_num_threads(runtime.threads)
        try:
            with torch.inference_mode():
                forward(*inputs)
            if runtime.is_gpu:
                torch.cuda.synchronize(device)
        finally:
            if before != runtime.threads:
                torch.set_num_threads(before)

    if runtime.name == "torch.compile":
        _compile(run, type(network).__name__)
    return Prepared(run)


def _compile(run: Callable[[], None], name: str) -> None:
    """Run once, which compiles for the number of threads that is set then."""
    try:
        with quiet():
            run()
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{name} cannot be compiled by torch.compile: {reason[:300]}; it needs a C++ compiler on a CPU "
            "(`g++ --version`), or measure with the runtime torch"
        ) from error


def _of_its_own(network: nn.Module) -> Callable[..., Any]:
    """A function that runs a network, and shares its code with no other function.

    torch.compile keeps what it compiled with the code, up to 8 times: the ninth width of a block would silently be run
    uncompiled.
    """

    def run(*inputs: Tensor) -> Any:
        return network(*inputs)

    code = run.__code__.replace(co_name=f"run_{type(network).__name__}")
    return FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)


def _by_onnxruntime(network: nn.Module, inputs: tuple[Tensor, ...], runtime: Runtime) -> Prepared:
    onnxruntime = needed("onnxruntime", "networks are run by onnxruntime")
    kind, _, number = runtime.device.partition(":")
    provider: Any = "CPUExecutionProvider"
    if runtime.is_gpu:
        provider = ("CUDAExecutionProvider", {"device_id": int(number or 0)})
        if provider[0] not in onnxruntime.get_available_providers():
            raise ModuleNotFoundError(
                f"runtime: expected an onnxruntime for {runtime.device}, found one for the CPU; `pip install "
                "onnxruntime-gpu` in place of onnxruntime",
                name="onnxruntime-gpu",
            )
    content = onnx_bytes(network, inputs, dynamic_batch=False)
    session = onnxruntime.InferenceSession(content, session_options(runtime.threads), providers=[provider])
    # Bound once, so that a GPU finds its images where they are, as torch does.
    binding = session.io_binding()
    place = kind, int(number or 0)
    for meta, tensor in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_ortvalue_input(meta.name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), *place))
    for meta in session.get_outputs():
        binding.bind_output(meta.name, *place)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return Prepared(run, len(content))
