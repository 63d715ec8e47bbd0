"""The dense network: trained or loaded, refused where it does not fit, and measured on every split."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.data.datasets import ImageSet
from paretoprune.data.normalisations import NORMALISATIONS
from paretoprune.data.reading import read_images
from paretoprune.data.splits import SPLITS, LabelledImages, Splits, channel_statistics, split_images
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.checkpoints import DenseNetwork
from paretoprune.training.dense import measure_dense, prepare_dense
from paretoprune.training.loop import TrainingDivergedError
from small_networks import states_equal

LOG = logging.getLogger("tests.dense")
TRAINING = {"epochs": 3, "batch_size": 32, "learning_rate": 0.05}

FACTORIES = """
import torch
from torch import nn

class Picky(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.linear, self.error = nn.Linear(64, 10), error

    def forward(self, x):
        if self.error == "assertion":
            torch._assert(x.shape[-1] == 224, "wrong image height, expected 224")
        if self.error == "tuple":
            return self.linear(x.flatten(1)), None
        return self.linear(x.flatten(2))

def picky(error):
    return Picky(error)

def for_tables(num_classes, in_channels):
    return nn.Sequential(nn.Linear(in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))

def for_signals(num_classes, in_channels):
    conv = nn.Conv1d(in_channels, 8, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, num_classes))

