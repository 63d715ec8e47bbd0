"""Files of weights as people have them: a row a situation. Each is read right and said, or refused with the remedy."""

import argparse
import bz2
import gzip
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.pretrained import load_checkpoint
from safetensors.torch import save_file
from small_networks import states_equal
from torch import Tensor, nn

ARCHITECTURE = Architecture("resnet8", 3, 1, {"base_width": 2})
State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    return ARCHITECTURE.build(seed)


PLAIN: State = network(0).state_dict()
AVERAGED: State = network(1).state_dict()


def put(prefix: str, state: State = PLAIN) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def loaded(content: Any, folder: Path, key: str | None = None) -> tuple[nn.Module, str]:
    target = network(99)
    return target, load_checkpoint(target, saved(content, folder / "weights.pt"), key)


NESTED = [
    *({key: PLAIN} for key in ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")),
    {"state": {"model": PLAIN}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}},
    {"my_own_name_for_it": PLAIN, "epoch": 3},
    {"epoch": torch.tensor(3), "checkpoint": {"module": PLAIN}},
    {"state_dict": PLAIN, "args": argparse.Namespace(lr=0.1, data="images"), "best": np.float64(0.9)},
    {"state_dict": PLAIN, "best": np.float32(0.9), "step": np.int64(7)},
    {"state_dict": PLAIN, "optimizer": torch.optim.AdamW(network().parameters()).state_dict()},
    dict(PLAIN) | {"epoch": 3, "name": "resnet8"},
]
NAMED = [
    *(put(prefix) for prefix in ("module.", "model.", "net.", "_orig_mod.", "encoder.", "backbone.", "network.")),
    *(put(prefix) for prefix in ("module._orig_mod.", "model.module.encoder.", "_orig_mod.model.net.", "my.own.")),
    {**put("model."), "criterion.weight": torch.ones(3)},  # a LightningModule with a weighted loss
    {name if name.startswith("linear") else f"encoder.{name}": value for name, value in PLAIN.items()},
    {name.replace("layer1.", "layer1.module."): value for name, value in PLAIN.items()},  # a part was parallel
    {name.replace("layer2.", "layer2._orig_mod."): value for name, value in put("module.").items()},
    {**put("module."), "n_averaged": torch.tensor(5)},  # torch.optim.swa_utils.AveragedModel
    {**PLAIN, "total_ops": torch.ones(1), "layer1.total_params": torch.ones(1), "x.num_batches_tracked": torch.ones(1)},
    {name: value for name, value in PLAIN.items() if "num_batches" not in name},
    {name: nn.Parameter(value) if value.is_floating_point() else value for name, value in PLAIN.items()},
]  # fmt: skip


@pytest.mark.parametrize("content", [*NESTED, *NAMED])
def test_weights_are_found_where_they_lie_and_whatever_their_names_begin_with(content: Any, tmp_path: Path) -> None:
    target, line = loaded(content, tmp_path)
    expected = dict(PLAIN)
    n_counters = len([name for name in PLAIN if "num_batches" in name])
    if not any("num_batches" in name for name in map(str, _names(content))):
        target_state = target.state_dict()
        expected = {k: v if "num_batches" not in k else target_state[k] for k, v in expected.items()}
        n_counters = 0
    assert states_equal(target, _filled(expected))
    n_tensors = len([name for name in PLAIN if "num_batches" not in name]) + n_counters
    assert f"{n_tensors} tensors" in line
    assert "\n" not in line


