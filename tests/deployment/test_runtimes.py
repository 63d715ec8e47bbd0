"""Networks made ready to run, and tables measured of their blocks."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.deployment import measuring
from paretoprune.deployment.blocks import Block
from paretoprune.deployment.latency import LatencyTable, Widths
from paretoprune.deployment.machines import machine_of
from paretoprune.deployment.measuring import measure_table
from paretoprune.deployment.running import prepare
from paretoprune.deployment.runtimes import Runtime
from paretoprune.deployment.timing import Timings, measure_interleaved
from paretoprune.networks.architectures import CifarResNet
from paretoprune.settings import RUNTIMES
from torch import Tensor, nn
from torch.nn import functional

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A residual block with an inner width."""

    def __init__(self, width: int, n_channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, n_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.conv1(x)))


class Watched(nn.Module):
    """Writes down how it is run."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def __deepcopy__(self, memo: Any) -> "Watched":
        return Watched(self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(
            (
                tuple(x.shape),
                torch.get_num_threads(),
                torch.is_inference_mode_enabled(),
                self.training,
                self.weight.dtype,
            )
        )
        return x * self.weight


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (2, 2), (7, 1)])
def test_torch_runs_a_whole_batch_with_its_threads_and_puts_them_back(batch_size: int, threads: int) -> None:
    seen: list[Any] = []
    network = Watched(seen)
    run = prepare(network, IMAGES, Runtime("torch", batch_size, threads))
    run()
    assert seen == [((batch_size, 3, 16, 16), threads, True, False, torch.float32)]
    assert torch.get_num_threads() == 1
    assert network.training
    assert network.weight.dtype == torch.float64


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected images to run the network on, found none"):
        prepare(Residual(2), torch.ones(0, 8, 4, 4), Runtime("torch"))


def test_threads_come_back_after_an_error_too() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        prepare(Broken(), IMAGES, Runtime("torch", threads=2))()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_network_of_twice_the_depth_takes_about_twice_as_long(name: str) -> None:
    if name == "onnxruntime":
        needs_onnx()
    runtime = Runtime(name, batch_size=8)
    shallow, deep = (nn.Sequential(*(Residual(32, 32) for _ in range(n))) for n in (2, 4))
    example = torch.randn(1, 32, 16, 16)
    functions = [prepare(one, example, runtime) for one in (shallow, deep)]
    # The time of this process alone: what else the machine does is no part of it.
    timings = measure_interleaved(functions, repeats=10, clock=time.process_time_ns)
    assert 1.2 < timings.relative()[1] < 3


def test_onnxruntime_computes_what_the_network_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_onnx()
    import onnxruntime

    answers = []
    bound = onnxruntime.InferenceSession.run_with_iobinding

    def watched(session: Any, binding: Any) -> None:
        bound(session, binding)
        answers.append((binding.copy_outputs_to_cpu()[0], session.get_session_options().intra_op_num_threads))

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", watched)
    network = CifarResNet(8).eval()
    prepare(network, IMAGES, Runtime("onnxruntime", batch_size=5, threads=2))()
    ((answer, threads),) = answers
    with torch.no_grad():
        expected = network(torch.cat([IMAGES, IMAGES[:2]]))
    np.testing.assert_allclose(answer, expected.numpy(), atol=1e-4)
    assert threads == 2


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_blocks_of_several_inputs_run_too(name: str) -> None:
    if name == "onnxruntime":
        needs_onnx()

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + y, x - y

    seen: list[tuple[int, ...]] = []
    network, ones = Sum(), torch.ones(1, 4)
    network.register_forward_hook(lambda module, inputs, outputs: seen.append(tuple(len(x) for x in inputs)))
    run = prepare(network, (ones, ones), Runtime(name, batch_size=3))
    seen.clear()
    run()
    # Only torch runs the network itself.
    assert seen == ([(3, 3)] if name == "torch" else [])
    with pytest.raises(TypeError, match="argument"):
        prepare(Sum(), (ones,), Runtime("torch", batch_size=3))()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_every_width_of_a_block_is_compiled_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile keeps a limited number of results for one `forward`, and silently runs the rest uncompiled."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    before = counters["stats"]["unique_graphs"]
    example = torch.randn(1, 8, 4, 4)
    runs = [prepare(Residual(width), example, Runtime("torch.compile", threads=1)) for width in (1, 2, 3)]
    assert counters["stats"]["unique_graphs"] == before + 3
    for run in [*runs, *runs]:
        run()
    assert counters["stats"]["unique_graphs"] == before + 3


def test_what_cannot_be_compiled_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        ValueError, match=r"Residual cannot be compiled .*No working C\+\+ compiler found; .*runtime torch"
    ):
        prepare(Residual(2), torch.randn(1, 8, 4, 4), Runtime("torch.compile"))


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_runtime_that_is_missing_is_named_with_the_remedy(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"`pip install {package}`, or `pip install 'paretoprune") as caught:
        prepare(Residual(2), torch.randn(1, 8, 4, 4), Runtime("onnxruntime"))
    assert caught.value.name == package


def test_an_onnxruntime_without_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_onnx()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ModuleNotFoundError, match="`pip install onnxruntime-gpu`"):
        prepare(Residual(2), torch.randn(1, 8, 4, 4), Runtime("onnxruntime", device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected the GPU cuda, found 0 of them; measure with device 'cpu'"):
        prepare(Residual(2), torch.randn(1, 8, 4, 4), Runtime(name, device="cuda"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "tensorrt"}, "expected one of onnxruntime, torch, torch.compile, found 'tensorrt'"),
        ({"batch_size": 0}, "expected a batch_size of at least 1, found 0"),
        ({"threads": 1.5}, "expected a threads of at least 1, found 1.5"),
        ({"device": "tpu"}, "expected the device cpu, cuda or cuda:<number>, found 'tpu'"),
        ({"device": "cpu:0"}, "found 'cpu:0'"),
        ({"device": "cuda:x"}, "found 'cuda:x'"),
    ],
)
def test_runtimes_that_there_are_not_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runtime(**values)


# ------------------------------------------------------------------------------------------------ tables


class Costs:
    """Stands for a runtime: a network's time is its number of parameters, and 5 for the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[float] = []
        # How much slower the machine gets from one measurement to the next.
        self.slow = 1.0
        monkeypatch.setattr(measuring, "prepare", self.prepare)

    def prepare(self, network: nn.Module, example: Any, runtime: Runtime) -> Callable[[], None]:
        cost = 5.0 + sum(parameter.numel() for parameter in network.parameters())
        self.made.append(cost)

        def run() -> None:
            raise AssertionError(cost)

        return run

    def measure(self, functions: Sequence[Callable[[], None]], **options: Any) -> Timings:
        costs = []
        for function in functions:
            with pytest.raises(AssertionError) as caught:
                function()
            costs.append(float(str(caught.value)))
        row = np.array(costs) * self.slow
        self.slow *= 2
        return Timings(np.stack([row, row, row]))


