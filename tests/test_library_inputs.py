"""What people bring to pareto_prune, a row a situation: images and labels, options, and the state of the caller."""

import logging
import multiprocessing
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune import Front, pareto_prune
from paretoprune.evaluation.workers import can_fork
from PIL import Image
from small_networks import fit, n_hooks, numpy_state, states_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

N, N_CLASSES = 90, 3
SHAPES = {"table": (6,), "signal": (2, 12), "images": (1, 6, 6), "volumes": (1, 4, 4, 4)}


@lru_cache
def data(kind: str = "table") -> tuple[Tensor, Tensor]:
    """Three classes of noise, each with a pattern of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % N_CLASSES
    means = torch.randn(N_CLASSES, *SHAPES[kind], generator=generator)
    return means[labels] + 0.7 * torch.randn(N, *SHAPES[kind], generator=generator), labels


def fresh(kind: str = "table") -> nn.Sequential:
    layers: dict[str, list[nn.Module]] = {
        "table": [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, N_CLASSES)],
        "signal": [nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(60, N_CLASSES)],
        "images": [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, N_CLASSES)],
        "volumes": [nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, N_CLASSES)],
    }
    return nn.Sequential(*layers[kind])


@lru_cache
def trained(kind: str = "table") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit(fresh(kind), *data(kind), epochs=15)


def prune(*given: Any, network: nn.Module | None = None, **changed: Any) -> Front:
    options: dict[str, Any] = {"evaluations": 60, "device": "cpu", "workers": 1, "progress": False}
    return pareto_prune(trained() if network is None else network, *(given or data()), **(options | changed))


@lru_cache
def expected(**changed: Any) -> Front:
    """The front from plain tensors."""
    return prune(**changed)


def assert_same(front: Front, other: Front) -> None:
    assert np.array_equal(front.masks.words, other.masks.words)
    assert np.array_equal(front.objectives, other.objectives)
    assert front.stages == other.stages
    assert all(states_equal(front.network(i), other.network(i)) for i in range(len(other)))


class Samples(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return data()[0][i], int(data()[1][i])


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        yield from (Samples()[i] for i in range(N))


class Named(Samples):
    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return {"id": i, "pixel_values": image, "labels": label}


class Photographs(Samples):
    """A data set without a transform, or with images of several sizes, or of examples without labels."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __getitem__(self, i: int) -> Any:
        return self.given[i % len(self.given)], i % N_CLASSES


def read_only(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


X, Y = data()
one_hot = nn.functional.one_hot(Y, N_CLASSES)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param((DataLoader(TensorDataset(X, Y), batch_size=7),), id="loader"),
        pytest.param((DataLoader(TensorDataset(X, Y, Y * 2), batch_size=90),), id="loader with more parts"),
        pytest.param((DataLoader(Named(), batch_size=16),), id="loader of mappings"),
        pytest.param(([(X[:40], Y[:40]), (X[40:], Y[40:])].__iter__,), id="iterable of batches"),
        pytest.param((Samples(),), id="data set"),
        pytest.param((Stream(),), id="data set without length"),
        pytest.param((X.numpy(), Y.numpy()), id="arrays"),
        pytest.param((read_only(X), read_only(Y)), id="read-only arrays"),
        pytest.param((X.numpy()[::-1].copy()[::-1], Y.numpy()), id="negative strides"),
        pytest.param((X.numpy().astype(">f4"), Y.numpy().astype(">i2")), id="foreign byte order"),
        pytest.param((X.double(), Y.byte()), id="float64, uint8 labels"),
        pytest.param((X.numpy().astype(np.float64), Y.numpy().astype(np.uint16)), id="float64 array, uint16 labels"),
        pytest.param((X.T.contiguous().T, Y), id="not contiguous"),
        pytest.param((X.to_sparse(), Y), id="sparse"),
        pytest.param((X.clone().requires_grad_(), Y), id="requires grad"),
        pytest.param((inference(X), inference(Y)), id="inference tensors"),
        pytest.param((list(X), Y.tolist()), id="lists"),
        pytest.param((X.tolist(), list(Y)), id="nested lists, list of tensors"),
        pytest.param((X, one_hot), id="one-hot"),
        pytest.param((X, one_hot.float().numpy()), id="one-hot floats"),
        pytest.param((X, one_hot.bool()), id="one-hot truth values"),
        pytest.param((X, Y[:, None]), id="labels (n, 1)"),
    ],
)
def test_the_front_is_that_of_plain_tensors(given: tuple[Any, ...]) -> None:
    assert_same(prune(*((given[0](),) if callable(given[0]) else given)), expected())