def _names(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        return []
    return [*content, *(name for value in content.values() for name in _names(value))]


def _filled(state: State) -> nn.Module:
    module = network()
    module.load_state_dict(state)
    return module


def test_a_wrapped_network_takes_the_weights_of_what_is_inside(tmp_path: Path) -> None:
    target = nn.ModuleDict({"model": network(99)})
    line = load_checkpoint(target, saved(put("module."), tmp_path / "weights.pt"))
    assert states_equal(target["model"], network(0))
    assert "prefix" in line


@pytest.mark.parametrize(
    ("content", "averaged"),
    [
        ({"ema_state_dict": AVERAGED, "state_dict": PLAIN}, "ema_state_dict"),
        ({"model_ema": AVERAGED, "model": PLAIN}, "model_ema"),
        ({"ema": {"module": AVERAGED}, "net": PLAIN}, "ema.module"),
        ({"averaged_model": put("module.", AVERAGED), "my_network": PLAIN}, "averaged_model"),
        ({"state_dict_ema": AVERAGED, "state_dict": put("module.")}, "state_dict_ema"),
        ({"teacher": AVERAGED, "student": put("module.")}, "teacher"),
        ({"state_dict": {**put("ema_model.", AVERAGED), **put("model.")}}, "state_dict.ema_model"),
        ({**put("ema_model.", AVERAGED), **put("online_model.")}, "ema_model"),
    ],
)
def test_averaged_weights_are_said_and_chosen_by_key(content: Any, averaged: str, tmp_path: Path) -> None:
    plain, line = loaded(content, tmp_path)
    assert states_equal(plain, network(0))
    assert f"not taken {averaged} (`checkpoint_key` chooses)" in line
    chosen, line = loaded(content, tmp_path, averaged)
    assert states_equal(chosen, network(1))
    assert f"under '{averaged}'" in line
    assert "averaged weights" in line
    with pytest.raises(ValueError, match=rf"checkpoint_key 'no\.such' is not in .*lie at: .*{averaged.split('.')[0]}"):
        loaded(content, tmp_path, "no.such")


def test_averaged_weights_alone_are_taken_and_said(tmp_path: Path) -> None:
    target, line = loaded({"ema_state_dict": AVERAGED}, tmp_path)
    assert states_equal(target, network(1))
    assert "under 'ema_state_dict', averaged weights" in line


def test_of_several_networks_without_a_usual_name_the_user_chooses(tmp_path: Path) -> None:
    content = {"left": PLAIN, "right": AVERAGED}
    with pytest.raises(ValueError, match="several networks that fit; set `checkpoint_key` to one of 'left', 'right'"):
        loaded(content, tmp_path)
    assert states_equal(loaded(content, tmp_path, "right")[0], network(1))


@pytest.mark.parametrize(("dtype", "n_exact"), [(torch.float16, 0), (torch.bfloat16, 0), (torch.float64, 1)])
def test_other_precisions_are_cast_and_said(dtype: torch.dtype, n_exact: int, tmp_path: Path) -> None:
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in PLAIN.items()}
    target, line = loaded({"state_dict": cast}, tmp_path)
    for name, value in target.state_dict().items():
        assert value.dtype == PLAIN[name].dtype, name
        assert torch.equal(value, cast[name].to(value.dtype)), name
    n_cast = sum(value.is_floating_point() for value in PLAIN.values())
    assert f"{n_cast} cast from {str(dtype).removeprefix('torch.')} to float32" in line
    assert bool(n_exact) == states_equal(target, network(0))


def test_sparse_tensors_are_made_dense_and_said(tmp_path: Path) -> None:
    target, line = loaded(PLAIN | {"linear.weight": PLAIN["linear.weight"].to_sparse()}, tmp_path)
    assert states_equal(target, network(0))
    assert "1 sparse tensors made dense" in line


CONV = PLAIN["conv1.weight"]
QUANTISED = torch.quantize_per_tensor(CONV, 0.1, 0, torch.qint8)


def without(*names: str) -> State:
    return {name: value for name, value in PLAIN.items() if name not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN | {"conv1.weight": QUANTISED}, "is quantised: .*'conv1.weight'; give the weights from before"),
        (PLAIN | {"conv1.weight": CONV.to(torch.int8)}, "is quantised: .*'conv1.weight'"),
        (PLAIN | {"conv1.weight": CONV.to(torch.float8_e4m3fn)}, "is quantised: .*'conv1.weight'"),
        (PLAIN | {"conv1.weight": CONV * float("nan")}, r"not finite: conv1.weight \(18 of 18\); take an earlier"),
        (PLAIN | {"bn1.running_var": torch.tensor([1.0, float("inf")])}, r"not finite: bn1.running_var \(1 of 2\)"),
        (PLAIN | {"conv1.weight": CONV.to(torch.complex64)}, "complex numbers in 'conv1.weight', expected real ones"),
        (PLAIN | {"conv1.weight": CONV.double() * 1e300}, r"not finite: conv1.weight"),
        (without("linear.bias"), "missing: linear.bias"),
        (PLAIN | {"extra.weight": CONV}, "unexpected: extra.weight"),
        (
            PLAIN | {"conv1.weight": CONV[:1]},
            r"misshapen: conv1.weight \(expected \(2, 1, 3, 3\), found \(1, 1, 3, 3\)",
        ),
        (without("linear.bias") | {"linear.bais": CONV}, r"missing: linear.bias \(near: linear.bais\)"),
        (
            without("conv1.weight") | {"conv1.weight_orig": CONV, "conv1.weight_mask": CONV},
            r"call torch.nn.utils.prune.remove\(module, 'weight'\)",
        ),
        (without("conv1.weight") | {"conv1.weight_g": CONV, "conv1.weight_v": CONV}, "remove_weight_norm"),
        (without("conv1.weight") | {"conv1.parametrizations.weight.original0": CONV}, "remove_parametrizations"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_a_remedy(content: Any, message: str, tmp_path: Path) -> None:
    target = network(99)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(target, saved({"state_dict": put("module.", content)}, tmp_path / "weights.pt"))
    assert states_equal(target, network(99))


@pytest.mark.parametrize(
    "name", ["weights.pt", "weights.safetensors", "model_best.pth.tar", "pytorch_model.bin", "ä b"]
)
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress])
def test_a_format_is_told_by_content_not_by_name(
    name: str, kind: str, pack: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(dict(PLAIN), path)
    else:
        torch.save(PLAIN, path, _use_new_zipfile_serialization=kind == "torch")
    if pack:
        path.write_bytes(pack(path.read_bytes()))
    target = network(99)
    load_checkpoint(target, path)
    assert states_equal(target, network(0))


def truncated(path: Path) -> None:
    path.write_bytes(saved(PLAIN, path).read_bytes()[:4000])


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(saved(PLAIN, path.with_name("inner.pt")), "inner.pt")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(saved(PLAIN, path.with_name("inner.pt")), "inner.pt")


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in PLAIN.items()})  # type: ignore[arg-type]


