"""Files of trained weights as people have them: what they hold, or why they cannot be read, never by running code."""

import argparse
import bz2
import gzip
import io
import lzma
import os
import pickle
import pickletools
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

# Keys that hold weights as trained, the more usual first.
PLAIN_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "state", "model_state")
SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin", ".safetensors", ".gz")
# Pieces of information that checkpoints carry beside weights. None of them does anything when it is made.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
]
# Modules that no network comes from, but attacks do.
SUSPICIOUS = (
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "builtins",
    "__builtin__",
    "runpy",
    "importlib",
    "shutil",
    "socket",
)
# How the old format of torch.save begins: the long number 0x1950a86a20f9469cfc6c, pickled.
TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
DAMAGED = "the file is cut short or damaged; copy or download it again"
_NO_TENSORS = (
    pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError,
    AttributeError, IndexError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip


def read_states(path: str | os.PathLike[str], key: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Read every state dict in a file of weights: safetensors or torch's own, also compressed by gzip, bzip2 or xz.

    What a file is follows from its first bytes; its name does not matter.

    Args:
        path: The file.
        key: Dotted path to what is wanted: nested keys, then a prefix of names. None for all.

    Returns:
        Names to tensors, on the CPU, by the dotted path at which they lie; the outermost has the path "".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no state dict or nothing at the key, needs code to be read, or is something else.
    """
    path = Path(path)
    if path.is_dir():
        inside = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
        remedy = f"give one of the files in it: {', '.join(inside[:8])}" if inside else "give the file of its weights"
        raise FileNotFoundError(f"expected a checkpoint at '{path}', found a folder; {remedy}")
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint at '{path}', found no file; correct `checkpoint` or `data_directory`"
        )
    content = _content(path)
    states = dict(_states(content))
    if not states:
        found = f"its keys are {_listed(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"'{path}' holds no state dict (names to tensors), found {found}; save it with "
            "torch.save(network.state_dict(), path)"
        )
    return states if key is None else {key: _at(path, content, states, key)}


def _content(path: Path) -> Any:
    """What a file holds, read as plain data."""
    data = path.read_bytes()
    if not data:
        raise _refusal(path, "it is empty", "copy or download it again")
    unpack: Callable[[bytes], bytes] | None = next(
        (
            function
            for magic, function in (
                (b"\x1f\x8b", gzip.decompress),
                (b"BZh", bz2.decompress),
                (b"\xfd7zXZ", lzma.decompress),
            )
            if data.startswith(magic)
        ),
        None,
    )
    try:
        data = unpack(data) if unpack else data
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise _refusal(path, _reason(error), DAMAGED) from error
    if looks := _something_else(path, data):
        raise _refusal(path, *looks)
    try:
        if _is_safetensors(data):
            return load_safetensors(data)
        # Sparse tensors are checked: indices beyond a tensor's end would be read from other memory.
        sparse = torch.sparse.check_sparse_tensor_invariants()
        with torch.serialization.safe_globals(HARMLESS), sparse, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # of quantised tensors
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # what follows is an error
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _NO_TENSORS as error:
        raise _refusal(path, *_explained(path, data, error)) from error


def _refusal(path: Path, found: str, remedy: str) -> ValueError:
    return ValueError(f"'{path}' cannot be read as plain weights ({found}); {remedy}")


def _reason(error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    # What torch says of any file that it does not know, with the advice to run whatever it holds.
    return "neither torch nor safetensors wrote it" if reason.startswith("Weights only load failed") else reason


def _is_safetensors(data: bytes) -> bool:
    return len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32


def _something_else(path: Path, data: bytes) -> tuple[str, str] | None:
    """What a file is, and the remedy, where its bytes say that it is no file of weights."""
    start = data[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "the weights were not fetched: run `git lfs pull` where the file lies"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", "the download needs another link or a login; download the file itself"
    if start.startswith((b"{", b"[")):
        return "text in JSON", "give the file of the weights that belongs to it"
    if data.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes it", "export the weights to torch first"
    if path.suffix.lower() == ".onnx":
        return "an ONNX network", "give the weights of the torch network that it was exported from"
    if data.startswith(b"PK"):
        return _other_archive(path, data)
    # A tar of torch's own has a member `pickle`; others are packages of several files.
    if data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return f"an archive of {_listed(archive.getnames())}", "unpack it, and give the file of the weights"
    return None


def _other_archive(path: Path, data: bytes) -> tuple[str, str] | None:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile as error:
        return _reason(error), DAMAGED
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive", _two_lines(path, "torch.jit.load({path}, map_location='cpu')", ".state_dict()")
    if any("serialized_exported_program" in name or "/models/" in name for name in names):
        return "a network exported by torch.export", _two_lines(path, "torch.export.load({path})", ".state_dict")
    if names and all(name.endswith(".npy") for name in names):
        lines = "torch.save({{k: torch.from_numpy(v) for k, v in np.load({path}).items()}}, {new})"
        return "arrays of numpy", "save them as tensors:\n    " + _filled(path, lines)
    if not any(name.endswith("data.pkl") for name in names):
        return f"an archive of {_listed(names)}", "unpack it, and give the file of the weights"
    return None


def _filled(path: Path, line: str) -> str:
    return line.format(path=repr(str(path)), new=repr(str(path.with_name(f"{path.name.split('.')[0]}-weights.pt"))))


def _two_lines(path: Path, load: str, state: str, *, whole: bool = False) -> str:
    """The remedy for a file that needs code: two lines that make a state dict of it.

    Args:
        path: The file.
        load: What reads it.
        state: What makes a state dict of its content: the end of an expression, or all of it.
        whole: Whether it is all of it.
    """
    lines = [f"content = {load}", f"torch.save({state if whole else f'content{state}'}, {{new}})"]
    return (
        "make a state dict of it where the network's code can be imported, if you trust the file (this runs its code)"
        ":\n    " + "\n    ".join(_filled(path, line) for line in lines)
    )


def _explained(path: Path, data: bytes, error: Exception) -> tuple[str, str]:
    """What stands in the way of reading a file, and the remedy."""
    globals_, whole, key, strings = _in_pickle(data)
    # Torch's own old format begins with a number.
    pickled = data.startswith(b"\x80") and TORCH_MAGIC not in data[:64]
    load = (
        "np.load({path}, allow_pickle=True)"
        if pickled
        else "torch.load({path}, map_location='cpu', weights_only=False)"
    )
    if not globals_ and pickled and b"torch" in data:
        return "a plain pickle", _two_lines(path, load, "")
    if not globals_:
        plain = "a checkpoint must hold tensors only: save it with torch.save(network.state_dict(), path)"
        starts = data.startswith((b"PK", b"\x80")) or _is_safetensors(data)
        return _reason(error), f"{DAMAGED}, or {plain}" if starts else plain
    name = globals_[0]
    if name.partition(".")[0] in SUSPICIOUS:
        return f"it would call {name}", "a checkpoint must hold tensors only; do not load this file"
    at = next((known for known in PLAIN_KEYS if known in strings and known != key), None)
    if name.endswith(".multiarray._reconstruct"):
        inner = "content" if at is None else f"content['{at}']"
        what = "weights are arrays of numpy" if at is None else f"beside weights it holds arrays of numpy (`{key}`)"
        lines = f"{{{{k: torch.as_tensor(v) for k, v in {inner}.items()}}}}"
        return what, _two_lines(path, load, lines, whole=True)
    if whole:
        return f"a whole pickled network or object, {name}", _two_lines(path, load, ".state_dict()")
    if at is None:
        known = key in PLAIN_KEYS or "ema" in key
        return f"`{key}` is an object, {name}", _two_lines(
            path, load, f"['{key}']" + (".state_dict()" if known else "")
        )
    return f"beside weights it holds `{key}`, an object, {name}", _two_lines(path, load, f"['{at}']")


# Codes that may stand before the outermost object; the old format says what kind it is and names its source.
_PREAMBLE = ("PROTO", "FRAME", "MARK", "SHORT_BINUNICODE", "BINUNICODE", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")


def _in_pickle(data: bytes) -> tuple[list[str], bool, str, list[str]]:
    """What a pickle would import, without running it.

    Returns:
        Names that torch does not take for plain data; whether the first is the outermost object; the text before the
        first, as a rule the key at which it lies; all texts up to the end.
    """
    old = not data.startswith(b"PK")
    if not old:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            try:
                data = archive.read(name)
            except (zipfile.BadZipFile, zlib.error, EOFError):
                return [], False, "", []
    streams = io.BytesIO(data)
    found: list[str] = []
    texts: list[str] = []
    whole, key = False, ""
    try:
        # Torch's old format is several pickles: a magic number, a version, sizes, the content, names of storages.
        while streams.tell() < len(data) and not found:
            n_codes = 0
            for code, value, _ in pickletools.genops(streams):
                if "GLOBAL" in code.name:
                    name = ".".join(str(value).split(" ")) if code.name == "GLOBAL" else ".".join(texts[-2:])
                    if not _is_plain(name):
                        if not found:
                            # The old format puts the word `module` between a key and the class of what lies there.
                            before = texts[:-1] if old and texts[-1:] == ["module"] else texts
                            whole, key = n_codes == 0, before[-1] if before else ""
                        found.append(name)
                elif isinstance(value, str):
                    texts.append(value)
                n_codes += code.name not in _PREAMBLE
    except (ValueError, pickle.UnpicklingError, UnicodeDecodeError, IndexError, StopIteration):
        pass  # what stands behind the pickles, or a damaged one: what was found so far counts
    return found, whole, key, texts


def _is_plain(name: str) -> bool:
    """Whether torch reads a name as plain data, of its own or of those allowed here."""
    plain = ("torch._utils._rebuild", "torch.storage.", "torch.serialization._get_layout", "torch._tensor._rebuild")
    known = {"collections.OrderedDict", "collections.Counter", "_codecs.encode", "argparse.Namespace", "torch.device"}
    numpy = name.startswith("numpy.") and name.endswith((".scalar", ".dtype", "DType"))
    storage = name.startswith("torch.") and name.endswith(("Storage", "Size", ".Tensor", ".Parameter"))
    return numpy or storage or name in known or name.startswith(plain)


def _states(content: Any, at: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All state dicts in nested mappings, outermost first, each by its dotted path."""
    if not isinstance(content, Mapping) or depth > 4:
        return
    # Optimisers keep tensors by number. A state dict may have plain values among its tensors.
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(isinstance(name, str) for name in content):
        yield at, tensors
    for name, inner in content.items():
        if isinstance(name, str):
            yield from _states(inner, f"{at}.{name}" if at else name, depth + 1)


def _at(path: Path, content: Any, states: Mapping[str, dict[str, Tensor]], key: str) -> dict[str, Tensor]:
    """The state dict at a dotted path, whose end may be a prefix of names."""
    if key in states:
        return states[key]
    for outer in sorted(states, key=len, reverse=True):
        if not outer or key.startswith(f"{outer}."):
            prefix = f"{key[len(outer) + 1 :] if outer else key}."
            if inner := {n.removeprefix(prefix): v for n, v in states[outer].items() if n.startswith(prefix)}:
                return inner
    there = [place for place in states if place]
    outermost = states.get("")
    if outermost is not None:
        there += sorted({name.partition(".")[0] for name in outermost if "." in name})
    there = there or [str(name) for name in content]
    raise ValueError(f"checkpoint_key '{key}' is not in '{path}'; weights lie at: {_listed(there)}; give one of these")


def _listed(names: Any, most: int = 8) -> str:
    """Some names, and the number of all others."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
