"""Reading and atomic writing of JSON, CSV and npz files: a file is whole or not there."""

import csv
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block ends without an error.

    A reader therefore sees the old file or the whole new one, never half of it.

    Args:
        path: The file to write. Its folder is created when missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        # mkstemp makes a private file, and so do some writers. Results get the permissions of any other new file.
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, keys in the given order."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds something else.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found {type(content).__name__}; delete the file and run again"
        )
    return content


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write `rows` under the header `columns`. A table without rows still has its header.

    Raises:
        ValueError: A row has a key that is not among `columns`.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays, compressed.

    Raises:
        TypeError: An array has dtype object. Reading it back would need pickle, which can run code.
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype == object:
            raise TypeError(f"array '{name}' has dtype object, which only pickle can store; give it a plain dtype")
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **dict[str, Any](arrays))


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read named arrays, without unpickling."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