ARRAYS = {name: value.numpy() for name, value in PLAIN.items()}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "it is empty.*; copy or download it again"),
        (lambda path: path.write_bytes(LFS), "a pointer of Git LFS.*; .*run `git lfs pull`"),
        (lambda path: path.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(99)), "neither torch nor safetensors wrote it"),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>Sign in"), "a web page.*download"),
        (lambda path: path.write_bytes(b"<HTML><body>404"), "a web page"),
        (lambda path: path.write_bytes(b'{"weight_map": {}}'), "text in JSON.*give the file of the weights"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file.*; export"),
        (lambda path: path.write_bytes(gzip.compress(bytes(9999))[:20]), "cut short or damaged"),
        (truncated, "cut short or damaged; copy or download it again"),
        (zipped, "an archive of inner.pt.*unpack it"),
        (tarred, "an archive of inner.pt.*unpack it"),
        (lambda path: torch.save([PLAIN], path), "holds no state dict .*found a list"),
        (lambda path: torch.save({"epoch": 3, "lr": 1}, path), "holds no state dict .*its keys are epoch, lr"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused_with_the_remedy(
    write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"'.*weights.pt' .*{message}"):
        load_checkpoint(network(), tmp_path / "weights.pt")


def test_a_folder_is_answered_with_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    saved(PLAIN, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found a folder; give one of the files in it: pytorch_model\.bin$"):
        load_checkpoint(network(), tmp_path)


class Settings:
    """An object that torch would need this file for."""


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(network().eval(), torch.zeros(1, 1, 8, 8)), str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(network(), path), "a whole pickled network or object, paretoprune.*CifarResNet"),
        (
            lambda path: torch.save(network(), path, _use_new_zipfile_serialization=False),
            "a whole pickled network or object, paretoprune.*CifarResNet",
        ),
        (lambda path: torch.save({"epoch": 1, "model": network()}, path), "`model` is an object, .*CifarResNet"),
        (lambda path: torch.save({"ema": network(), "epoch": 1}, path), "`ema` is an object, .*CifarResNet"),
        (
            lambda path: torch.save({"net": network()}, path, _use_new_zipfile_serialization=False),
            "`net` is an object, .*CifarResNet",
        ),
        (
            lambda path: torch.save({"state_dict": PLAIN, "settings": Settings()}, path),
            "beside weights it holds `settings`, an object, .*Settings",
        ),
        (lambda path: torch.save(ARRAYS, path), "weights are arrays of numpy"),
        (lambda path: torch.save({"state_dict": ARRAYS}, path), "it holds arrays of numpy"),
        (lambda path: torch.save({"state_dict": PLAIN, "losses": np.arange(3.0)}, path), r"arrays of numpy \(`losses`"),
        (lambda path: path.write_bytes(pickle.dumps(dict(PLAIN))), "a plain pickle"),
        (lambda path: path.write_bytes(pickle.dumps(ARRAYS)), "weights are arrays of numpy"),
        (scripted, "a TorchScript archive"),
        (arrays, "arrays of numpy"),
    ],
)
def test_a_file_that_needs_code_is_refused_with_the_lines_that_make_a_state_dict_of_it(
    write: Callable[[Path], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trained.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(network(99), path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert 1 <= len(lines) <= 2
    exec("\n".join(lines), {"torch": torch, "np": np})
    target = network(99)
    load_checkpoint(target, tmp_path / "trained-weights.pt")
    assert states_equal(target, network(0))
