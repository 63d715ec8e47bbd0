"""Datasets: what is read is what lies there, from folders, archives and torchvision, and every error says so."""

import io
import tarfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from paretoprune.data.datasets import ImageSet
from paretoprune.data.reading import read_images
from paretoprune.data.splits import normalise
from paretoprune.evaluation.metrics import predict, top1_error
from paretoprune.networks.architectures import CifarResNet
from paretoprune.networks.pretrained import load_checkpoint
from PIL import Image
from small_networks import CIFAR_MEAN, CIFAR_SAMPLE, CIFAR_STD, RESNET20

needs_shared_data = pytest.mark.skipif(
    not (CIFAR_SAMPLE.is_file() and RESNET20.is_file()),
    reason="needs cifar10-sample.tar and the ResNet-20 checkpoint in ../shared/data, which this machine has not",
)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_tree(root: Path, size: tuple[int, int] = (6, 6), *, grey: bool = False, test: bool = True) -> Path:
    """Two classes, three training images each and a test image each, of noise; (height, width)."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 3), ("test", 1)):
        for label in ("cat", "ant"):
            for i in range(n):
                noise = rng.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)
                if part == "train" or test:
                    write_image(root / part / label / f"{i}.png", noise)
    return root


def pack(root: Path, archive: Path, mode: str = "w") -> Path:
    """The same tree as a tar archive, in sorted order."""
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for file in sorted(root.rglob("*")):
            tar.add(file, file.relative_to(root).as_posix(), recursive=False)
    return archive


def read(root: Path, name: str = ".", **options: Any) -> ImageSet:
    return read_images("imagefolder", root, path=name, **options)


def same(a: ImageSet, b: ImageSet) -> bool:
    tensors = ((a.images, b.images), (a.labels, b.labels), (a.is_test, b.is_test))
    return a.classes == b.classes and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors)


def test_digits_are_all_there_and_use_the_whole_range() -> None:
    found = read_images("digits", Path("nowhere"))
    assert found.images.shape == (1797, 1, 8, 8)
    assert found.images.dtype == torch.uint8
    assert (int(found.images.min()), int(found.images.max())) == (0, 255)
    assert len(found.images.unique()) == 17
    assert found.labels.dtype == torch.int64
    assert found.classes == tuple("0123456789")
    assert torch.bincount(found.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not found.is_test.any()


def test_a_folder_is_read_by_class_with_its_test_part(tmp_path: Path) -> None:
    found = read(write_tree(tmp_path))
    assert found.images.shape == (8, 3, 6, 6)
    assert found.classes == ("ant", "cat")
    files = sorted(tmp_path.rglob("*.png"))
    for image, label, is_test, file in zip(found.images, found.labels, found.is_test, files, strict=True):
        expected = np.moveaxis(np.asarray(Image.open(file)), 2, 0)
        assert np.array_equal(image.numpy(), expected)
        assert found.classes[int(label)] == file.parent.name
        assert bool(is_test) == (file.parent.parent.name == "test")
    assert found.is_test.sum() == 2


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_an_archive_gives_the_same_images_as_the_folder(tmp_path: Path, name: str, mode: str) -> None:
    root = write_tree(tmp_path / "tree")
    pack(root, tmp_path / name, mode)
    assert same(read(tmp_path, name), read(root))


def test_an_archive_may_have_a_folder_around_train_and_test(tmp_path: Path) -> None:
    pack(write_tree(tmp_path / "outer" / "tree").parent, tmp_path / "a.tar")
    assert same(read(tmp_path, "a.tar"), read(tmp_path / "outer" / "tree"))


def test_nothing_is_unpacked_from_an_archive(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root / "train", "train")
        tar.add(root / "train" / "cat" / "0.png", "../../train/cat/evil.png")
    before = sorted(tmp_path.rglob("*"))
    assert len(read(tmp_path, "a.tar").images) == 7
    assert sorted(tmp_path.rglob("*")) == before


def test_a_set_without_test_images_sets_none_apart(tmp_path: Path) -> None:
    found = read(write_tree(tmp_path, test=False))
    assert len(found.images) == 6
    assert not found.is_test.any()


def test_colour_images_can_be_read_as_grey_and_grey_ones_as_colour(tmp_path: Path) -> None:
    colour, grey = write_tree(tmp_path / "colour"), write_tree(tmp_path / "grey", grey=True)
    as_grey = read(colour, channels=1)
    assert as_grey.images.shape == (8, 1, 6, 6)
    file = sorted(colour.rglob("*.png"))[0]
    red, green, blue = np.moveaxis(np.asarray(Image.open(file)).astype(float), 2, 0)
    # Luma of ITU-R 601, rounded.
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(as_grey.images[0, 0].numpy(), expected, rtol=0, atol=1)
    as_colour = read(grey, channels=3)
    assert as_colour.images.shape == (8, 3, 6, 6)
    assert torch.equal(as_colour.images[:, 0], as_colour.images[:, 2])
    assert torch.equal(as_colour.images[:, :1], read(grey, channels=1).images)


def test_images_are_scaled_by_their_shorter_side_and_cropped_at_the_centre(tmp_path: Path) -> None:
    # A vertical edge in the middle of a wide image, and a horizontal one in the middle of a high image.
    wide, high = np.zeros((8, 24), dtype=np.uint8), np.zeros((24, 8), dtype=np.uint8)
    wide[:, 12:], high[12:] = 255, 255
    write_image(tmp_path / "train" / "a" / "wide.png", wide)
    write_image(tmp_path / "train" / "b" / "high.png", high)
    found = read(tmp_path, image_size=4, channels=1).images[:, 0]
    assert found.shape == (2, 4, 4)
    assert torch.equal(found[0], found[1].T)
    # The two central columns straddle the edge, so the outer ones lie well inside each side.
    assert found[0, :, 0].tolist() == [0] * 4
    assert found[0, :, 3].tolist() == [255] * 4


@pytest.mark.parametrize("size", [(5, 9), (7, 5), (31, 5), (4, 4), (3, 2)])
def test_every_image_gets_the_wanted_size(tmp_path: Path, size: tuple[int, int]) -> None:
    assert read(write_tree(tmp_path, size), image_size=4).images.shape == (8, 3, 4, 4)


def test_images_of_the_wanted_size_are_not_touched(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    assert same(read(root, image_size=6), read(root))


@pytest.mark.parametrize("archived", [False, True])
def test_hidden_files_are_skipped(tmp_path: Path, archived: bool) -> None:
    root = write_tree(tmp_path / "tree")
    expected = read(root)
    for name in (
        "train/cat/.DS_Store",
        "train/.DS_Store",
        "test/ant/._0.png",
        ".hidden",
        "README.md",
        "train/notes.txt",
    ):
        (root / name).write_text("no image")
    (root / "other" / "cat").mkdir(parents=True)
    (root / "other" / "cat" / "x.png").write_text("no image")
    pack(root, tmp_path / "a.tar")
    assert same(read(tmp_path, "a.tar" if archived else "tree"), expected)


@pytest.mark.parametrize("archived", [False, True])
def test_hidden_folders_are_no_classes(tmp_path: Path, archived: bool) -> None:
    root = write_tree(tmp_path / "tree")
    expected = read(root)
    write_image(root / "train" / ".ipynb_checkpoints" / "0.png", np.zeros((6, 6, 3), dtype=np.uint8))
    pack(root, tmp_path / "a.tar")
    assert same(read(tmp_path, "a.tar" if archived else "tree"), expected)


def test_sixteen_bit_grey_images_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    write_image(tmp_path / "train" / "a" / "0.png", ramp)
    write_image(tmp_path / "train" / "b" / "0.png", ramp)
    found = read(tmp_path, channels=1).images[0, 0].numpy().astype(int)
    # The upper eight of sixteen bits, rounded one way or the other.
    np.testing.assert_allclose(found, ramp / 257, rtol=0, atol=1)


@pytest.mark.parametrize("archived", [False, True])
def test_a_file_that_is_called_an_image_and_is_none_is_named(tmp_path: Path, archived: bool) -> None:
    root = write_tree(tmp_path / "tree")
    (root / "train" / "cat" / "notes.png").write_text("no image")
    pack(root, tmp_path / "a.tar")
    message = r"1 files in '.*' are no readable images: .*train/cat/notes\.png \(cannot identify.*repair or remove them"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "a.tar" if archived else "tree")


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path, (40, 40))
    whole = (root / "train" / "cat" / "1.png").read_bytes()
    (root / "train" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 files in '.*' are no readable images: .*1\.png \(.*truncated"):
        read(root)


def test_of_many_unreadable_files_the_first_few_are_named_and_all_counted(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    for i in range(7):
        (root / "train" / "ant" / f"x{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 files in .*x0\.png.*x4\.png[^x]*, …; repair") as caught:
        read(root)
    assert "x5.png" not in str(caught.value)


def test_an_empty_folder_says_how_to_arrange_images(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected images at '.*' as train/<class>/<image>, found none; arrange them so"
    ):
        read(tmp_path)


def test_images_that_are_not_under_train_say_how_to_arrange_them(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "0.png", np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="as train/<class>/<image>, found none"):
        read(tmp_path)


def test_an_empty_archive_says_how_to_arrange_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ValueError, match="as train/<class>/<image>, found none"):
        read(tmp_path, "a.tar")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected images at '.*nothing', found nothing; correct the dataset's"
    ):
        read(tmp_path, "nothing")


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(
        ValueError, match=r"(?s)expected a directory or a tar archive at '.*a\.tar', but: .*give another"
    ):
        read(tmp_path, "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_archive_is_named(tmp_path: Path, mode: str, damage: str) -> None:
    archive = pack(write_tree(tmp_path / "tree", (40, 40)), tmp_path / "a.tar", mode)
    whole = archive.read_bytes()
    half = len(whole) // 2
    archive.write_bytes(whole[:half] if damage == "cut" else whole[:half] + b"\x55" * 2000 + whole[half + 2000 :])
    # Overwritten in the middle, a plain archive has a damaged image, and a compressed one cannot be decompressed.
    with pytest.raises(ValueError, match=r"a directory or a tar archive at '.*a\.tar', but|no readable images"):
        read(tmp_path, "a.tar")


def test_a_test_class_that_train_does_not_know_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    write_image(root / "test" / "dog" / "0.png", np.zeros((6, 6, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"classes dog are in '.*' under test/ but not under train/; add training"):
        read(root)


def test_images_of_different_sizes_ask_for_a_size(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    write_image(root / "train" / "ant" / "big.png", np.zeros((9, 7, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"found 2, from \(6, 6\) to \(9, 7\); give the dataset an `image_size`"):
        read(root)
    assert read(root, image_size=5).images.shape == (9, 3, 5, 5)


def test_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected channels 1 \(grey\) or 3 \(colour\), found 4"):
        read(write_tree(tmp_path), channels=4)


def test_an_imagefolder_needs_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an imagefolder dataset needs `path`"):
        read_images("imagefolder", tmp_path)


def test_an_unknown_source_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"among digits, cifar10, cifar100, fashion_mnist, imagefolder, npz, .*'mnist'"
    ):
        read_images("mnist", tmp_path)


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    assert same(read(tmp_path / "elsewhere", str(root)), read(root))


def test_image_sets_survive_saving(tmp_path: Path) -> None:
    found = read(write_tree(tmp_path / "tree"))
    odd = ImageSet(found.images, found.labels, found.is_test, ("crème brûlée", 'a "quoted" one'))
    for i, images in enumerate((found, odd)):
        images.save(tmp_path / f"{i}.safetensors")
        assert same(ImageSet.load(tmp_path / f"{i}.safetensors"), images)


class StandIn:
    """What torchvision's datasets offer once they are read: pixels and labels that say which image it is."""

    shape: tuple[int, ...] = (4, 5, 3)
    asked: list[dict[str, Any]]

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        self.asked.append({"root": root, "train": train, "download": download})
        n = 6 if train else 2
        start = 0 if train else 100
        self.data: Any = np.arange(n * int(np.prod(self.shape)), dtype=np.int64).reshape(n, *self.shape) % 250
        self.data = (self.data + start % 7).astype(np.uint8)
        self.targets: Any = [(start + i) % 3 for i in range(n)]
        self.classes = ["x", "y", "z"]