def nothing_to_prune(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d((1, num_classes)), nn.Flatten())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Decoded digits and their splits, as the steps before write them."""
    folder = tmp_path_factory.mktemp("dense")
    images = read_images("digits", folder)
    images.save(folder / "images.safetensors")
    splits = split_images(images.labels.numpy(), images.is_test.numpy(), calibration=100, search=200, test=1000, seed=0)
    splits.save(folder / "splits.npz")
    return str(folder / "images.safetensors"), str(folder / "splits.npz")


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"dense_factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def settings(**changed: Any) -> dict[str, Any]:
    """What the configuration says about a network."""
    return {
        "architecture": "resnet8",
        "arguments": {"base_width": 4},
        "checkpoint": None,
        "normalisation": None,
        "exclude": [],
        **changed,
    }


def prepare(
    files: tuple[str, str], folder: Path, network: dict[str, Any], training: dict[str, Any] | None = None, seed: int = 0
) -> DenseNetwork:
    return prepare_dense(
        *files,
        network,
        TRAINING if training is None else training,
        seed=seed,
        device=torch.device("cpu"),
        log=LOG,
        resume=str(folder / "dense.resume"),
    )


@pytest.fixture(scope="module")
def trained(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> DenseNetwork:
    return prepare(files, tmp_path_factory.mktemp("trained"), settings())


def test_a_network_without_a_checkpoint_is_trained(files: tuple[str, str], trained: DenseNetwork) -> None:
    images, splits = ImageSet.load(files[0]), Splits.load(files[1])
    assert not trained.network.training
    assert trained.architecture == Architecture("resnet8", 10, 1, {"base_width": 4})
    assert (trained.mean, trained.std) == channel_statistics(images.images[torch.from_numpy(splits.train)])
    metrics = measure_dense(trained, *files, torch.device("cpu"))
    # A few epochs on 500 digits; guessing is right on a tenth.
    assert metrics["accuracy"]["test"] > 0.5
    assert metrics["n_images"] == {"train": 497, "calibration": 100, "search": 200, "test": 1000}


def test_measured_accuracies_are_those_of_a_plain_loop(files: tuple[str, str], trained: DenseNetwork) -> None:
    images, splits = ImageSet.load(files[0]), Splits.load(files[1])
    metrics = measure_dense(trained, *files, torch.device("cpu"))
    for name in SPLITS:
        part = LabelledImages.of(images, getattr(splits, name), trained.mean, trained.std)
        expected = 1 - top1_error(predict(trained.network, part.images, 100), part.labels)
        # Batches of another size: at most one image on the edge.
        assert metrics["accuracy"][name] == pytest.approx(expected, abs=1.01 / len(part)), name
    parameters = dict(trained.network.named_parameters())
    assert metrics["n_parameters"] == sum(p.numel() for p in parameters.values())
    assert metrics["n_prunable"] == sum(p.numel() for p in parameters.values() if p.ndim > 1)
    assert metrics["n_classes"] == 10


def test_excluded_weights_are_not_counted_as_prunable(files: tuple[str, str], trained: DenseNetwork) -> None:
    spared = DenseNetwork(trained.network, trained.architecture, trained.mean, trained.std, ("linear.weight",))
    difference = [measure_dense(d, *files, torch.device("cpu"))["n_prunable"] for d in (trained, spared)]
    assert difference[0] - difference[1] == 16 * 10


def test_the_same_seed_trains_the_same_network(files: tuple[str, str], trained: DenseNetwork, tmp_path: Path) -> None:
    assert states_equal(prepare(files, tmp_path, settings()).network, trained.network)
    assert not states_equal(prepare(files, tmp_path, settings(), seed=1).network, trained.network)


def test_a_given_normalisation_is_used_and_kept(files: tuple[str, str], tmp_path: Path) -> None:
    network = settings(normalisation={"mean": [0.25], "std": [0.5]}, exclude=["conv1.*"])
    dense = prepare(files, tmp_path, network, {"epochs": 1})
    assert (dense.mean, dense.std, dense.exclude) == ((0.25,), (0.5,), ("conv1.*",))


def test_a_normalisation_can_be_given_by_name(tmp_path: Path) -> None:
    colours = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 2
    colours[labels == 1] //= 4  # dark ones
    files = write(tmp_path, colours, labels)
    dense = prepare(files, tmp_path, settings(normalisation="cifar10"))
    assert (dense.mean, dense.std) == NORMALISATIONS["cifar10"]


@pytest.mark.parametrize(
    ("shape", "scale", "message"),
    [
        (
            (3, 8, 8),
            255,
            r"'imagenet' is for images in \[0, 1\], found values from .* give the dataset a `value_range`",
        ),
        ((3, 8), 1, r"'imagenet' is for images in \[0, 1\], found values from .* of shape \(3, 8\)"),
    ],
)
def test_a_normalisation_by_name_is_refused_for_what_is_no_image_in_its_range(
    tmp_path: Path, shape: tuple[int, ...], scale: float, message: str
) -> None:
    values = scale * torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))
    files = write(tmp_path, values, torch.arange(60) % 2)
    with pytest.raises(ValueError, match=message):
        prepare(files, tmp_path, settings(normalisation="imagenet"))


def write(folder: Path, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[str, str]:
    """Files of inputs and their splits."""
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    classes = tuple(map(str, labels.unique().tolist()))
    ImageSet(inputs, labels, is_test, classes).save(folder / "images.safetensors")
    splits = split_images(labels.numpy(), is_test.numpy(), calibration=0.15, search=0.2, test=0.2, seed=0)
    splits.save(folder / "splits.npz")
    return str(folder / "images.safetensors"), str(folder / "splits.npz")


@pytest.mark.parametrize(("factory", "shape"), [("for_tables", (5,)), ("for_signals", (2, 9))])
def test_networks_for_tables_and_signals_are_trained(
    tmp_path: Path, factories: str, factory: str, shape: tuple[int, ...]
) -> None:
    labels = torch.arange(180) % 3
    inputs = torch.randn(180, *shape, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = inputs[:, 0] / 4 + labels.view(-1, *[1] * (len(shape) - 1))
    files = write(tmp_path, inputs, labels)
    network = settings(architecture=f"{factories}:{factory}", arguments={})
    dense = prepare(files, tmp_path, network, {**TRAINING, "epochs": 20, "crop": 0, "flip": False})
    assert len(dense.mean) == shape[0]
    # Three values of the first feature, a quarter of a step apart from the noise.
    assert measure_dense(dense, *files, torch.device("cpu"))["accuracy"]["test"] > 0.8
    with pytest.raises(ValueError, match=r"expected images to shift or mirror, found .*`augmentation: \{crop: 0"):
        prepare(files, tmp_path, network, {**TRAINING, "crop": 1})
    with pytest.raises(ValueError, match="choose a network for such inputs, a factory of your own"):
        prepare(files, tmp_path, settings())


def test_every_tenth_of_the_epochs_is_logged(
    files: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG.name)
    prepare(files, tmp_path, settings(arguments={"base_width": 1}), {"epochs": 20, "batch_size": 500})
    lines = [line for line in caplog.messages if line.startswith("epoch")]
    assert len(lines) == 10
    assert lines[-1].startswith("epoch 20 of 20: loss ")
    assert any("resnet8: " in line and "prunable weights in 8 layers" in line for line in caplog.messages)


def test_an_interrupted_training_is_continued(
    files: tuple[str, str], trained: DenseNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    def stop(message: str, *values: Any) -> None:
        if message.startswith("epoch"):
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(LOG, "info", stop)
        with pytest.raises(StopError):
            prepare(files, tmp_path, settings())
    assert (tmp_path / "dense.resume").is_file()
    assert states_equal(prepare(files, tmp_path, settings()).network, trained.network)
    assert not (tmp_path / "dense.resume").exists()


def checkpoint(trained: DenseNetwork, folder: Path) -> str:
    path = folder / "published.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.network.state_dict().items()}}, path)
    return str(path)


def test_a_checkpoint_is_taken_as_it_is(
    files: tuple[str, str], trained: DenseNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    normalisation = {"mean": list(trained.mean), "std": list(trained.std)}
    network = settings(checkpoint=checkpoint(trained, tmp_path), normalisation=normalisation)
    dense = prepare(files, tmp_path, network, {}, seed=5)
    assert states_equal(dense.network, trained.network)
    assert not dense.network.training
    assert "normalisation" not in caplog.text


def test_a_checkpoint_without_a_normalisation_is_warned_about(
    files: tuple[str, str], trained: DenseNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = prepare(files, tmp_path, settings(checkpoint=checkpoint(trained, tmp_path)), {})
    assert (dense.mean, dense.std) == (trained.mean, trained.std)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no `normalisation` is given for the checkpoint" in warnings[0].getMessage()


def test_a_checkpoint_of_another_network_is_refused(
    files: tuple[str, str], trained: DenseNetwork, tmp_path: Path
) -> None:
    path = checkpoint(trained, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint '.*published\.th' does not fit the network: misshapen: conv1"):
        prepare(files, tmp_path, settings(checkpoint=path, arguments={"base_width": 8}), {})
    with pytest.raises(ValueError, match=r"published\.th' does not fit the network: missing: layer1\.1\.conv1\.weight"):
        prepare(files, tmp_path, settings(checkpoint=path, architecture="resnet20"), {})


def test_a_checkpoint_that_is_not_there_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at 'nowhere', found no file"):
        prepare(files, tmp_path, settings(checkpoint="nowhere"), {})


def test_a_network_with_another_number_of_answers_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    network = settings(arguments={"num_classes": 7})
    with pytest.raises(
        ValueError, match=r"'resnet8' gives answers of shape \(7,\) for an image, expected one for each of 10 classes"
    ):
        prepare(files, tmp_path, network)


def test_a_network_with_nothing_to_prune_is_refused(files: tuple[str, str], tmp_path: Path, factories: str) -> None:
    with pytest.raises(ValueError, match="expected at least one convolution or linear layer to prune, found none"):
        prepare(files, tmp_path, settings(architecture=f"{factories}:nothing_to_prune", arguments={}))


def test_excluding_everything_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclude less"):
        prepare(files, tmp_path, settings(exclude=["*"]))


def test_images_with_other_channels_than_the_network_s_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot run on images of shape \(1, 8, 8\): .*another `image_size` or `chan"):
        prepare(files, tmp_path, settings(arguments={"in_channels": 3}))


def test_images_too_small_for_the_network_are_refused(tmp_path: Path) -> None:
    images = ImageSet(
        torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8),
        torch.arange(40) % 2,
        torch.zeros(40, dtype=torch.bool),
        ("a", "b"),
    )
    images.save(tmp_path / "images")
    split_images(images.labels.numpy(), images.is_test.numpy(), calibration=4, search=4, test=4, seed=0).save(
        tmp_path / "splits.npz"
    )
    files = str(tmp_path / "images"), str(tmp_path / "splits.npz")
    with pytest.raises(ValueError, match=r"network 'squeezenet1_1' cannot run on images of shape \(3, 8, 8\)"):
        prepare(files, tmp_path, settings(architecture="squeezenet1_1", arguments={}))


def test_a_network_that_asserts_the_size_of_images_is_refused(
    files: tuple[str, str], tmp_path: Path, factories: str
) -> None:
    # As torchvision's transformers do.
    with pytest.raises(ValueError, match=r"picky' cannot run on images of shape \(1, 8, 8\): .*224; give"):
        prepare(files, tmp_path, settings(architecture=f"{factories}:picky", arguments={"error": "assertion"}))


@pytest.mark.parametrize("error", ["tuple", "three dimensions"])
def test_a_network_that_answers_something_else_than_logits_is_refused(
    files: tuple[str, str], tmp_path: Path, factories: str, error: str
) -> None:
    with pytest.raises(ValueError, match=r"network '.*picky'"):
        prepare(files, tmp_path, settings(architecture=f"{factories}:picky", arguments={"error": error}), {"epochs": 1})


def test_a_normalisation_for_other_channels_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 1 values in the normalisation's mean and std"):
        prepare(files, tmp_path, settings(normalisation={"mean": [0.5] * 3, "std": [0.5] * 3}))


def test_a_training_that_diverges_says_so(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="lower the learning_rate"):
        prepare(files, tmp_path, settings(), {"epochs": 4, "batch_size": 32, "learning_rate": 1e18})


def test_measuring_leaves_the_network_as_it_was(files: tuple[str, str], trained: DenseNetwork) -> None:
    before = {name: tensor.clone() for name, tensor in trained.network.state_dict().items()}
    first = measure_dense(trained, *files, torch.device("cpu"))
    assert measure_dense(trained, *files, torch.device("cpu")) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.network.state_dict().items())
    assert np.isfinite(list(first["accuracy"].values())).all()


BROUGHT = """
from torch import nn
from torch.nn import functional

