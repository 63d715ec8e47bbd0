"""Checkpoints: every format that is read, the one that must never be run, and errors that name every key."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from paretoprune.networks.architectures import Architecture, CifarResNet
from paretoprune.networks.checkpoints import DenseNetwork, load_weights
from paretoprune.networks.pretrained import load_checkpoint
from paretoprune.networks.weight_files import read_states
from paretoprune.tensors import load_networks, load_tensors, save_networks, save_tensors
from safetensors.torch import save_file
from small_networks import RESNET20, states_equal
from torch import Tensor, nn

ARCHITECTURE = Architecture("resnet8", 3, 1, {"base_width": 2})


def network(seed: int = 0) -> nn.Module:
    return ARCHITECTURE.build(seed)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_loaded(path: Path, expected: nn.Module | None = None) -> None:
    """A file holds the weights of a network, by default those of seed 0."""
    target = network(99)
    load_checkpoint(target, path)
    assert states_equal(target, expected or network())


@pytest.mark.parametrize("key", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_are_read_whatever_wraps_the_weights(
    tmp_path: Path, key: str | None, prefix: str, legacy: bool
) -> None:
    expected = network().state_dict()
    wrapped: Any = OrderedDict((prefix + name, tensor) for name, tensor in expected.items())
    content = wrapped if key is None else {"epoch": 3, key: wrapped, "best": 0.9}
    torch.save(content, tmp_path / "weights.th", _use_new_zipfile_serialization=not legacy)
    assert_loaded(tmp_path / "weights.th")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_files_are_read(tmp_path: Path, prefix: str) -> None:
    expected = network().state_dict()
    save_file({prefix + name: tensor for name, tensor in expected.items()}, tmp_path / "weights.safetensors")
    assert_loaded(tmp_path / "weights.safetensors")


class Malicious:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "hidden"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, how: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pt"
    content: Any = {"weight": torch.ones(2), "extra": Malicious(trace)} if how == "hidden" else Malicious(trace)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    # The file is a real threat: read carelessly, it does what it should not.
    pickle.loads(pickle.dumps(content))
    assert trace.exists()
    trace.unlink()
    with pytest.raises(
        ValueError, match=r"cannot be read as plain weights \(it would call \w+\.system\); .*tensors only; do not load"
    ):
        read_states(path)
    assert not trace.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "network.pt")
    with pytest.raises(ValueError, match="a whole pickled network"):
        read_states(tmp_path / "network.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02garbage", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"'.*{name}' cannot be read as plain weights"):
        read_states(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path, state = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt"), network().state_dict()
    if kind == "safetensors":
        save_file(dict(state), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        read_states(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.ones(3), {"state_dict": {}}, {"a": {"b": 1}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"holds no state dict \(names to tensors\)"):
        read_states(tmp_path / "weights.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match=f"expected a checkpoint at '{path}', found no file; correct"):
        read_states(path)


def test_weights_are_copied_into_the_network() -> None:
    source, target = network(1), network(2)
    load_weights(target, source.state_dict(), "checkpoint")
    assert states_equal(target, source)
    source.get_parameter("conv1.weight").data.zero_()
    assert target.get_parameter("conv1.weight").abs().sum() > 0


def test_missing_unexpected_and_misshapen_keys_are_all_named() -> None:
    target = network()
    before = network()
    state = dict(target.state_dict())
    del state["layer1.0.conv1.weight"], state["linear.bias"]
    state["fc.weight"] = state["fc.bias"] = torch.zeros(3)
    state["conv1.weight"] = torch.zeros(2, 3, 3, 3)
    with pytest.raises(ValueError, match="the file does not fit the network") as caught:
        load_weights(target, state, "the file")
    message = str(caught.value)
    assert "missing: layer1.0.conv1.weight, linear.bias" in message
    assert "unexpected: fc.weight, fc.bias" in message
    assert "misshapen: conv1.weight (expected (2, 1, 3, 3), found (2, 3, 3, 3))" in message
    assert "check `architecture`" in message
    assert states_equal(target, before)


def test_of_many_wrong_keys_some_are_named_and_all_counted() -> None:
    with pytest.raises(ValueError, match=r"unexpected: k0, k1, .*k7 and 12 more"):
        load_weights(network(), {**network().state_dict(), **{f"k{i}": torch.zeros(1) for i in range(20)}}, "x")


def test_counters_of_batches_may_be_missing() -> None:
    source, target = network(1), network(2)
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    assert len(state) < len(source.state_dict())
    load_weights(target, state, "old checkpoint")
    assert torch.equal(target.get_parameter("linear.weight"), source.get_parameter("linear.weight"))


def test_tensors_and_metadata_survive_saving(tmp_path: Path) -> None:
    tensors = {
        "shared": (part := torch.arange(6.0).view(2, 3)),
        "shared_too": part,
        "transposed": part.T,
        "int": torch.tensor([1, 2]),
        "bool": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "trainable": nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "folder" / "t.safetensors", tensors)
    assert_same(load_tensors(tmp_path / "folder" / "t.safetensors"), {k: v.detach() for k, v in tensors.items()})


def test_several_networks_survive_saving_in_their_order(tmp_path: Path) -> None:
    # Twelve: as text, "10" would come before "2".
    modules = [network(seed) for seed in range(12)]
    with torch.no_grad():
        modules[3].get_parameter("conv1.weight").zero_()
    save_networks(tmp_path / "folder" / "networks.safetensors", [module.state_dict() for module in modules])
    found = load_networks(tmp_path / "folder" / "networks.safetensors")
    assert len(found) == 12
    for state, module in zip(found, modules, strict=True):
        assert_same(state, module.state_dict())
        fresh = network(99)
        fresh.load_state_dict(state)
        assert states_equal(fresh, module)


def test_names_with_slashes_are_whole_when_networks_are_read(tmp_path: Path) -> None:
    states = [{"a/b.weight": torch.ones(2), "0/c": torch.zeros(1)}]
    save_networks(tmp_path / "networks.safetensors", states)
    assert_same(load_networks(tmp_path / "networks.safetensors")[0], states[0])


def test_dense_networks_survive_saving(tmp_path: Path) -> None:
    module = network(7).eval()
    with torch.no_grad():
        module.get_buffer("bn1.running_mean").fill_(0.3)
    dense = DenseNetwork(module, ARCHITECTURE, (0.1234567890123,), (0.5,), ("conv1.weight",))
    dense.save(tmp_path / "dense.safetensors")
    loaded = DenseNetwork.load(tmp_path / "dense.safetensors")
    assert states_equal(loaded.network, module)
    assert not loaded.network.training
    assert loaded.architecture == ARCHITECTURE
    assert (loaded.mean, loaded.std, loaded.exclude) == (dense.mean, dense.std, dense.exclude)
    # It is a checkpoint like any other, too.
    assert_loaded(tmp_path / "dense.safetensors", module)


def test_a_file_without_a_description_is_no_dense_network(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights.safetensors", network().state_dict())
    with pytest.raises(ValueError, match=r"has no description of its network; let the `dense` step write it"):
        DenseNetwork.load(tmp_path / "weights.safetensors")


@pytest.mark.skipif(not RESNET20.is_file(), reason="needs the ResNet-20 checkpoint in ../shared/data")
def test_the_published_checkpoint_fits_resnet20_and_no_other() -> None:
    target = CifarResNet(20)
    load_checkpoint(target, RESNET20)
    assert torch.equal(target.conv1.weight, read_states(RESNET20)["state_dict"]["module.conv1.weight"])
    with pytest.raises(ValueError, match=r"missing: layer1\.3\.conv1\.weight"):
        load_checkpoint(CifarResNet(56), RESNET20)
    with pytest.raises(ValueError, match=r"misshapen: linear\.weight \(expected \(100, 64\), found \(10, 64\)\)"):
        load_checkpoint(CifarResNet(20, num_classes=100), RESNET20)
