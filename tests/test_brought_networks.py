"""Networks as people bring them, pruned from one end to the other: what comes out is what it should be."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune import Front, pareto_prune
from paretoprune.data.splits import LabelledImages
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.training.loop import Recipe, train
from small_networks import digits, fit, n_hooks, states_equal
from torch import Tensor, nn
from torch.nn import functional


class Small(nn.Module):
    """A convolution, a batch norm and a linear layer on digits; `scaled` makes of images what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.aux = nn.Linear(96, 10)
        self.head = nn.Linear(96, 10)

    def scaled(self, x: Tensor) -> Tensor:
        return (x - 0.2) / 1.7

    def forward(self, x: Tensor) -> Any:
        return self.head(functional.relu(self.norm(self.conv(self.scaled(x)))).flatten(1))


class Writing(Small):
    def scaled(self, x: Tensor) -> Tensor:
        return x.sub_(0.2).div_(1.7)


class Dictionary(Small):
    def forward(self, x: Tensor) -> Any:
        return {"features": x, "logits": super().forward(x)}


class Keeping(Small):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def scaled(self, x: Tensor) -> Tensor:
        self.kept = super().scaled(x)
        return self.kept


class WithHead(Small):
    """As googlenet: a head that only training asks for."""

    def forward(self, x: Tensor) -> Any:
        y = functional.relu(self.norm(self.conv(self.scaled(x)))).flatten(1)
        return {"logits": self.head(y), "aux": self.aux(y)} if self.training else self.head(y)


@lru_cache
def state() -> dict[str, Tensor]:
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small()
    return fit(network, images[:600], labels[:600], epochs=5).state_dict()


def brought(kind: type[Small]) -> Small:
    network = kind()
    network.load_state_dict(state())
    network.eval()
    return network


def prune(network: nn.Module, repair: str = "batchnorm", **changed: Any) -> Front:
    images, labels = digits()
    given: dict[str, Any] = {
        "images": images[:300].clone(),
        "labels": labels[:300],
        "search_images": images[1000:1150].clone(),
        "search_labels": labels[1000:1150],
        **changed,
    }
    before = given["images"].clone(), given["search_images"].clone()
    front = pareto_prune(network, **given, repair=repair, evaluations=80, device="cpu", workers=1, progress=False)
    assert torch.equal(given["images"], before[0])
    assert torch.equal(given["search_images"], before[1])
    return front


@lru_cache
def plain(repair: str) -> Front:
    return prune(brought(Small), repair)


@pytest.mark.parametrize("repair", ["batchnorm", "reconstruct"])
@pytest.mark.parametrize("kind", [Writing, Dictionary, Keeping, WithHead])
def test_the_front_is_that_of_the_plain_network(kind: type[Small], repair: str) -> None:
    network, expected = brought(kind), plain(repair)
    network.conv.register_forward_hook(lambda module, inputs, output: None)
    network.train()  # as after a training loop
    network(digits()[0][:20].clone())
    network.load_state_dict(state())
    front = prune(network, repair)
    assert front.masks.fingerprints() == expected.masks.fingerprints()
    np.testing.assert_array_equal(front.objectives, expected.objectives)
    for i in (0, len(front) - 1):
        assert states_equal(front.network(i), expected.network(i))
    # A member answers as its original does, and has no hook on it.
    member = front.network(0)
    assert type(member) is kind
    assert n_hooks(member) == 0
    x = digits()[0][1000:1150].clone()
    answer = member(x)
    assert isinstance(answer, dict) == (kind is Dictionary)
    assert torch.equal(x, digits()[0][1000:1150]) == (kind is not Writing)
    logits = answer["logits"] if isinstance(answer, dict) else answer
    assert top1_error(logits, digits()[1][1000:1150]) == pytest.approx(front.error[0], abs=1e-9)


def test_a_head_for_training_only_is_not_counted() -> None:
    front = plain("batchnorm")
    assert front.masks.n_units == 6 * 9 + 960
    for i in range(len(front)):
        network = front.network(i)
        assert torch.equal(network.get_parameter("aux.weight"), state()["aux.weight"])
        kept = sum(int(network.get_parameter(name).count_nonzero()) for name in ("conv.weight", "head.weight"))
        assert kept <= front.density[i] * (6 * 9 + 960) + 1e-6


def test_a_network_in_a_wrapper_gives_members_with_the_original_keys() -> None:
    front = prune(nn.DataParallel(brought(Small)))
    assert list(front.network(0).state_dict()) == list(state())
    np.testing.assert_array_equal(front.objectives, plain("batchnorm").objectives)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda y: (y + 3) % 10, r"each label answered 3 lower .* would be right"),
        (lambda y: torch.randint(0, 10, y.shape, generator=torch.Generator().manual_seed(0)), "better than guessing"),
    ],
)
def test_labels_that_are_not_the_network_s_are_refused(changed: Any, message: str) -> None:
    labels = digits()[1]
    with pytest.raises(ValueError, match=message):
        prune(brought(Small), labels=changed(labels[:300]), search_labels=changed(labels[1000:1150]))


def test_an_untrained_network_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Small()
    with pytest.raises(ValueError, match="its trained weights are loaded"):
        prune(network)


@pytest.mark.parametrize("kind", [Writing, Dictionary, Keeping, WithHead])
def test_a_member_is_trained_as_the_plain_network(kind: type[Small]) -> None:
    images, labels = digits()
    data, recipe = LabelledImages(images[:200].clone(), labels[:200]), Recipe(epochs=1, learning_rate=0.01)
    found = []
    for network in (brought(Small), brought(kind)):
        trained, history = train(network, data, recipe, seed=0)
        found.append((history, trained))
    assert found[0][0] == found[1][0]
    for name in ("conv.weight", "head.weight"):
        assert torch.equal(found[0][1].get_parameter(name), found[1][1].get_parameter(name))
    assert not found[1][1].training
    if kind in (Keeping, WithHead):
        assert torch.equal(predict(found[0][1], images[:50], 50), predict(found[1][1], images[:50], 50))