def test_half_precision_images_are_those_that_they_hold() -> None:
    assert_same(prune(X.half(), Y), prune(X.half().float(), Y))


def test_search_images_may_come_from_a_loader_too() -> None:
    front = prune(X[:60], Y[:60], search_images=X[60:], search_labels=Y[60:])
    loaders = [DataLoader(TensorDataset(x, y), batch_size=9) for x, y in ((X[:60], Y[:60]), (X[60:], Y[60:]))]
    assert_same(prune(loaders[0], search_images=loaders[1]), front)


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffling_loader_gives_equal_fronts_and_its_draws_are_put_back(own: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=generator)
    states = torch.get_rng_state(), numpy_state(), random.getstate()
    first = prune(loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (numpy_state(), random.getstate()) == states[1:]
    if generator is not None:
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    torch.rand(3)
    assert_same(prune(loader), first)


def test_more_images_than_asked_for_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    front = prune(DataLoader(TensorDataset(X, Y), batch_size=50), max_images=60)
    assert "of images the first 60 images are taken; raise max_images" in caplog.text
    assert_same(front, prune(X[:60], Y[:60]))
    caplog.clear()
    prune(Samples(), max_images=60)
    assert "of 90 images 60 are drawn at random; raise max_images" in caplog.text
    caplog.clear()
    prune(DataLoader(TensorDataset(X, Y), batch_size=45), max_images=90)
    assert "max_images" not in caplog.text


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("repair", ["none", "batchnorm", "reconstruct"])
def test_networks_of_every_shape_of_images_are_pruned(kind: str, repair: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "paretoprune")
    images, labels = data(kind)
    front = prune(
        images, labels, network=trained(kind), search_images=images, search_labels=labels, repair=repair,
        evaluations=80, objectives=("error", "macs"),
    )  # fmt: skip
    assert len(front)
    assert front.density.min() < 0.5
    assert "path fails on this network" not in caplog.text
    for i in range(len(front)):
        network = front.network(i)
        with torch.no_grad():
            error = float((network(images).argmax(1) != labels).double().mean())
        assert error == pytest.approx(front.error[i], abs=1.01 / N)
        n_kept = sum(int(p.count_nonzero()) for name, p in network.named_parameters() if p.ndim > 1)
        assert n_kept <= round(front.density[i] * front.masks.n_units) == front.masks.unpack(i).sum()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X.byte(), Y), r"images as normalised floats.*uint8 of shape \(90, 6\); divide by 255 and normalise"),
        ((X.long(), Y), r"images as normalised floats.*int64"),
        ((X[:, 0], Y), r"tables \(n, features\), found torch.float32 of shape \(90,\)"),
        ((X.to("meta"), Y), "expected images with values, found a tensor on the device 'meta'"),
        ((X.numpy().astype(str), Y), "expected images as numbers, found ndarray of dtype <U"),
        (([X[0], X[1, :3]], Y[:2]), "expected images of one shape"),
        (([[1.0], [1.0, 2.0]], Y[:2]), "expected images of one shape"),
        ((X / 0, Y), "finite images"),
        ((X.double() * 1e300, Y), "finite images"),
        ((X,), "expected labels for images, found none; .* DataLoader or Dataset"),
        ((Samples(), Y), "expected no labels beside images"),
        ((X, ["cat"] * N), "expected labels as numbers"),
        ((X, Y.float()), r"whole-number labels in labels, found torch.float32; .*labels.long\(\)"),
        ((X, one_hot * 0.5), "rows that are not a single 1 among zeros"),
        ((X, Y[1:]), r"expected one label for each of 90 images, found shape \(89,\)"),
        ((DataLoader(TensorDataset(X)),), r"expected batches \(images, labels\) from images, found list of 1"),
        ((iter([{"a": 1.0}]),), "images under one of image, .* found the keys a; rename"),
        ((DataLoader(TensorDataset(X[:0], Y[:0])),), "at least one image in images, found none"),
        (("photos/train",), r"found the path 'photos/train'; load them, as with torchvision\.datasets\.ImageFolder"),
        ((Path("x.npy"), Y), r"found the path 'x\.npy'; load them"),
        ((Photographs(Image.new("RGB", (4, 4))),), r"put into batches, found others \(.*Image'>\); .*ToTensor"),
        (
            (Photographs(X[0], X[0, :2]),),
            r"found others \(stack expects .*\); let the data set give tensors of one size",
        ),
        (
            (DataLoader(Photographs(X[0], X[0, :2]), 9, num_workers=1),),
            r"found others \(.*(stack expects|resize storage)",
        ),
        ((Photographs(None),), r"found others \(default_collate.*NoneType"),
        (([((X[:9], X[:9]), Y[:9])].__iter__(),), "networks of several inputs are not supported"),
        (
            (zip(data("images")[0], Y, strict=True),),
            "expected batches from images, found a single image with its label",
        ),
        ((np.ma.masked_greater(X.numpy(), 1.0), Y), "expected images with all their values, found masked ones; fill"),
        (
            (torch.nested.as_nested_tensor([X[:1], X[:2]], layout=torch.jagged), Y[:2]),
            "images of one shape, found a nested tensor",
        ),
        ((X, Y + 1), "labels from 0 to 2, .* found 1 to 3; they start at 1: subtract 1"),
        ((X, Y - 1), "found -1 to 1; leave out the images without a label, which negative ones often stand for"),
        ((X, Y * 7), "found 0 to 14; give the index of each image's class among the network's answers"),
        ((X, Y, X[:, :5], Y), r"search_images of the shape of images, \(6,\), found \(5,\); prepare both alike"),
    ],
)
def test_images_and_labels_that_cannot_be_used_are_refused(given: tuple[Any, ...], message: str) -> None:
    keys = ("images", "labels", "search_images", "search_labels")
    with pytest.raises(ValueError, match=message):
        pareto_prune(trained(), **dict(zip(keys, given, strict=False)), evaluations=60, device="cpu", progress=False)