def linear(name: str, kind: str = "") -> Block:
    def make(widths: Widths) -> tuple[nn.Module, Tensor]:
        return nn.Linear(widths[0], 1, bias=False), torch.ones(1, widths[0])

    return Block.over(name, [[10, 20, 40]], make, kind)


def test_a_table_holds_each_block_s_time_without_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are measured while the machine slows down twofold from one to the next: ratios to the yardstick hold."""
    costs = Costs(monkeypatch)
    dense = nn.Sequential(nn.Linear(40, 1, bias=False), nn.Linear(1, 40, bias=False), nn.Linear(20, 5, bias=False))
    table = measure_table([linear("a"), linear("b")], Runtime("torch"), dense=(dense, IMAGES), measure=costs.measure)
    unit = np.median([45 * slow for slow in (1, 1, 1, 2, 2, 2, 4, 4, 4)]) / 45
    for name in "ab":
        assert table.blocks[name] == pytest.approx({(10,): 10 * unit, (20,): 20 * unit, (40,): 40 * unit})
    assert table.constant == pytest.approx((5 + 180 - 80) * unit)
    assert table.predict({"a": [40], "b": [40]}) == pytest.approx(185 * unit)
    assert table.machine == machine_of(Runtime("torch"))


class NoisyClock:
    """A clock that networks move by their number of parameters, more or less."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
        self.now, self.noise, self.generator = 0.0, noise, np.random.default_rng(0)
        self.n_calls = 0
        monkeypatch.setattr(measuring, "prepare", self.prepare)

    def __call__(self) -> int:
        return int(self.now)

    def prepare(self, network: nn.Module, example: Any, runtime: Runtime) -> Callable[[], None]:
        cost = 1e6 * (5 + sum(parameter.numel() for parameter in network.parameters()))

        def run() -> None:
            self.n_calls += 1
            self.now += cost * np.exp(self.noise * self.generator.standard_normal())

        return run

    def table(self, **options: Any) -> LatencyTable:
        return measure_table([linear("a"), linear("b")], Runtime("torch"), clock=self, **options)


