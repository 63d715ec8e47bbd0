"""Networks in files that other runtimes read: ONNX and torch's `.pt2`, checked by running what was written."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.copies import copied, unwrapped
from paretoprune.deployment.packages import needed
from paretoprune.devices import plain_modes
from paretoprune.files import atomic_path

# What torch's exporter translates to by itself; newer ones are made of it by a further conversion, which may fail.
OPSET = 18
# Largest difference of two logits that rounding makes, as a share of the largest logit.
TOLERANCE = 1e-3
# Images that are run at a time to compare.
BATCH_SIZE = 64
# What a file of protocol buffers can hold.
MOST_BYTES = 2**31 - 2**24
IMAGES, LOGITS = "images", "logits"
BATCH = "batch"

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class ExportReport:
    """An exported network, as it answered when it was read back and run.

    Attributes:
        n_bytes: Size of the file.
        n_images: Images that it was run on.
        largest_difference: Of any logit from the network's own.
        equal_top1: Share of images with the same first answer.
        dynamic_batch: Whether it takes any number of images at a time.
    """

    n_bytes: int
    n_images: int
    largest_difference: float
    equal_top1: float
    dynamic_batch: bool


@dataclass(frozen=True)
class OnnxReport(ExportReport):
    """Likewise for an ONNX file.

    Attributes:
        opset: Version of ONNX's operators.
    """

    opset: int = OPSET


@plain_modes()
def export_onnx(
    network: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> OnnxReport:
    """Write a network as one ONNX file with its weights inside, and run it in onnxruntime on real images.

    It is written in float32 and evaluation mode. The file's input is called `images`, its output `logits`; it names no
    path of this machine.

    Args:
        network: It is left as it is.
        example: Real images (n, c, h, w), or what else it takes; the answers are compared on all of them.
        path: The file, ending in `.onnx`. It is not touched unless all went well.
        dynamic_batch: Whether the file takes any number of images at a time, or exactly n.
        tolerance: Largest difference of a logit, as a share of the largest one.

    Raises:
        ModuleNotFoundError: A package that this needs is not installed.
        ValueError: The name ends otherwise, the network cannot be exported (reason and remedy are named), is too
            large for such a file, does not answer logits, or answers otherwise from the file.
    """
    target = _checked_path(path, ".onnx")
    runtime = needed("onnxruntime", "the exported network is run")
    network, (example,) = plain(network), plain_inputs(example)
    expected = _logits(network, example)
    content = onnx_bytes(network, example, dynamic_batch=dynamic_batch)
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
        session = runtime.InferenceSession(temporary, session_options(1), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {IMAGES: images.numpy()})[0])

        difference, equal = _compare(target, run, example, expected, dynamic_batch, tolerance)
    return OnnxReport(len(content), len(example), difference, equal, dynamic_batch)


@plain_modes()
def export_pt2(
    network: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a network for `torch.export.load(path).module()`, which needs neither its source nor this package.

    Arguments, what is left as it is, what is checked and what is raised are as of `export_onnx`; the file ends in
    `.pt2`.
    """
    target = _checked_path(path, ".pt2")
    network, (example,) = plain(network), plain_inputs(example)
    expected = _logits(network, example)
    program = exported_program(network, example, dynamic_batch=dynamic_batch)
    with atomic_path(target) as temporary:
        with _refused(network, "torch.export.save"), quiet():
            torch.export.save(program, temporary)
            loaded = torch.export.load(temporary).module()
        with torch.inference_mode():
            difference, equal = _compare(target, loaded, example, expected, dynamic_batch, tolerance)
        n_bytes = temporary.stat().st_size
    return ExportReport(n_bytes, len(example), difference, equal, dynamic_batch)


def plain(network: nn.Module) -> nn.Module:
    """A copy for inference: on the CPU, in float32 and evaluation mode, out of wrappers, without gradients."""
    return copied(unwrapped(network)).cpu().float().eval().requires_grad_(requires_grad=False)