def test_an_error_of_a_data_set_is_its_own() -> None:
    class Broken(Samples):
        def __getitem__(self, i: int) -> Any:
            raise FileNotFoundError("photos/3.png")

    with pytest.raises(FileNotFoundError, match=r"photos/3\.png"):
        prune(Broken())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("evaluations", v, "expected `evaluations` as a whole number") for v in (10.5, "60", True, np.nan)),
        ("evaluations", -5, "at least 56 evaluations, .* found -5"),
        *(("seed", v, "expected `seed` as a whole number from 0 to") for v in (-1, 0.5, None, "0", 2**32, False)),
        *(("workers", v, "expected `workers` as a whole number of at least 1") for v in (0, -1, 1.5, "2", True)),
        *(("max_images", v, "expected `max_images` as a whole number of at least 1") for v in (0, None)),
        *(("progress", v, "expected `progress` as True or False") for v in ("no", None, 2)),
        *(("repair", v, "`repair`: expected a repair mode among none, batchnorm") for v in ("magic", ["none"])),
        *(("device", v, "expected `device` .* this machine has cpu") for v in ("gpu", "cuda:99", 1.5, True, "meta")),
        ("objectives", "error", "expected `objectives` as a sequence of names, found 'error'"),
        ("objectives", 2, "expected `objectives` as a sequence of names"),
        ("objectives", ("error", "memory"), "expected costs among density, parameters, macs, bytes, found memory"),
        *(("units", v, "expected `units` among weights, channels") for v in ("filters", None, 3)),
        ("objectives", (), "`objectives`: expected a loss and one or two costs, each once, found nothing"),
        ("objectives", ("error", "macs", "macs"), "each once, found error, macs, macs"),
        ("objectives", ("density", "error"), "`objectives`: expected a loss among error, divergence"),
        ("objectives", ("error", "watts"), "`objectives`: expected costs among density.* found watts"),
        ("exclude", 3, "expected `exclude` as names or patterns"),
        ("exclude", ["3"], r"exclude pattern '3' matches none .*; for all weights in it give '3\.\*'"),
        ("exclude", ["nothing.*"], "exclude pattern 'nothing.*' matches none of the prunable weights"),
    ],
)
def test_options_are_refused_by_name(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(**{option: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected `device` .* found 'cuda' .* this machine has cpu; choose one"):
        prune(device="cuda")


def test_more_workers_than_cores_are_of_use_are_not_started(caplog: pytest.LogCaptureFixture) -> None:
    assert_same(prune(workers=10**6), expected())
    assert "of 1000000 workers" in caplog.text


def test_options_are_checked_before_the_images_are_looked_at() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    with pytest.raises(ValueError, match="`workers`"):
        prune(never(), workers=0)


@pytest.mark.parametrize(
    "changed",
    [{"evaluations": 6e1}, {"evaluations": np.float32(60)}, {"seed": np.int64(0)}, {"workers": 1.0},
     {"device": torch.device("cpu")}, {"progress": np.False_}, {"objectives": ["error", "density"]}],
    ids=str,
)  # fmt: skip
def test_options_of_other_types_mean_the_same(changed: dict[str, Any]) -> None:
    assert_same(prune(**changed), expected())


@pytest.mark.parametrize("exclude", ["3.weight", ["3.*"], ("[3]*",)])
def test_excluded_weights_stay_dense(exclude: Any) -> None:
    front = prune(exclude=exclude)
    assert front.masks.n_units == 48
    for i in range(len(front)):
        assert torch.equal(front.network(i).get_parameter("3.weight"), trained().get_parameter("3.weight"))


# A front in a file


def test_a_saved_front_gives_its_networks_again(tmp_path: Path) -> None:
    front = expected()
    front.save(tmp_path / "front.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.npz", "front.safetensors"]
    assert_same(Front.load(tmp_path / "front.npz", fresh().double().train()), front)
    with torch.inference_mode():
        assert_same(Front.load(tmp_path / "front.npz", trained()), front)
    with pytest.raises(RuntimeError, match=r"Front\.load\(path, network\)"):
        Front.load(tmp_path / "front.npz").network(0)
    with pytest.raises(ValueError, match="architecture that was pruned, found another"):
        Front.load(tmp_path / "front.npz", fresh("signal"))
    with pytest.raises(ValueError, match=r"0\.weight does not fit"):
        Front.load(tmp_path / "front.npz", nn.Sequential(nn.Linear(5, 8), *list(fresh())[1:]))


class Keeping(nn.Sequential):
    """Keeps what it answered, and a lock, which no copy can be made of."""

    def forward(self, x: Tensor) -> Tensor:
        self.lock = threading.Lock()
        self.kept: Tensor = super().forward(x)
        return self.kept


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, None])
def test_a_front_is_loaded_with_a_network_as_people_hold_it(tmp_path: Path, wrap: Any) -> None:
    network = wrap(fresh()) if wrap else Keeping(*fresh())
    network(X)
    expected().save(tmp_path / "front.npz")
    assert_same(Front.load(tmp_path / "front.npz", network), expected())


def test_a_network_that_keeps_what_it_answered_and_a_lock_is_pruned() -> None:
    network = Keeping(*fresh())
    network.load_state_dict(trained().state_dict())
    network(X)
    front = prune(network=network, search_images=X, search_labels=Y)
    for i in range(len(front)):
        error = float((front.network(i)(X).argmax(1) != Y).double().mean())
        assert error == pytest.approx(front.error[i], abs=1.01 / N)


def test_fronts_whose_names_have_dots_keep_their_own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fronts = {"front-0.8": expected(), "front-0.9": prune(seed=1), "front": expected(), "~/deep/front.npz": expected()}
    for name, front in fronts.items():
        front.save(name if name.startswith("~") else tmp_path / name)
    for name, front in fronts.items():
        assert_same(Front.load(name if name.startswith("~") else tmp_path / name, fresh()), front)


def test_what_is_no_front_is_refused_by_name(tmp_path: Path) -> None:
    expected().save(tmp_path / "front.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    (tmp_path / "text.npz").write_text("no front")
    (tmp_path / "empty.npz").touch()
    for name in ("front.safetensors", "other.npz", "text.npz", "empty.npz", ""):
        with pytest.raises(
            ValueError, match=r"an npz file that Front\.save wrote, found something else; give that file"
        ):
            Front.load(tmp_path / name)
    with pytest.raises(ValueError, match="found a state dict; build the network"):
        Front.load(tmp_path / "front.npz", fresh().state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a file to write the front to, found the folder .*; add a name, front\.npz"):
        expected().save(tmp_path)


def test_networks_that_are_missing_or_of_another_front_are_refused(tmp_path: Path) -> None:
    expected().save(tmp_path / "a.npz")
    prune(seed=1).save(tmp_path / "b.npz")
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="found those of another; save the front again"):
        Front.load(tmp_path / "a.npz", trained())
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors', found no file"):
        Front.load(tmp_path / "b.npz", trained())


# The state of the caller


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(torch.no_grad, id="no_grad"),
        pytest.param(torch.inference_mode, id="inference_mode"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
        pytest.param(lambda: torch.device("meta"), id="another device"),
        pytest.param(lambda: np.errstate(all="raise"), id="numpy that raises"),
    ],
)
def test_modes_of_the_caller_change_nothing(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=7)
    trained()  # outside of the mode, where this is the first test of a process
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        front = prune(loader)
        assert before == (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        )  # fmt: skip
    assert_same(front, expected())


def test_another_default_type_and_device_change_nothing_and_stay() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        front = prune()
        assert torch.get_default_dtype() == torch.float64
        assert torch.zeros(1).device.type == "meta"
        with pytest.raises(ValueError, match="`seed`"):
            prune(seed=-1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same(front, expected())


def test_a_network_made_in_inference_mode_is_pruned() -> None:
    with torch.inference_mode():
        network = fresh()
        network.load_state_dict(trained().state_dict())
        front = prune(network=network)
    assert_same(front, expected())
    assert_same(
        prune(network=network.eval(), repair="reconstruct", evaluations=72), prune(repair="reconstruct", evaluations=72)
    )


def test_network_threads_and_random_states_stay_as_they_were() -> None:
    network = fresh().train()
    network.load_state_dict(trained().state_dict())
    network[0].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    states = torch.get_rng_state(), numpy_state(), random.getstate()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prune(network=network, repair="reconstruct", evaluations=72)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert network.training
    assert n_hooks(network) == 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert states_equal(network, trained())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (numpy_state(), random.getstate()) == states[1:]


def test_a_thread_gives_the_same_front() -> None:
    found: list[Front] = []
    thread = threading.Thread(target=lambda: found.append(prune(workers=2)))
    thread.start()
    thread.join()
    assert_same(found[0], expected())


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_take_turns(workers: int) -> None:
    """Tracing changes torch's modules for all threads, so that one search would run into another's symbols."""
    with ThreadPoolExecutor(3) as pool:
        fronts = list(pool.map(lambda _: prune(workers=workers), range(3)))
    for front in fronts:
        assert_same(front, expected())


def test_a_progress_bar_is_hidden_where_nothing_can_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert_same(prune(progress=True), expected())


class Sure(nn.Sequential):
    """Answers probabilities, as networks do that are made to be run."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x)
        return found.softmax(dim=1)


def test_the_divergence_of_probabilities_is_that_of_their_logits() -> None:
    network = Sure(*fresh())
    network.load_state_dict(trained().state_dict())
    changed: dict[str, Any] = {"objectives": ("divergence", "density"), "search_images": X, "search_labels": Y}
    front, plain = prune(network=network, **changed), prune(**changed)
    np.testing.assert_allclose(front.objectives, plain.objectives, rtol=1e-3, atol=1e-4)
    assert type(front.network(0)) is Sure


def _in_a_daemon(connection: Any) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("paretoprune").addHandler(handler)
    front = prune(DataLoader(TensorDataset(X, Y), batch_size=7, num_workers=1), workers=2)
    connection.send((front.masks.words, front.objectives, said))


@pytest.mark.skipif(not can_fork(), reason="processes are forked here")
def test_a_daemon_process_gives_the_same_front_without_children() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_a_daemon, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    words, objectives, said = ours.recv()
    process.join()
    assert np.array_equal(words, expected().masks.words)
    assert np.array_equal(objectives, expected().objectives)
    assert [line for line in said if "daemon" in line] == [
        "this is a daemon process, which may start no others: candidates are evaluated in it alone"
    ]


def test_a_program_without_a_file_runs_too() -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import test_library_inputs as t\n"
        "front = t.prune(workers=2)\n"
        "print(front.masks.words.tolist(), front.objectives.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"{expected().masks.words.tolist()} {expected().objectives.tolist()}"


# Networks that do little better than guessing


def test_a_network_that_only_knows_its_most_frequent_answer_is_explained() -> None:
    # Nearly all images are of the class that the last layer's bias answers: the empty network is as good as any.
    labels = torch.zeros(N, dtype=torch.int64)
    labels[:6] = torch.arange(6) % 2 + 1
    network = fresh()
    network.load_state_dict(trained().state_dict())
    network.get_parameter("3.bias").data += torch.tensor([50.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"better than guessing, found .* where always the same answer gets"):
        prune(X, labels, network=network, search_images=X, search_labels=labels)