def test_a_table_gets_more_rounds_on_a_noisy_machine_and_says_what_was_not_enough(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = NoisyClock(monkeypatch, 0.01)
    assert not quiet.table(bound=0.02).is_noisy
    noisy = NoisyClock(monkeypatch, 0.1)
    found = noisy.table(bound=0.02, most_repeats=3000)
    assert noisy.n_calls > 2 * quiet.n_calls
    assert 0.01 < found.uncertainty <= 0.02
    assert not found.is_noisy
    hopeless = NoisyClock(monkeypatch, 1.0)
    with caplog.at_level(logging.WARNING, "paretoprune"):
        found = hopeless.table(bound=0.02, most_repeats=40)
        assert not caplog.messages, "said once, by whoever has the whole table"
        found.report(logging.getLogger("paretoprune"))
    assert found.is_noisy
    assert found.bound == 0.02
    assert found.uncertainty > 0.02
    (message,) = caplog.messages
    assert "the machine was noisy: times of layers are known to" in message


def test_blocks_of_one_kind_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(monkeypatch)
    blocks = [linear("a", "stage 1"), linear("b", "stage 1"), linear("stage 1"), linear("c", "stage 2")]
    table = measure_table(blocks, Runtime("torch"), measure=costs.measure)
    assert len(costs.made) == 2 + 3 * 3
    assert list(table.blocks) == ["a", "b", "stage 1", "c"]
    assert table.blocks["a"] == table.blocks["b"]
    assert table.constant == pytest.approx(5 * np.median([1, 2, 4]))  # the call


def test_blocks_with_one_name_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="expected blocks with different names, found none"):
        measure_table([], Runtime("torch"))
    with pytest.raises(ValueError, match="found a, b, a"):
        measure_table([linear("a"), linear("b"), linear("a")], Runtime("torch"))


def test_blocks_of_one_kind_with_different_widths_are_refused() -> None:
    other = Block.over("b", [[10, 20]], linear("b").make, "stage 1")
    with pytest.raises(ValueError, match="kind 'stage 1' with the same widths, found others at 'a' than at 'b'"):
        measure_table([linear("a", "stage 1"), other], Runtime("torch"))


def test_a_block_that_the_runtime_cannot_run_is_named() -> None:
    needs_onnx()

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    block = Block("stage2.1", ((1,),), lambda widths: (Branching(), torch.ones(1, 1)))
    with pytest.raises(ValueError, match=r"block 'stage2.1' at \(1,\): Branching cannot be exported"):
        measure_table([block], Runtime("onnxruntime"))


def test_a_measured_table_predicts_networks_that_were_never_measured() -> None:
    """Wide blocks on torch, so that what they compute is most of what they take."""

    def make(widths: Widths) -> tuple[nn.Module, Tensor]:
        return Residual(widths[0], 32), torch.randn(1, 32, 16, 16)

    def network(*widths: int) -> nn.Module:
        return nn.Sequential(*(Residual(width, 32) for width in widths))

    runtime, example = Runtime("torch", batch_size=4), torch.randn(1, 32, 16, 16)
    blocks = [Block.over(f"block{i}", [[16, 32, 48, 64]], make, kind="block") for i in range(3)]
    table = measure_table(blocks, runtime, dense=(network(64, 64, 64), example), repeats=10, clock=time.process_time_ns)
    times = list(table.blocks["block0"].values())
    assert times[0] < times[-1]
    widths = {"block0": [16], "block1": [64], "block2": [32]}
    dense = {name: [64] for name in widths}
    timings = measure_interleaved(
        [prepare(network(*sizes), example, runtime) for sizes in ((64, 64, 64), (16, 64, 32))],
        repeats=10,
        clock=time.process_time_ns,
    )
    assert table.predict(widths) / table.predict(dense) == pytest.approx(timings.relative()[1], rel=0.25)
