"""The network as it stands: a row for each situation that people bring, with what is right."""

import copy
import logging
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from paretoprune.copies import copied, unwrapped
from paretoprune.evaluation.compute import Backends, answers
from paretoprune.evaluation.fused import FusedNetwork
from paretoprune.evaluation.layerwise import LayerwiseNetwork
from paretoprune.evaluation.task import Task
from paretoprune.importance.layer_statistics import collect_statistics
from paretoprune.importance.scores import compute_importance
from paretoprune.masks.units import WeightUnits
from paretoprune.networks.guessing import compare_with_guessing
from paretoprune.networks.inspection import Inspection, check_answers, inspect_network
from paretoprune.networks.wrapping import logits_of
from paretoprune.settings import Evaluating
from small_networks import digits, fresh, magnitude_mask, n_hooks, numpy_state, states_equal
from torch import Tensor, nn
from torch.nn import functional

Named = namedtuple("Named", ["aux", "logits"])


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor


class Plain(nn.Module):
    """A small classifier of digits whose parts are changed by the rows below.

    Args:
        before: What is done to the images.
        middle: What is done to activations (n, 4, 8, 8).
        after: What is done to the logits.
    """

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        middle: nn.Module | Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(256, 10)
        self.before, self.middle, self.after = before, middle, after

    def forward(self, x: Tensor) -> Any:
        x = x if self.before is None else self.before(x)
        x = functional.relu(self.conv(x))
        x = x if self.middle is None else self.middle(x)
        x = self.head(x.flatten(1))
        return x if self.after is None else self.after(x)


def images(n: int = 64) -> Tensor:
    return digits()[0][:n].clone()


def answer(network: nn.Module, n: int = 64) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(images(n))
    return found


def look(network: nn.Module, **options: Any) -> Inspection:
    return inspect_network(network, images(), **options)


def test_a_network_without_peculiarities_is_copied_and_nothing_else() -> None:
    network, given, state, before = fresh("foreign"), images(), numpy_state(), torch.get_rng_state()
    trained = copy.deepcopy(network)
    network.train()
    found = inspect_network(network, given)
    assert states_equal(found.network, trained)
    assert found.units == WeightUnits.of(network)
    assert (found.n_classes, found.exclude, found.unused, found.matrices) == (10, (), {}, {})
    assert n_hooks(found.network) == 0
    assert not found.network.training
    assert network.training
    assert torch.equal(given, images())
    assert torch.equal(torch.get_rng_state(), before)
    assert numpy_state() == state
    n, total = found.units.n_units, sum(p.numel() for p in network.parameters())
    assert found.lines() == [f"{n} prunable weights in 8 layers, {n / total:.1%} of all parameters"]


# ----------------------------------------------------------------------------------------- inputs that are written into


def shifted_in_place(x: Tensor) -> Tensor:
    return x.sub_(0.5).div_(0.3)


def through_data(x: Tensor) -> Tensor:
    x.data.sub_(0.5).div_(0.3)
    return x


def assigned(x: Tensor) -> Tensor:
    x[:, :, 0] = 0.0
    return x


