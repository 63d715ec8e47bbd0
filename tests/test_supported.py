"""The README's table of what can be brought: each row is tried from end to end, on three classes of noise."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from paretoprune import Front, pareto_prune
from small_networks import fit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[1] / "README.md"
HEADER = "| what you bring | what becomes of it |"
N, N_CLASSES = 120, 3
IMAGES, SIGNALS, TABLE, VOLUMES = (2, 6, 6), (2, 12), (6,), (1, 4, 4, 4)


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Classes of noise around a pattern each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % N_CLASSES
    patterns = torch.randn(N_CLASSES, *shape, generator=generator)
    return patterns[labels] + 0.5 * torch.randn(N, *shape, generator=generator), labels


def trained(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    return fit(network, *data(shape), epochs=20)


def front_of(network: nn.Module, *given: Any, shape: tuple[int, ...] = TABLE, **changed: Any) -> Front:
    options: dict[str, Any] = {"evaluations": 80, "device": "cpu", "workers": 1, "progress": False}
    return pareto_prune(network, *(given or data(shape)), **(options | changed))


def is_pruned(network: nn.Module, shape: tuple[int, ...], *names: str, **changed: Any) -> Front:
    """A front whose sparsest member lacks weights of all the named matrices, and answers."""
    front = front_of(network, shape=shape, **changed)
    sparsest = front.network(int(np.argmax(front.sparsity)))
    for name in names:
        assert bool((sparsest.get_parameter(name) == 0).any()), name
        assert bool((network.get_parameter(name) != 0).all()), name
    assert sparsest(data(shape)[0]) is not None
    return front


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, N_CLASSES))


def plain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(mlp(), TABLE)


class Over(nn.Module):
    """The plain network with something around its answer."""

    def __init__(self, answer: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.answer = plain(), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.net, x)


def same_front(network: nn.Module, *given: Any) -> None:
    """The front of the plain network on plain tensors."""
    front, expected = front_of(network, *given), front_of(plain())
    np.testing.assert_array_equal(front.objectives, expected.objectives)
    assert front.masks.fingerprints() == expected.masks.fingerprints()


def refused(network: nn.Module, message: str, *given: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        front_of(network, *given)


def convolutions(caplog: Any) -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, N_CLASSES),
    )  # fmt: skip
    names = ("0.weight", "3.weight", "5.weight", "8.weight")
    is_pruned(trained(network, IMAGES), IMAGES, *names, repair="reconstruct")
    line = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, N_CLASSES))
    is_pruned(trained(line, SIGNALS), SIGNALS, "0.weight", "3.weight", repair="reconstruct")
    space = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, N_CLASSES))
    is_pruned(trained(space, VOLUMES), VOLUMES, "0.weight", "3.weight", repair="reconstruct")


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.LSTM(4, 4, batch_first=True)
        self.pairs = nn.Bilinear(4, 4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        x = self.memory(x + self.attention(x, x, x)[0])[0][:, -1]
        return self.pairs(x, x)


def other_layers(caplog: Any) -> None:
    names = ("up.weight", "attention.in_proj_weight", "memory.weight_hh_l0", "pairs.weight")
    is_pruned(trained(Others(), SIGNALS), SIGNALS, *names)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 4)
        self.own = nn.Parameter(torch.ones(6, 6))
        self.head = nn.Linear(24, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(((x @ self.own)[..., None] * self.places.weight).flatten(1))


def embeddings(caplog: Any) -> None:
    network = trained(Embeds(), TABLE)
    with caplog.at_level("INFO", logger="paretoprune"):
        front = is_pruned(network, TABLE, "head.weight")
    for name in ("places.weight", "own"):
        assert torch.equal(front.network(0).get_parameter(name), network.get_parameter(name))
        assert name in caplog.text
    assert np.all(front.sparsity_of_parameters < front.sparsity)


class TrainingHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.aux = plain(), nn.Linear(6, N_CLASSES)

    def forward(self, x: Tensor) -> Any:
        return (self.net(x), self.aux(x)) if self.training else self.net(x)


def training_heads(caplog: Any) -> None:
    network = TrainingHead()
    with caplog.at_level("INFO", logger="paretoprune"):
        front = front_of(network.eval())
    assert front.masks.n_units == 6 * 12 + 12 * N_CLASSES
    assert "aux.weight" in caplog.text
    assert torch.equal(front.network(0).get_parameter("aux.weight"), network.aux.weight)


def other_answers(caplog: Any) -> None:
    same_front(Over(lambda net, x: {"logits": net(x), "features": x}).eval())
    same_front(Over(lambda net, x: SimpleNamespace(out=net(x))).eval())


def tuples(caplog: Any) -> None:
    network = Over(lambda net, x: (net(x), x)).eval()
    with pytest.raises(ValueError, match=r"a tuple of 2; wrap") as caught:
        front_of(network)
    code = str(caught.value).partition("\n")[2]
    names: dict[str, Any] = {"nn": nn}
    exec(code, names)  # the lines that the message gives
    same_front(names["Logits"](network).eval())


def wrappers(caplog: Any) -> None:
    same_front(nn.DataParallel(plain()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        compiled = torch.compile(plain())
    same_front(cast("nn.Module", compiled))


def zeros(caplog: Any) -> None:
    network = plain()
    with torch.no_grad():
        network.get_parameter("0.weight")[:, :3] = 0
    front = front_of(network)
    n_zeros, n_weights = 36, 6 * 12 + 12 * N_CLASSES
    assert front.sparsity.min() >= n_zeros / n_weights
    for i in range(len(front)):
        weights = [front.network(i).get_parameter(name) for name in ("0.weight", "3.weight")]
        assert sum(int((weight == 0).sum()) for weight in weights) >= round(float(front.sparsity[i]) * n_weights)


def writing(caplog: Any) -> None:
    images, labels = data(TABLE)
    before = images.clone()
    same_front(Over(lambda net, x: net(x.mul_(1.0))).eval(), images, labels)
    assert torch.equal(images, before)


def unsteady(caplog: Any) -> None:
    refused(Over(lambda net, x: net(x + 0.1 * torch.randn_like(x))).eval(), r"others at each call: .*\(Over\)")
    network = plain()
    norm = network.get_submodule("1")
    norm.register_buffer("running_mean", None)
    norm.register_buffer("running_var", None)
    refused(network, "batch")
    refused(Over(lambda net, x: net(x) / 0).eval(), "finite")


def parametrised(caplog: Any) -> None:
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        network = plain()
        change(network.get_submodule("0"))
        refused(network, r"(?s)0.*weight.*remove")
    refused(nn.Sequential(nn.LazyLinear(N_CLASSES)), "(?s)lazy.*forward|once")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.trace(plain(), data(TABLE)[0])
    refused(script, "TorchScript")


def wrong_labels(caplog: Any) -> None:
    images, labels = data(TABLE)
    refused(plain(), "lower|higher|order", images, (labels + 1) % N_CLASSES)
    refused(plain(), "guessing", images, labels[torch.randperm(N)])


def shapes(caplog: Any) -> None:
    for shape, layers in (
        (TABLE, [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, N_CLASSES)]),
        (SIGNALS, [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, N_CLASSES)]),
        (IMAGES, [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, N_CLASSES)]),
        (VOLUMES, [nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, N_CLASSES)]),
    ):
        is_pruned(trained(nn.Sequential(*layers), shape), shape, f"{len(layers) - 1}.weight")


def containers(caplog: Any) -> None:
    x, y = data(TABLE)
    one_hot = nn.functional.one_hot(y, N_CLASSES)
    for given in (
        (x.numpy(), y.numpy()), (x, y.tolist()), (x, y[:, None]), (x, one_hot),
        (TensorDataset(x, y),), (DataLoader(TensorDataset(x, y), 32),),
    ):  # fmt: skip
        same_front(plain(), *given)


def no_classes(caplog: Any) -> None:
    x, y = data(TABLE)
    several = nn.functional.one_hot(y, N_CLASSES)
    several[0] = 1
    refused(plain(), "label", x, several)
    refused(plain(), "whole numbers|class", x, y + 0.5)


ROWS: dict[str, Callable[[Any], None]] = {
    "convolutions of 1 to 3 dimensions, also grouped, linear layers": convolutions,
    "transposed convolutions, attention, recurrent and bilinear layers": other_layers,
    "embeddings, matrices that are a module's own": embeddings,
    "heads for training only": training_heads,
    "answers with `logits` or `out`, as a key or an attribute": other_answers,
    "a tuple as the answer": tuples,
    "`DataParallel`, `torch.compile`": wrappers,
    "weights that are 0 already": zeros,
    "a `forward` that writes into its images": writing,
    "answers at random, that depend on the batch, or that are not finite": unsteady,
    "weight norm, spectral norm, `torch.nn.utils.prune`, lazy layers, TorchScript": parametrised,
    "labels in another order, a network no better than guessing": wrong_labels,
    "images, volumes, signals `(n, c, t)`, tables `(n, features)`": shapes,
    "tensors, numpy, lists, a `Dataset` or `DataLoader`; labels `(n,)`, `(n, 1)` or one-hot": containers,
    "several labels for an image, numbers to be predicted": no_classes,
}


def rows_of_the_readme() -> list[str]:
    _, _, below = README.read_text(encoding="utf-8").partition(HEADER)
    table = re.match(r"\n\|[-| ]+\n((?:\|.*\n)+)", below)
    assert table is not None
    return [line.split("|")[1].strip() for line in table[1].splitlines()]


def test_the_table_has_these_rows() -> None:
    assert rows_of_the_readme() == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_true(row: str, caplog: pytest.LogCaptureFixture) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ROWS[row](caplog)