def test_cifar_is_read_with_channels_first_and_its_test_part_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    cifar = type("CIFAR10", (StandIn,), {"asked": asked})
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    found = read_images("cifar10", tmp_path)
    assert asked == [{"root": tmp_path, "train": train, "download": True} for train in (True, False)]
    assert found.images.shape == (8, 3, 4, 5)
    assert found.images.is_contiguous()
    assert found.images.dtype == torch.uint8
    train, test = cifar(tmp_path, True, True), cifar(tmp_path, False, True)
    for i in range(8):
        source = train.data[i] if i < 6 else test.data[i - 6]
        assert np.array_equal(found.images[i].permute(1, 2, 0).numpy(), source)
    assert found.labels.tolist() == [*train.targets, *test.targets]
    assert found.labels.dtype == torch.int64
    assert found.is_test.tolist() == [False] * 6 + [True] * 2
    assert found.classes == ("x", "y", "z")


def test_fashion_mnist_is_read_as_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensors(StandIn):
        shape = (4, 5)
        asked: list[dict[str, Any]] = []  # noqa: RUF012

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            super().__init__(root, train, download)
            self.data, self.targets = torch.from_numpy(self.data), torch.tensor(self.targets)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Tensors)
    found = read_images("fashion_mnist", tmp_path)
    assert found.images.shape == (8, 1, 4, 5)
    assert torch.equal(found.images[:6, 0], Tensors(tmp_path, True, True).data)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 2]
    assert found.is_test.sum() == 2


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("Dataset not found or corrupted")])
def test_a_failed_download_says_where_to_put_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 is not in '.*' and could not be downloaded \(.*copy torch"):
        read_images("cifar100", tmp_path)


@needs_shared_data
def test_the_published_resnet20_is_right_on_916_of_a_thousand_test_images() -> None:
    found = read_images("imagefolder", CIFAR_SAMPLE.parent, path=CIFAR_SAMPLE.name)
    assert found.images.shape == (6187, 3, 32, 32)
    assert found.is_test.sum() == 1017
    assert (~found.is_test).sum() == 5170
    assert len(found.classes) == 10
    network = CifarResNet(20).eval()
    load_checkpoint(network, RESNET20)
    chosen = found.is_test
    error = top1_error(
        predict(network, normalise(found.images[chosen], CIFAR_MEAN, CIFAR_STD), 128), found.labels[chosen]
    )
    # 85 or 86 of 1,017 images wrong; one image is 0.1 points.
    assert 100 * (1 - error) == pytest.approx(91.6, abs=0.15)


def test_grey_images_in_an_archive_are_read_from_memory(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(content, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for label in ("a", "b"):
            member = tarfile.TarInfo(f"./train/{label}/0.png")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    found = read(tmp_path, "a.tar", channels=1)
    assert found.images.shape == (2, 1, 4, 4)
    assert found.images.unique().tolist() == [9]