def edge_cleared(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 0.0
    return x


WRITING: dict[str, tuple[Any, Any]] = {
    "a method": (shifted_in_place, lambda x: (x - 0.5) / 0.3),
    "an operator": (lambda x: x.__isub__(0.5), lambda x: x - 0.5),
    "data": (through_data, lambda x: (x - 0.5) / 0.3),
    "an item": (assigned, edge_cleared),
    "a view": (lambda x: x.view(-1, 1, 8, 8).mul_(2.0), lambda x: x * 2.0),
    "an activation": (nn.ReLU(inplace=True), nn.ReLU()),
    "a function with inplace": (lambda x: functional.hardtanh(x, inplace=True), functional.hardtanh),
    "a function by its name": (lambda x: torch.clamp_(x, -1.0, 1.0), lambda x: torch.clamp(x, -1.0, 1.0)),
}


@pytest.mark.parametrize("case", WRITING)
def test_a_network_that_writes_into_its_images_gets_copies_and_answers_as_without_writing(case: str) -> None:
    writing, pure = (Plain(before) for before in WRITING[case])
    given = images()
    found = inspect_network(writing, given)
    assert found.adaptation.copies_inputs
    assert any("copies of its images" in line for line in found.lines())
    with torch.no_grad():
        assert torch.equal(found.network(given), pure(given))
        assert torch.equal(given, images())
    # What is handed out writes as the original does, and knows nothing of this package.
    assert n_hooks(found.bare()) == 0
    with torch.no_grad():
        found.bare()(given)
    assert not torch.equal(given, images())
    assert not inspect_network(pure, images()).adaptation.copies_inputs


@pytest.mark.parametrize("case", WRITING)
@pytest.mark.parametrize("kind", [FusedNetwork, LayerwiseNetwork])
def test_every_way_to_compute_leaves_images_alone_and_answers_as_without_writing(
    case: str, kind: type[FusedNetwork] | type[LayerwiseNetwork]
) -> None:
    given, calibration = images(), images()
    found = []
    for before in WRITING[case]:
        network = look(Plain(before)).network
        units = WeightUnits.of(network)
        task = Task(network, units, given, digits()[1][:64], calibration)
        backends = Backends(task, Evaluating(repair="batchnorm"), torch.device("cpu"), None)
        if kind is FusedNetwork and case in ("an item", "data"):
            # These cannot be a program, whoever writes; the way that is chosen is the plain one.
            way: Any = backends.choose(torch.float32).network
        else:
            way = backends.prepared(kind, torch.float32)
            assert type(way) is kind
        masks = [None, magnitude_mask(network, units, 0.4)]
        with torch.inference_mode():
            found.append([answers(way, given, 32, mask) for mask in masks])
    for written, pure in zip(*found, strict=True):
        torch.testing.assert_close(written, pure, rtol=0, atol=1e-5)
    assert torch.equal(given, images())
    assert torch.equal(calibration, images())


@pytest.mark.parametrize("case", WRITING)
def test_statistics_and_scores_leave_images_alone_and_are_those_without_writing(case: str) -> None:
    given, labels, found = images(), digits()[1][:64], []
    for before in WRITING[case]:
        network = look(Plain(before)).network
        units = WeightUnits.of(network)
        layers = collect_statistics(network, units, given, seed=0)
        scores = compute_importance("fisher", network, units, given, labels, 0)
        found.append(([layer.covariance for layer in layers.values()], list(scores.values())))
    for written, pure in zip(*found, strict=True):
        for a, b in zip(written, pure, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch.equal(given, images())


# ------------------------------------------------------------------------------------------- answers that cannot be had


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class SeldomDropped(nn.Module):
    """As stochastic depth that is never switched off: some calls are without."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x if float(torch.rand(())) < 0.3 else x


class Inner(nn.Module):
    """A module whose function is not that of a child."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.function(self.first(x)))
        return found


def by_the_batch(x: Tensor) -> Tensor:
    return functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)


class Lost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-x - 1)


class InAList(Plain):
    """Layers that torch does not see, as they lie in a list; `teacher` is one that no answer needs."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layers = [nn.Linear(256, 256), nn.ReLU()]
        self.teacher = {"of": [nn.Linear(2, 2)]}
        self.middle = self.through if used else None

    def through(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x


class Ordered(nn.Module):
    """Attention that takes the first dimension for time, as torch does by default."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x[:, 0]).flatten(1))
        return found


class WithExtraState(Plain):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None: ...