def onnx_bytes(network: nn.Module, inputs: Inputs, *, dynamic_batch: bool) -> bytes:
    """A network as the bytes of an ONNX file, checked by ONNX's own checker.

    Args:
        network: As `plain` makes it. It may be a block that answers anything made of tensors.
        inputs: What it takes, images first. More inputs than one are called `images`, `images_1`, ...
        dynamic_batch: Whether the file takes any number of images.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        ValueError: The network cannot be exported, or is too large.
    """
    onnx = needed("onnx", "networks are exported to ONNX")
    needed("onnxscript", "networks are exported to ONNX")
    n_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    if n_bytes > MOST_BYTES:
        raise ValueError(
            f"expected weights of at most {MOST_BYTES / 2**30:.2f} GiB, which is what one ONNX file can hold, found "
            f"{n_bytes / 2**30:.2f} GiB; export to .pt2"
        )
    program = exported_program(network, inputs, dynamic_batch=dynamic_batch)
    names = [IMAGES, *(f"{IMAGES}_{i}" for i in range(1, len(as_tuple(inputs))))]
    with _refused(network, "torch.onnx.export"), quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[LOGITS],
            external_data=False,
            verbose=False,
        )
        model = made.model_proto  # type: ignore[union-attr]
        _forget_notes(model)
        onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def exported_program(network: nn.Module, inputs: Inputs, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """A network as torch's exporter sees it, without the places in source files that made it.

    Args:
        network: As `plain` makes it.
        inputs: What it takes, images first.
        dynamic_batch: Whether the first dimension of every input may be any number.

    Raises:
        ValueError: The network cannot be exported; the reason and a remedy are named.
    """
    args = as_tuple(inputs)
    shapes: tuple[dict[int, Any], ...] | None = None
    if dynamic_batch:
        # A single image would be taken for a constant.
        args = tuple(of_batch(tensor, 2 if len(tensor) < 2 else min(len(tensor), BATCH_SIZE)) for tensor in args)
        batch = torch.export.Dim(BATCH)
        shapes = tuple({0: batch} for _ in args)
    with _refused(network, "torch.export", dynamic_batch=dynamic_batch), quiet(), torch.no_grad():
        program = torch.export.export(network, args, dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def session_options(threads: int) -> Any:
    """Options of an onnxruntime session: one batch at a time, by `threads` threads, without chatter.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    runtime = needed("onnxruntime", "networks are run by onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Errors only: warnings name nodes that nobody wrote.
    options.log_severity_level = 3
    return options


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed, logged or warned of inside; errors still say all."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ----------------------------------------------------------------------------------------------- errors


@contextmanager
def _refused(network: nn.Module, by: str, *, dynamic_batch: bool = False) -> Iterator[None]:
    """Turn what an exporter raises into a reason and a remedy.

    Raises:
        ValueError: Whatever was raised inside, memory that ran out aside.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        causes = list(_causes(error))
        remedy = _remedy(causes, dynamic_batch=dynamic_batch)
        raise ValueError(
            f"{type(network).__name__} cannot be exported, {by} refuses it: {_reason(causes)}; {remedy}"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, from the outside in."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(causes: Sequence[BaseException]) -> str:
    """The first telling line of the innermost error that says anything."""
    for cause in reversed(causes):
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        if lines:
            # Violated constraints are listed below a first line that only says so.
            telling = next((line.lstrip("- ") for line in lines if line.startswith("- ")), lines[0])
            return f"{type(cause).__name__}: {telling[:300].rstrip('.:;')}"
    return type(causes[-1]).__name__


def _remedy(causes: Sequence[BaseException], *, dynamic_batch: bool) -> str:
    told = " ".join(f"{type(cause).__name__} {cause}" for cause in causes)
    if "DataDependent" in told or "data-dependent" in told or "dynamic control flow" in told:
        return "write what depends on the values of tensors with torch.where, or keep it out of `forward`"
    if dynamic_batch and any(text in told for text in ("ConstraintViolation", f"({BATCH})", "dynamic_shapes", "mark")):
        return "let `forward` use the batch's own size (x.shape[0]), or export with dynamic_batch=False"
    if "No ONNX function found" in told or "DispatchError" in told or "ConversionError" in told:
        return "replace that operation by others, or export to .pt2"
    return "see the whole reason by `torch.export.export(network, (images,))` and change `forward`, or run it by torch"


# -------------------------------------------------------------------------------------------- comparison


def _compare(
    path: Path,
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    expected: Tensor,
    dynamic_batch: bool,
    tolerance: float,
) -> tuple[float, float]:
    """Largest difference of a logit, and the share of images with an equal first answer.

    Raises:
        ValueError: The shapes differ, or the difference is more than the tolerance.
    """
    size = BATCH_SIZE if dynamic_batch else len(images)
    answered = torch.cat([run(images[i : i + size]) for i in range(0, len(images), size)])
    if dynamic_batch and len(images) > 1:
        # Another number of images than it was exported with, and the number that is asked for most.
        answered[:1] = run(images[:1])
    if answered.shape != expected.shape:
        raise ValueError(
            f"{path.name}: expected logits {tuple(expected.shape)}, found {tuple(answered.shape)}; export with "
            "dynamic_batch=False"
        )
    difference = float((answered - expected).abs().max())
    largest = float(expected.abs().max())
    # Answers that are 0 but for rounding have no scale.
    if not difference <= tolerance * max(largest, 1e-6):
        raise ValueError(
            f"{path.name}: expected the network's answers within {tolerance:g} of its largest logit {largest:.4g}, "
            f"found a difference of {difference:.4g}; the file was not kept: run its layers one by one to see which "
            "one differs, or raise the tolerance"
        )
    return difference, float((answered.argmax(1) == expected.argmax(1)).float().mean())


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """Answers in evaluation mode; float (n, n_classes, ...).

    Raises:
        ValueError: They are no tensor of one row an image, or not finite.
    """
    with torch.inference_mode():
        answers = [network(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)]
    if not all(isinstance(one, Tensor) and one.ndim >= 2 for one in answers):
        raise ValueError(
            f"expected a network that answers logits (n, n_classes), found {type(answers[0]).__name__}; wrap it so "
            "that it answers the logits alone"
        )
    logits = torch.cat(answers)
    if not logits.isfinite().all():
        raise ValueError("expected finite answers, found some that are not; check the weights and the images")
    return logits


# ------------------------------------------------------------------------------------------------- parts


def _checked_path(path: str | os.PathLike[str], suffix: str) -> Path:
    if Path(path).suffix != suffix:
        raise ValueError(f"expected a file name that ends in {suffix}, found '{Path(path).name}'; rename it")
    return Path(path)


def plain_inputs(inputs: Inputs) -> tuple[Tensor, ...]:
    """All inputs of a network, also where there is one, on the CPU, real numbers in float32.

    Raises:
        ValueError: There are no images.
    """
    if any(len(tensor) < 1 for tensor in as_tuple(inputs)):
        raise ValueError("expected images to run the network on, found none; pass some real ones")
    tensors = (tensor.detach().cpu().contiguous() for tensor in as_tuple(inputs))
    return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    """All inputs of a network, also where there is one."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def of_batch(tensor: Tensor, size: int) -> Tensor:
    """`size` rows of a tensor, from the start again where it has fewer."""
    times = -(-size // len(tensor))
    return tensor.repeat(times, *([1] * (tensor.ndim - 1)))[:size]


def _forget_notes(model: Any) -> None:
    """Take out of an ONNX model what the exporter noted of each node, a twentieth of a small network's file."""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for part in (graph, *graph.node, *graph.value_info):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer, model):
        part.ClearField("metadata_props")