class Brought(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.heads = nn.ModuleDict({"head": nn.Linear(128, num_classes), "aux[0]": nn.Linear(128, num_classes)})

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x.sub_(0.1)))).flatten(1)
        return {"logits": self.heads["head"](x), "aux": self.heads["aux[0]"](x) if self.training else None}

class Pure(Brought):
    def forward(self, x):
        return self.heads["head"](functional.relu(self.norm(self.conv(x - 0.1))).flatten(1))

def brought(num_classes, in_channels):
    network = Brought(num_classes, in_channels)
    network.conv.register_forward_hook(lambda module, inputs, output: None)
    return nn.DataParallel(network)

def random(num_classes, in_channels):
    network = Pure(num_classes, in_channels)
    network.conv.register_forward_hook(lambda module, inputs, output: functional.dropout(output, 0.5))
    return network
"""


def test_a_network_as_people_write_it_is_trained_saved_and_read_as_the_plain_one(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"brought_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(BROUGHT)
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.INFO, LOG.name)
    found, pure = (
        prepare(files, tmp_path, settings(architecture=f"{name}:{kind}", arguments={}, exclude=["conv.*"]))
        for kind in ("brought", "Pure")
    )
    assert states_equal(found.network, pure.network)
    assert found.exclude == pure.exclude == ("conv.*", "heads.aux[[]0].weight")
    found.save(tmp_path / "dense.safetensors")
    again = DenseNetwork.load(tmp_path / "dense.safetensors")
    assert again.adaptation == found.adaptation
    assert list(again.network.state_dict()) == list(pure.network.state_dict())
    metrics = [measure_dense(dense, *files, torch.device("cpu")) for dense in (found, again, pure)]
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0]["n_prunable"] == 1280
    lines = [line for line in caplog.messages if f"{name}:brought: " in line]
    assert len(lines) <= 6
    assert any("no answer needs them: heads.aux[0].weight" in line for line in lines)
    assert "right on" in lines[-1]


def test_random_answers_are_refused_before_anything_is_trained(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"random_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(BROUGHT)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"expected equal answers of network '{name}:random' .*'conv' \(Conv2d\)"):
        prepare(files, tmp_path, settings(architecture=f"{name}:random", arguments={}), {"epochs": -1})


def test_a_checkpoint_that_guesses_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    torch.save(Architecture("resnet8", 10, 1, {"base_width": 4}).build(1).state_dict(), tmp_path / "fresh.pt")
    with pytest.raises(ValueError, match="expected a dense network that is better than guessing"):
        prepare(files, tmp_path, settings(checkpoint=str(tmp_path / "fresh.pt")), {})
