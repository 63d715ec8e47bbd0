"""Networks in ONNX and .pt2 files answer as they did in memory."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from paretoprune.deployment import export
from paretoprune.deployment.export import ExportReport, OnnxReport, export_onnx, export_pt2
from paretoprune.networks.architectures import CifarResNet, to_channels_last
from torch import Tensor, nn

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
BOTH = [pytest.param(export_onnx, ".onnx", marks=needs_onnx, id="onnx"), pytest.param(export_pt2, ".pt2", id="pt2")]
Export = Callable[..., ExportReport]


def images(n: int = 4, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def lively(network: nn.Module) -> nn.Module:
    """Weights and statistics such that answers depend on the images, unlike those of most networks at their start."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5, generator=generator)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet8": lambda: CifarResNet(8),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=20),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=20),
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=20),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=20),
}


def answers(network: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return network.eval()(x).numpy()


def run_onnx(path: Path, x: Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": x.numpy()})[0]


@needs_onnx
@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_file_answers_as_the_network_does_for_any_batch(name: str, tmp_path: Path) -> None:
    network = lively(NETWORKS[name]())
    path = tmp_path / "network.onnx"
    report = export_onnx(network, images(), path)
    assert isinstance(report, OnnxReport)
    assert network.training
    for n in (1, 4, 7):
        expected = answers(network, images(n))
        assert n == 1 or expected.std(axis=0).max() > 0.01
        np.testing.assert_allclose(run_onnx(path, images(n)), expected, atol=1e-3 * np.abs(expected).max())
    assert report.equal_top1 == 1
    assert 0 < report.largest_difference < 1e-3 * np.abs(expected).max()
    assert (report.n_bytes, report.n_images, report.dynamic_batch) == (path.stat().st_size, 4, True)
    # One file with the weights inside, and nothing beside it.
    assert list(tmp_path.iterdir()) == [path]
    assert report.n_bytes > 4 * sum(parameter.numel() for parameter in network.parameters()) * 0.9


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenet_v3_small"])
def test_a_pt2_file_answers_as_the_network_does_for_any_batch(name: str, tmp_path: Path) -> None:
    network = lively(NETWORKS[name]())
    path = tmp_path / "network.pt2"
    report = export_pt2(network, images(), path)
    assert network.training
    with export.quiet():
        loaded = torch.export.load(path).module()
    for n in (1, 4, 7):
        expected = answers(network, images(n))
        with torch.no_grad():
            found = loaded(images(n)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert report.equal_top1 == 1
    assert (report.n_bytes, report.n_images) == (path.stat().st_size, 4)
    assert list(tmp_path.iterdir()) == [path]


@needs_onnx
def test_the_file_has_the_opset_that_is_told_and_no_notes_of_the_exporter(tmp_path: Path) -> None:
    import onnx

    report = export_onnx(CifarResNet(8), images(2, 8), tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    (opset,) = model.opset_import
    assert not any(part.metadata_props for part in (model, model.graph, *model.graph.node, *model.graph.value_info))
    assert isinstance(report, OnnxReport)
    assert opset.version == report.opset == export.OPSET


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_files_name_no_place_of_the_machine_that_wrote_them(write: Export, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"network{suffix}"
    write(CifarResNet(8), images(2, 8), path)
    content = path.read_bytes()
    for trace in (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent), "architectures.py"):
        assert trace.encode() not in content


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_one_image_is_enough_for_any_batch(write: Export, suffix: str, tmp_path: Path) -> None:
    report = write(CifarResNet(8), images(1, 8), tmp_path / f"network{suffix}")
    assert report.n_images == 1
    assert report.dynamic_batch


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_exporting_prints_logs_and_warns_of_nothing(
    write: Export, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(CifarResNet(8), images(2, 8), tmp_path / f"network{suffix}")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- refusals


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.numpy()).flatten(1)


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(x.flatten(1))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class NotFinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0


@pytest.mark.parametrize(("write", "suffix"), BOTH)
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branching(), "Branching cannot be exported, torch.export refuses it: .*data-dependent.*; .*torch.where"),
        (FixedBatch(), r"FixedBatch cannot be exported, .*constant \(4\).*; .*dynamic_batch=False"),
        (Numpy(), r"Numpy cannot be exported, .*\.numpy\(\) is not supported.*; .*change `forward`"),
        (Pair(), "expected a network that answers logits .*, found tuple; wrap it"),
        (NotFinite(), "expected finite answers"),
    ],
)
def test_networks_that_cannot_be_exported_are_refused_by_name_with_reason_and_remedy(
    network: nn.Module, message: str, write: Export, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_text("the old file")
    with pytest.raises(ValueError, match=message):
        write(network, images(4, 4), path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_a_batch_that_cannot_vary_is_exported_as_it_is(write: Export, suffix: str, tmp_path: Path) -> None:
    report = write(FixedBatch(), images(4, 4), tmp_path / f"network{suffix}", dynamic_batch=False)
    assert not report.dynamic_batch
    assert report.largest_difference == 0


@needs_onnx
def test_an_operation_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Bessel cannot be exported, torch.onnx.export .*bessel_j1.*export to \.pt2"):
        export_onnx(Bessel(), images(2, 4), tmp_path / "network.onnx")
    export_pt2(Bessel(), images(2, 4), tmp_path / "network.pt2")


@needs_onnx
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = lively(CifarResNet(8))
    other = export.onnx_bytes(export.plain(lively(CifarResNet(8, base_width=8))), images(2, 8), dynamic_batch=True)
    monkeypatch.setattr(export, "onnx_bytes", lambda *given, **options: other)
    with pytest.raises(
        ValueError, match=r"network.onnx: expected the network's answers within 0.001 .* found a difference"
    ):
        export_onnx(network, images(2, 8), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_the_tolerance_is_what_decides(tmp_path: Path) -> None:
    network = lively(CifarResNet(8))
    with pytest.raises(ValueError, match="answers within 0 of"):
        export_onnx(network, images(4, 16), tmp_path / "network.onnx", tolerance=0)


@needs_onnx
def test_networks_too_large_for_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"which is what one ONNX file can hold, .* export to \.pt2"):
        export_onnx(CifarResNet(8), images(2, 8), tmp_path / "network.onnx")


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_other_names_of_files_and_no_images_are_refused(write: Export, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"expected a file name that ends in \{suffix}, found 'network.pt'"):
        write(CifarResNet(8), images(2, 8), tmp_path / "network.pt")
    with pytest.raises(ValueError, match="expected images to run the network on, found none"):
        write(CifarResNet(8), images(0, 8), tmp_path / f"network{suffix}")


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match="expected the package 'onnxruntime', found none; `pip install onnx"):
        export_onnx(CifarResNet(8), images(2, 8), tmp_path / "network.onnx")


@pytest.mark.parametrize(("write", "suffix"), BOTH)
def test_the_modes_of_the_caller_change_nothing(write: Export, suffix: str, tmp_path: Path) -> None:
    network, x = to_channels_last(lively(CifarResNet(8))), images(3, 8)
    plain = write(network, x, tmp_path / f"plain{suffix}")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = write(network, x.double().contiguous(memory_format=torch.channels_last), tmp_path / f"inside{suffix}")
    assert inside.largest_difference == plain.largest_difference


def test_the_network_in_hand_stays_as_it_is(tmp_path: Path) -> None:
    network: Any = CifarResNet(8).double().train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_pt2(network, images(2, 8), tmp_path / "network.pt2")
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
