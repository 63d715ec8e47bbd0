"""From networks to programs: which calls become one step, when their results are dropped, and every refusal."""

from collections.abc import Callable

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, made
from paretoprune.networks.tracing import Call, Convolution, NotTraceableError, Program, reads, run_call, trace
from small_networks import digits, states_equal, trained
from torch import Tensor, nn


def convolutions(program: Program) -> dict[str, Convolution]:
    return {step.module: step for step in program.steps if isinstance(step, Convolution)}


def calls(program: Program) -> list[str]:
    return [step.output.name for step in program.steps if isinstance(step, Call)]


def test_a_residual_network_is_one_step_for_each_convolution_and_a_head() -> None:
    program = trace(trained("residual"))
    found = convolutions(program)
    assert set(found) == {name for name, m in trained("residual").named_modules() if isinstance(m, nn.Conv2d)}
    assert all(step.norm == name.replace("conv", "bn") and step.relu for name, step in found.items())
    assert {name for name, step in found.items() if step.other is not None} == {
        name for name in found if name.endswith("conv2")
    }
    # No batch norm, sum or ReLU is left over.
    assert not any(name.startswith(("bn", "relu", "add")) for name in calls(program))


def test_the_later_of_two_convolutions_takes_their_sum() -> None:
    for name, later in (("Downsampled", "shortcut"), ("ShortcutFirst", "b")):
        found = convolutions(trace(made(ARCHITECTURES[name])))
        assert [module for module, step in found.items() if step.other is not None] == [later], name
        assert found[later].relu


def test_batch_norms_before_convolutions_stay_calls_of_their_own() -> None:
    program = trace(made(ARCHITECTURES["PreActivation"]))
    norms = [step.norm for step in program.steps if isinstance(step, Call) and step.norm is not None]
    assert norms == ["a_norm", "last_norm"]
    assert {name: step.norm for name, step in convolutions(program).items()} == {
        "stem": "stem_norm",
        "a": "b_norm",  # it happens to follow a convolution, with nothing in between
        "b": None,
    }


def test_convolutions_that_pad_otherwise_than_with_zeros_are_called_as_they_are() -> None:
    program = trace(made(ARCHITECTURES["OddGeometry"]))
    assert set(convolutions(program)) == {"stem", "dilated", "depthwise", "wide"}
    assert {"reflecting", "circular", "same"} <= set(calls(program))


def test_a_convolution_whose_answer_is_read_twice_keeps_it() -> None:
    class Twice(architectures.Small):
        def middle(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.a_norm(y) + y

    step = convolutions(trace(made(Twice)))["a"]
    assert (step.norm, step.other, step.relu) == (None, None, False)


def test_a_sum_with_a_factor_is_no_plain_sum() -> None:
    class Weighted(architectures.Small):
        def middle(self, x: Tensor) -> Tensor:
            return torch.add(self.a(x), x, alpha=2)

    assert convolutions(trace(made(Weighted)))["a"].other is None


def test_only_what_follows_the_last_convolution_is_tail() -> None:
    program = trace(made(ARCHITECTURES["PreActivation"]))
    tails = {step.output.name: step.tail for step in program.steps if isinstance(step, Call)}
    assert tails["head"]
    assert tails["last_norm"]
    assert not tails["a_norm"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_step_reads_is_there_and_is_dropped_after_its_last_reader(name: str) -> None:
    program = trace(made(ARCHITECTURES[name]))
    held = {program.image}
    for i, step in enumerate(program.steps):
        assert set(reads(step)) <= held
        held.add(step.output)
        assert set(step.dead) <= held
        held -= set(step.dead)
        read_later = {node for later in program.steps[i + 1 :] for node in reads(later)}
        assert held == (read_later & held) | ({program.image, program.answer} & held)
    assert held == {program.image, program.answer}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "residual", "foreign"])
def test_the_network_itself_is_left_as_it_is(name: str) -> None:
    network = trained(name) if name in ("residual", "foreign") else made(ARCHITECTURES[name])
    in_place = [getattr(module, "inplace", None) for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    program = trace(network)
    assert network.training
    assert [getattr(module, "inplace", None) for module in network.modules()] == in_place
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert states_equal(program.network, network)
    assert not {id(p) for p in program.network.parameters()} & {id(p) for p in network.parameters()}
    assert not program.network.training


def test_calls_in_the_tail_are_computed_in_float32() -> None:
    program = trace(made(ARCHITECTURES["BiasAndNorm"]))
    head = next(s for s in program.steps if isinstance(s, Call) and s.output.name == "head")
    source = head.output.all_input_nodes[0]
    answer = run_call(head, {source: torch.ones(2, 32, dtype=torch.bfloat16)}, program.network)
    assert answer.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (architectures.Branching, r"its forward cannot be traced \(.*control flow"),
        (architectures.Assigning, r"its forward cannot be traced \(.* item assignment\)"),
        (architectures.Filling, r"it changes a tensor in place \('fill_'\)"),
        (architectures.ReadAfterInPlace, r"'relu_?\d*' changes a tensor in place that is read again"),
        (architectures.ReadAfterSharedInPlace, r"changes a tensor in place that is read again"),
        (architectures.ViewOfInPlace, r"in place"),
        (architectures.InPlaceOnView, r"in place"),
        (architectures.TakesTwo, "its forward takes 2 arguments instead of one"),
        (architectures.TwoOutputs, "its output is not a single tensor"),
    ],
)
def test_what_cannot_be_a_program_is_refused_with_the_reason(kind: Callable[[], nn.Module], reason: str) -> None:
    # Two outputs cannot be shown the digits by `made`.
    network = kind().eval()
    with pytest.raises(NotTraceableError, match=reason):
        trace(network)


def test_an_error_of_the_network_s_own_code_becomes_the_reason() -> None:
    class Picky(architectures.Plain):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise KeyError("only tensors, please")
            return super().forward(x)

    with pytest.raises(NotTraceableError, match="only tensors, please"):
        trace(Picky())


def test_a_network_that_writes_its_output_into_a_given_tensor_is_refused() -> None:
    class Out(architectures.Plain):
        def between(self, x: Tensor) -> Tensor:
            return torch.mul(x, 2, out=x)

    with pytest.raises(NotTraceableError, match=r"it writes into a tensor \('mul'\)"):
        trace(Out())


def test_changing_the_images_in_place_changes_no_images_of_the_caller() -> None:
    class Greedy(architectures.Plain):
        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            return super().forward(x.add_(1))

    program = trace(made(Greedy))
    images = digits()[0][:3].clone()
    registers = {program.image: images}
    for step in program.steps[:2]:
        assert isinstance(step, Call)
        registers[step.output] = run_call(step, registers, program.network)
    assert torch.equal(images, digits()[0][:3])
    assert torch.equal(registers[program.steps[1].output], images * 2 + 1)


def test_arguments_with_defaults_keep_them() -> None:
    network = architectures.TwoInputs().eval()
    program = trace(network)
    assert [node.op for node in program.image.graph.nodes].count("placeholder") == 1