class NeedsMore(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


def by_a_lambda() -> Plain:
    network = Plain()
    network.forward = lambda x: network.head(network.conv(x).relu().flatten(1))  # type: ignore[method-assign]
    return network


def renaming_its_state(network: Plain) -> None:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
        for key in list(state):
            state[f"student.{key}"] = state.pop(key)

    network._register_state_dict_hook(rename)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: Plain, r"found 'Plain', which is called to make one; give Plain\(\.\.\.\), with its trained"),
    "a state dict": (lambda: Plain().state_dict(), "a torch.nn.Module, found a state dict; build the network and call"),
    "a path": (lambda: "net.pt", r"found the path 'net\.pt'; build the network and call load_state_dict\(torch\.load"),
    "nothing": (lambda: None, "expected a network, a torch.nn.Module, found NoneType"),
    "layers in a list": (
        lambda: InAList(used=True),
        r"found some in 'layers' \(list\), whose weights are neither in .*hold them in nn\.ModuleList",
    ),
    "a forward that is a lambda": (by_a_lambda, r"found none among .*a lambda .*write it as a method of its class"),
    "no values": (lambda: Plain().to("meta"), r"found 'conv\.weight' on the device 'meta'; load its trained weights"),
    "a quantised layer": (
        lambda: nn.Sequential(nn.Flatten(), torch.ao.nn.quantized.Linear(64, 10)),
        r"the quantised '1' \(Linear\); give the network from before quantisation",
    ),
    "one logit": (
        lambda: Plain(after=lambda x: x[:, :1]),
        r"an answer of the network for each class, found one for each image.*wrap it .*\nclass TwoLogits",
    ),
    "one number": (lambda: Plain(after=lambda x: x[:, 0]), "found one for each image"),
    "float64 inside": (
        lambda: Plain(before=lambda x: x.double()).double(),
        r"networks are run in float32: let its forward cast to the type of its weights",
    ),
    "a second argument": (lambda: NeedsMore(8, 8), "missing 1 .* 'mask'; wrap it so that its forward takes the images"),
    "attention over the images": (
        lambda: Ordered(batch_first=False),
        r"'layer\.self_attn' \(MultiheadAttention\) mixes the images; .*batch_first=True where images come first",
    ),
    "a state that is no tensor": (WithExtraState, "found that '_extra_state' is dict; take off what changes it"),
    "a state under other names": (
        lambda: changed(renaming_its_state),
        r"Missing key\(s\) .*conv\.weight.*take off what changes it \(.*a hook on the state dict",
    ),
    "a counter that was taken away": (
        lambda: Plain(middle=without_counter(nn.BatchNorm2d(4))),
        r"Unexpected key\(s\).*middle\.num_batches_tracked.*a buffer set to None",
    ),
    "functional dropout": (
        lambda: Plain(middle=lambda x: functional.dropout(x, 0.5)),
        r"others at each call: its own forward \(Plain\) is random .*training=self\.training",
    ),
    "a dropout of one in twenty": (
        lambda: Plain(after=lambda x: functional.dropout(x, 0.05)),
        r"others at each call: its own forward \(Plain\)",
    ),
    "noise in a module": (lambda: Plain(middle=nn.Sequential(nn.ReLU(), Noise())), r"'middle\.1' \(Noise\) is random"),
    "a part that is seldom dropped": (lambda: Plain(middle=SeldomDropped()), r"'middle' \(SeldomDropped\) is random"),
    "functional dropout in a parent": (
        lambda: Plain(middle=Inner(lambda x: functional.dropout(x, 0.5))),
        r"'middle' \(Inner\) is random",
    ),
    "batch norm without running statistics": (
        lambda: Plain(middle=nn.BatchNorm2d(4, track_running_stats=False)),
        r"other images of a batch, found some that do: 'middle' \(BatchNorm2d\) mixes .*track_running_stats=True",
    ),
    "batch norm by the batch": (lambda: Plain(middle=Inner(by_the_batch)), r"'middle' \(Inner\) mixes the images"),
    "a mean over the batch": (
        lambda: Plain(after=lambda x: x - x.mean(dim=0)),
        r"its own forward \(Plain\) mixes the images",
    ),
    "a softmax over the batch": (lambda: Plain(after=lambda x: x.softmax(dim=0)), r"\(Plain\) mixes the images"),
    "a module that is never in evaluation mode": (
        lambda: Plain(middle=Stubborn(nn.BatchNorm2d(4))),
        r"'middle\.norm' \(BatchNorm2d\) mixes",
    ),
    "not a number": (lambda: Plain(middle=nn.Sequential(nn.ReLU(), Lost())), r"'middle\.1' \(Lost\) is the first"),
    "a weight that is none": (lambda: with_nan(Plain()), r"not finite: 'conv\.weight' is the first"),
    "a squeeze": (
        lambda: Plain(after=lambda x: x.squeeze()),
        r"\(1, 10\) for one image alone as in a batch, found shape \(10,\).*flatten\(1\)",
    ),
    "a batch of fixed size": (
        lambda: Plain(after=lambda x: x.view(64, -1) if len(x) > 13 else x.view(13, -1)),
        r"for one image alone as in a batch, found an error \(shape '\[13, -1\]'",
    ),
    "a tuple": (
        lambda: Plain(after=lambda x: (x, x)),
        r"found a tuple of 2; wrap the network so that it answers the logits alone:\nclass Logits\(nn\.Sequential\):",
    ),
    "a list": (lambda: Plain(after=lambda x: [x]), r"found a list of 1; wrap"),
    "a dictionary without logits": (lambda: Plain(after=lambda x: {"scores": x}), r"found a dict with scores; wrap"),
    "a map of logits": (lambda: Plain(after=lambda x: x[:, :, None]), r"found shape \(13, 10, 1\)"),
    "whole numbers": (lambda: Plain(after=lambda x: x.argmax(1, keepdim=True)), r"torch\.int64 for 13 images"),
    "images of another kind": (
        lambda: nn.Conv2d(3, 4, 1),
        r"cannot run on images of shape \(1, 8, 8\): .*expects them",
    ),
    "nothing to prune": (nn.Flatten, "expected at least one convolution or linear layer to prune, found none"),
    "TorchScript": (lambda: torch.jit.trace(Plain(), images(2)), "found TorchScript"),
    "a lazy layer": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)),
        r"found the lazy '1\.weight'; run it once: network\(images\[:2\]\)",
    ),
    "old weight norm": (
        lambda: changed(lambda n: torch.nn.utils.weight_norm(n.head)),
        r"'head\.weight', which .*torch\.nn\.utils\.remove_weight_norm\(network\.get_submodule\('head'\), 'weight'\)",
    ),
    "old spectral norm": (
        lambda: changed(lambda n: torch.nn.utils.spectral_norm(n.conv)),
        r"'conv\.weight', which .*remove_spectral_norm\(network\.get_submodule\('conv'\), 'weight'\)",
    ),
    "a pruning of torch": (
        lambda: changed(lambda n: torch.nn.utils.prune.l1_unstructured(n.conv, "weight", 0.5)),
        r"'conv\.weight', which .*prune\.remove\(network\.get_submodule\('conv'\), 'weight'\)",
    ),
    "two prunings of a bias": (
        lambda: changed(lambda n: [torch.nn.utils.prune.random_unstructured(n.conv, "bias", 0.5) for _ in range(2)]),
        r"'conv\.bias', which .*prune\.remove\(network\.get_submodule\('conv'\), 'bias'\)",
    ),
    "new weight norm": (
        lambda: changed(lambda n: torch.nn.utils.parametrizations.weight_norm(n.head)),
        r"'head\.weight'.*parametrize\.remove_parametrizations\(network\.get_submodule\('head'\), 'weight'\)",
    ),
}


class Stubborn(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        found: Tensor = self.norm(x)
        return found


def without_counter(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.num_batches_tracked = None
    return norm


def with_nan(network: Plain) -> Plain:
    network.conv.weight.data[0, 0, 0, 0] = torch.nan
    return network


def changed(change: Callable[[Plain], Any]) -> Plain:
    network = Plain()
    change(network)
    return network


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_as_it_is_is_named_with_the_remedy(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        look(make())


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_few_images_are_enough_to_find_what_depends_on_neighbours(n: int) -> None:
    with pytest.raises(ValueError, match="mixes the images"):
        inspect_network(Plain(after=lambda x: x - x.mean(dim=0)), images(n))
    assert inspect_network(Plain(), images(n)).n_classes == 10


@pytest.mark.parametrize(
    ("after", "name", "n_classes"),
    [
        (lambda x: (x, x), "Logits", 10),
        (lambda x: {"loss": None, "scores": x}, "Logits", 10),
        (lambda x: SimpleNamespace(loss=None, scores=x), "Logits", 10),
        (lambda x: x[:, :1], "TwoLogits", 2),
        (lambda x: x[:, 0], "TwoLogits", 2),
    ],
)
def test_the_wrapper_of_the_message_helps(after: Callable[[Tensor], Any], name: str, n_classes: int) -> None:
    with pytest.raises(ValueError, match="wrap") as caught:
        look(Plain(after=after))
    lines = str(caught.value).splitlines()[1:]
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("\n".join(lines), names)
    assert look(names[name](Plain(after=after))).n_classes == n_classes


def test_layers_in_a_list_that_no_answer_needs_are_no_matter() -> None:
    assert look(InAList(used=False)).n_classes == 10
    assert look(Ordered(batch_first=True)).n_classes == 10


def test_an_untrained_network_may_answer_anything_but_not_at_random() -> None:
    assert look(Plain(middle=Lost()), trained=False).n_classes == 10
    with pytest.raises(ValueError, match="is random"):
        look(Plain(middle=Noise()), trained=False)


# --------------------------------------------------------------------------------------------- answers of several parts

PARTS: dict[str, Callable[[Tensor], Any]] = {
    "a dictionary": lambda x: {"features": x, "logits": x * 2},
    "a dictionary with out": lambda x: {"out": x * 2, "aux": x},
    "a named tuple": lambda x: Named(x, x * 2),
    "a data class": lambda x: Answer(None, x * 2),
}


@pytest.mark.parametrize("case", PARTS)
def test_logits_are_taken_of_an_answer_of_several_parts(case: str) -> None:
    network = Plain(after=PARTS[case])
    found = look(network)
    assert found.adaptation.takes_logits
    assert torch.equal(answer(found.network), answer(Plain()) * 2)
    assert type(answer(found.bare())) is type(answer(network))
    # The fused path takes them too.
    fused = FusedNetwork(found.network, found.units, images(2), repair="none", calibration_images=images(2))
    with torch.inference_mode():
        torch.testing.assert_close(answers(fused, images(), 32, None), answer(Plain()) * 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inside", [lambda p: p, lambda p: {"logits": p}])
def test_of_probabilities_the_logarithm_is_taken(inside: Callable[[Tensor], Any]) -> None:
    found = look(Plain(after=lambda x: inside(x.softmax(1))))
    assert found.adaptation.takes_logarithm
    assert "its probabilities are taken by their logarithm" in found.lines()[-1]
    expected = answer(Plain()).log_softmax(1)
    torch.testing.assert_close(answer(found.network), expected, rtol=1e-5, atol=1e-5)
    probabilities = answer(found.bare())
    probabilities = probabilities["logits"] if isinstance(probabilities, dict) else probabilities
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(64))
    fused = FusedNetwork(found.network, found.units, images(2), repair="none", calibration_images=images(2))
    with torch.inference_mode():
        torch.testing.assert_close(answers(fused, images(), 32, None), expected, rtol=1e-5, atol=1e-5)
    # A probability that is rounded to 0 has a logarithm too.
    sure = look(Plain(after=lambda x: (1e4 * x).softmax(1)))
    assert bool(answer(sure.network).isfinite().all())
    assert not look(Plain(after=lambda x: x.log_softmax(1))).adaptation.takes_logarithm


def test_an_answer_that_is_a_tensor_is_its_own_logits() -> None:
    assert logits_of(images()).shape == images().shape


# ------------------------------------------------------------------------------------------- wrappers, copies and hooks


def around_all(network: nn.Module) -> nn.Module:
    return nn.DataParallel(network)


def around_a_part(network: nn.Module) -> nn.Module:
    network.add_module("conv", nn.DataParallel(network.get_submodule("conv")))
    return network


def averaged(network: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(network)


def compiled_around_parallel(network: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(nn.DataParallel(network), backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize("wrap", [around_all, around_a_part, averaged, compiled_around_parallel, compiled_in_place])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_come_out_of_their_wrappers_with_the_original_keys(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network = wrap(Plain())
    keys = list(network.state_dict())
    found = look(network)
    assert list(found.bare().state_dict()) == list(Plain().state_dict())
    assert torch.equal(answer(found.network), answer(Plain()))
    # The caller's own stays wrapped.
    assert list(network.state_dict()) == keys
    assert (wrap is compiled_in_place) == (not found.wrapper)


def test_a_network_without_a_wrapper_is_itself() -> None:
    network = Plain()
    assert unwrapped(network) is network


class Keeping(Plain):
    """Keeps activations, as networks for visualisation do."""

    def forward(self, x: Tensor) -> Any:
        x = functional.relu(self.conv(x))
        self.kept = x
        self.nested = {"all": [x, (x.mean(), {"more": x})]}
        return self.head(x.flatten(1))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_network_that_keeps_activations_is_copied_and_computed_in_every_way(gradients: bool) -> None:
    network = Keeping()
    with torch.inference_mode(mode=not gradients):
        network(images(3))
    found = look(network)
    assert torch.equal(answer(found.network), answer(Plain()))
    copied(copied(found.network))
    units, labels = found.units, digits()[1][:64]
    task = Task(found.network, units, images(), labels, images())
    backends = Backends(task, Evaluating(repair="batchnorm"), torch.device("cpu"), None)
    with torch.inference_mode():
        computed = [answers(backends.prepared(FusedNetwork, torch.float32), images(), 32, None)]
        computed.append(answers(backends.plain, images(), 32, None))
    for logits in computed:
        torch.testing.assert_close(logits, answer(Plain()), rtol=0, atol=1e-5)
    compute_importance("taylor", found.network, units, images(), labels, 0)


def test_a_copy_keeps_the_values_of_activations_and_shares_no_memory() -> None:
    network = Keeping()
    network(images(3))
    other = copied(network)
    assert isinstance(other.kept, Tensor)
    assert torch.equal(other.kept, network.kept)
    assert other.kept.data_ptr() != network.kept.data_ptr()
    assert other.nested["all"][0] is other.kept  # type: ignore[index]


class Holding:
    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __call__(self, *given: Any) -> None: ...


@pytest.mark.parametrize("where", ["an attribute", "inside a list", "a hook"])
@pytest.mark.parametrize("make", [threading.Lock, lambda: (i for i in range(3))])
def test_what_cannot_be_copied_is_shared(make: Callable[[], Any], where: str) -> None:
    network, held = Plain(), make()
    if where == "a hook":
        network.conv.register_forward_hook(Holding(held))
    else:
        network.held = held if where == "an attribute" else cast("Any", [held])
    found = look(network)
    assert torch.equal(answer(found.network), answer(Plain()))
    if where == "an attribute":
        assert found.bare().held is held
    other = copied(network)
    other.conv.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert bool(network.conv.weight.any())


GLOBAL: dict[str, Any] = {"seen": []}


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(output)

    def method(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(output)


def into_global(module: nn.Module, inputs: Any, output: Tensor) -> None:
    GLOBAL["seen"].append(output)


def appending(seen: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    seen.append(output)


def observers() -> dict[str, tuple[Callable[..., None], list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in ("closure", "default", "partial")}
    recorders = [Recorder(), Recorder()]
    GLOBAL["seen"] = []
    return {
        "a closure": (lambda module, inputs, output: seen["closure"].append(output), seen["closure"]),
        "a default": (
            lambda module, inputs, output, to=seen["default"]: to.append(output),
            seen["default"],
        ),
        "a partial": (partial(appending, seen["partial"]), seen["partial"]),
        "an object": (recorders[0], recorders[0].seen),
        "a method": (recorders[1].method, recorders[1].seen),
        "a global": (into_global, GLOBAL["seen"]),
    }


@pytest.mark.parametrize("case", observers())
def test_hooks_that_observe_are_left_out_and_see_nothing(case: str) -> None:
    hook, seen = observers()[case]
    network = Plain()
    network.conv.register_forward_hook(hook)
    network(images(2))
    assert len(seen) == 1
    found = look(network)
    assert found.adaptation.drops_hooks
    assert n_hooks(found.network) == 0
    found.network(images(2))
    assert len(seen) == 1
    network(images(2))
    assert len(seen) == 2


def test_hooks_that_change_answers_are_kept_without_those_that_observe() -> None:
    network, seen = Plain(), list[Tensor]()
    network.conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.head.register_full_backward_hook(lambda module, given, gave: seen.extend(gave))
    found = look(network)
    assert n_hooks(found.network) == 1
    assert seen == []
    assert torch.equal(answer(found.network), answer(network))
    assert not torch.equal(answer(found.network), answer(Plain()))


class Silent(Plain):
    """`train` that returns nothing, as people write it who freeze a layer."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.conv.eval()


def test_train_may_return_nothing_in_every_way_to_compute() -> None:
    found, labels = look(Silent()), digits()[1][:64]
    task = Task(found.network, found.units, images(), labels, images())
    backends = Backends(task, Evaluating(repair="batchnorm"), torch.device("cpu"), None)
    assert torch.equal(answer(found.network), answer(Plain()))
    assert type(backends.choose(torch.float32).network) is FusedNetwork
    collect_statistics(found.network, found.units, images(), seed=0)
    compute_importance("fisher", found.network, found.units, images(), labels, 0)


# --------------------------------------------------------------------------------------------- what runs, what does not


class Auxiliary(nn.Module):
    """Heads for training only, one that is computed in vain, and a part that runs without gradients."""

    def __init__(self, *, differentiable: bool = True) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.dead = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleDict({"aux[0]": nn.Linear(256, 10), "in_vain": nn.Linear(256, 10)})
        self.head = nn.Linear(256, 10)
        self.differentiable = differentiable

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = functional.relu(self.frozen(x))
        # Its result is 0 for all images, but a forward pass uses it.
        x = functional.relu(self.conv(x)) + functional.relu(self.dead(x) - 1e9)
        x = x if self.differentiable else x.detach()
        x = x.flatten(1)
        self.heads["in_vain"](x)
        if self.training:
            return self.head(x), self.heads["aux[0]"](x)
        return self.head(x) if self.differentiable else self.head(x).detach()


@pytest.mark.parametrize("differentiable", [True, False])
def test_weights_that_no_answer_needs_are_named_and_left_out(differentiable: bool) -> None:
    found = look(Auxiliary(differentiable=differentiable), exclude=["conv.*"])
    # torch's relu of what is no number is none, but a weight whose result vanishes in a sum is found by its gradient.
    assert found.units.names == ("frozen.weight", "dead.weight", "head.weight")
    assert found.unused == {"heads.aux[0].weight": 2560, "heads.in_vain.weight": 2560}
    # Whoever makes units of these patterns has the same.
    assert WeightUnits.of(Auxiliary(), found.exclude) == found.units
    assert found.exclude[0] == "conv.*"
    line = next(line for line in found.lines() if "no answer needs them" in line)
    total = sum(p.numel() for p in Auxiliary().parameters())
    assert line.startswith(f"{5120 / total:.1%} of all parameters")
    assert line.endswith("heads.aux[0].weight, heads.in_vain.weight")


class Branching(Plain):
    """Another head for the images that are bright, of which there is one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.bright = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Any:
        y = functional.relu(self.conv(x)).flatten(1)
        at = x.mean(dim=(1, 2, 3)) > 5
        found = self.head(y)
        return torch.where(at[:, None], self.bright(y), found) if bool(at.any()) else found


def test_a_branch_that_runs_for_one_image_of_many_is_used() -> None:
    given = images()
    given[40] += 100.0
    assert "bright.weight" in inspect_network(Branching(), given).units.names
    assert "bright.weight" in inspect_network(Branching(), images()).unused


class Attention(nn.Module):
    """A small transformer: its position embeddings are a matrix of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.position = nn.Parameter(torch.randn(1, 8, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(1, 1, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0]) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0] * self.scale
        found: Tensor = self.head(x.mean(dim=1))
        return found


class Tied(Plain):
    """A last layer whose weight is an embedding's, as in language models; either may come first."""

    def __init__(self, *, embedding_first: bool) -> None:
        super().__init__()
        first, second = nn.Embedding(10, 10), nn.Linear(10, 10, bias=False)
        second.weight = first.weight
        self.parts = nn.ModuleList([first, second] if embedding_first else [second, first])
        self.after = self.through

    def through(self, x: Tensor) -> Tensor:
        found: Tensor = next(part for part in self.parts if isinstance(part, nn.Linear))(x)
        return found


def test_a_weight_that_is_an_embedding_s_stays_dense_and_is_named() -> None:
    found = look(Tied(embedding_first=True))
    assert found.units.names == ("conv.weight", "head.weight")
    assert found.matrices == {"parts.0.weight": 100}
    assert look(Tied(embedding_first=False)).units.names == ("conv.weight", "head.weight", "parts.0.weight")


def test_matrices_of_no_layer_are_named_with_their_share() -> None:
    found = look(Attention())
    projections = ("attention.in_proj_weight", "attention.out_proj.weight")
    assert found.units.names == ("embed.weight", *projections, "head.weight")
    assert found.matrices == {"position": 128}
    total = sum(p.numel() for p in Attention().parameters())
    assert found.lines()[1] == (f"{128 / total:.1%} of all parameters stay dense, being matrices of no layer: position")


def test_all_there_is_to_say_takes_four_lines_at_most() -> None:
    class Everything(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x.sub_(0.5))}

    network = Everything()
    network.head.register_forward_hook(lambda module, inputs, output: None)
    lines = look(nn.DataParallel(network)).lines()
    assert len(lines) == 4
    assert lines[1].endswith("aux.0.weight, aux.1.weight, aux.2.weight and 2 more")
    assert lines[3] == (
        "the network as it is run: taken out of DataParallel; gets copies of its images, as it writes into them; only "
        "its logits are looked at; hooks that change no answer are left out"
    )


# ------------------------------------------------------------------------------------------------- better than guessing


def logits_for(answers_: np.ndarray, n_classes: int) -> Tensor:
    return functional.one_hot(torch.from_numpy(answers_), n_classes).float()


def drawn(n: int, n_classes: int, accuracy: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and answers that are right so often."""
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % n_classes
    return classes, np.where(rng.random(n) < accuracy, classes, rng.integers(0, n_classes, n))


def text_order(n: int, first: int = 0) -> np.ndarray:
    return np.array(sorted(range(first, first + n), key=str)) - first


def shuffled(labels: np.ndarray, n: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(n)[labels]


ORDERS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray], str]] = {
    "a shift": (10, lambda y: (y + 3) % 10, r"each label answered 3 lower \(of 10, going round\), "),
    "a shift down": (10, lambda y: (y - 2) % 10, r"each label answered 2 higher \(of 10, going round\), "),
    "labels from 1": (12, lambda y: np.minimum(y + 1, 11), r"each label answered 1 lower, as if labels started at 1, "),
    "labels sorted as text": (12, lambda y: np.argsort(text_order(12))[y], r"labels sorted as text \(0, 1, 10\), "),
    "numbers from 1 as text": (
        12,
        lambda y: np.argsort(text_order(12, 1))[y],
        r"labels sorted as text \(1, 10, 11\), ",
    ),
    "answers sorted as text": (20, lambda y: text_order(20)[y], r"answers sorted as text \(0, 1, 10\), "),
    "any order": (10, lambda y: shuffled(y, 10), r"answered in another order \(\d as \d, .* and \d more\), "),
    "two classes": (2, lambda y: 1 - y, r"each label answered 1 (lower|higher) \(of 2, going round\), "),
}


@pytest.mark.parametrize("case", ORDERS)
def test_labels_in_another_order_are_an_error_that_names_the_order(case: str) -> None:
    n_classes, order, message = ORDERS[case]
    classes, given = drawn(240, n_classes)
    found = compare_with_guessing(logits_for(given, n_classes), torch.from_numpy(order(classes)))
    # What a label stands for, all but a few answers say.
    assert found.n_reordered >= 0.85 * 240
    with pytest.raises(ValueError, match=message + rf"{found.n_reordered} would be right: give the labels in"):
        found.check()


@pytest.mark.parametrize(("n", "n_classes"), [(20, 2), (40, 10), (256, 10), (2000, 1000)])
def test_guesses_are_refused_and_no_order_is_made_up(n: int, n_classes: int) -> None:
    refused = 0
    for seed in range(20):
        classes, given = drawn(n, n_classes, accuracy=0.0, seed=seed)
        found = compare_with_guessing(logits_for(given, n_classes), torch.from_numpy(classes))
        refused += not found.is_better
        assert n_classes == 2 or found.order == ""
        if not found.is_better and not found.order:
            with pytest.raises(
                ValueError, match=r"found \d+ of \d+ labelled .*normalised .*start at 0 .*trained weights"
            ):
                found.check()
    # By chance, guesses are as good as better ones in one case of a hundred, for few images seldom in more.
    assert refused >= 18


@pytest.mark.parametrize(
    ("right", "n", "n_classes", "is_better"),
    [
        (4, 4, 2, True),  # few images prove little, but all of them are right
        (2, 4, 2, False),
        (3, 10, 10, False),
        (6, 10, 10, True),
        (60, 400, 10, True),  # 15 % where guessing has 10 %
        (44, 400, 10, False),
        (100, 200, 2, False),
        (130, 200, 2, True),
    ],
)
def test_a_network_has_to_be_clearly_better_than_always_the_same_answer(
    right: int, n: int, n_classes: int, is_better: bool
) -> None:
    labels = np.arange(n) % n_classes
    given = np.where(
        np.arange(n) < right, labels, (labels + 1 + np.arange(n) // n_classes % (n_classes - 1)) % n_classes
    )
    found = compare_with_guessing(logits_for(given, n_classes), torch.from_numpy(labels))
    assert found.n_right == right
    assert found.is_better == is_better


def test_of_unequal_classes_the_largest_is_what_guessing_gets() -> None:
    labels = np.repeat([0, 1], [180, 20])
    found = compare_with_guessing(logits_for(np.zeros(200, dtype=np.int64), 2), torch.from_numpy(labels))
    assert (found.accuracy, found.guess, found.is_better) == (0.9, 0.9, False)


def test_some_classes_in_another_order_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    classes, given = drawn(400, 10)
    swapped = np.array([0, 1, 2, 3, 4, 5, 7, 6, 9, 8])
    found = compare_with_guessing(logits_for(given, 10), torch.from_numpy(swapped[classes]))
    found.check()
    log = logging.getLogger("tests.guessing")
    caplog.set_level(logging.INFO, log.name)
    found.report(log, "it")
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "another order (6 as 7, 7 as 6, 8 as 9, 9 as 8), " in caplog.messages[1]


def test_a_good_network_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    classes, given = drawn(400, 10)
    found = compare_with_guessing(logits_for(given, 10), torch.from_numpy(classes))
    log = logging.getLogger("tests.guessing")
    caplog.set_level(logging.INFO, log.name)
    found.report(log, "it")
    share = 100 * float((classes == given).mean())
    assert caplog.messages == [f"it: right on {share:.1f} % of 400 labelled images, the best constant answer on 10.0 %"]


def test_answers_that_are_not_finite_are_wrong() -> None:
    classes, _ = drawn(100, 10)
    logits = logits_for(classes, 10)
    logits[:40] = torch.nan
    assert compare_with_guessing(logits, torch.from_numpy(classes)).n_right == 60


def test_the_look_costs_little() -> None:
    """Forward passes, in images, that one look takes; a search of 2,000 candidates takes a thousand times more."""
    seen: list[int] = []

    class Counting(Plain):
        def forward(self, x: Tensor) -> Any:
            seen.append(len(x))
            return super().forward(x)

    inspect_network(Counting(), digits()[0])
    assert sum(seen) < 500


def test_answers_are_checked_again_after_training() -> None:
    network = look(Plain()).network
    assert check_answers(network, images()) == 10
    with pytest.raises(ValueError, match=r"not finite: 'conv\.weight'"):
        check_answers(with_nan(copy.deepcopy(network)), images())  # type: ignore[arg-type]
