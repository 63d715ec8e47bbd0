"""Files below a folder or in an archive, read where they lie: nothing is ever unpacked."""

import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

# The names of a file and of the folders around it, from the outermost on.
Parts = tuple[str, ...]


class Tree(ABC):
    """Files by name.

    Attributes:
        files: What can be read, in the order in which it is read.
        folders: Folders that were listed, also empty ones.
        broken: Links that lead nowhere, and what else has a name but no content; with the reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Parts, str] = {}
        self.folders: set[Parts] = set()
        self.broken: dict[Parts, str] = {}

    @abstractmethod
    def read(self, chosen: Collection[Parts]) -> Iterator[tuple[Parts, BinaryIO]]:
        """Some of the files, opened one after another."""


class Folder(Tree):
    """Files on disk, sorted by name; links are followed.

    Raises:
        ValueError: A link leads back to a folder around it, or a folder cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        found: list[Path] = []
        around = {os.fspath(path): frozenset({os.path.realpath(path)})}

        def refuse(error: OSError) -> None:
            raise ValueError(f"the folder '{error.filename}' cannot be listed ({error.strerror}); make it readable")

        for place, folders, names in os.walk(path, followlinks=True, onerror=refuse):
            for name in folders:
                inner = str(Path(place, name))
                real = os.path.realpath(inner)
                if real in around[place]:
                    raise ValueError(f"the link '{inner}' leads back to a folder that it lies in; remove it")
                around[inner] = around[place] | {real}
                self.folders.add(Path(inner).relative_to(path).parts)
            found += [Path(place, name) for name in names]
        for file in sorted(found):
            parts = file.relative_to(path).parts
            if file.is_file():
                self.files[parts] = str(file)
            elif file.is_symlink() and not file.exists():
                self.broken[parts] = f"a link to '{file.readlink()}', where nothing is"

    def read(self, chosen: Collection[Parts]) -> Iterator[tuple[Parts, BinaryIO]]:
        """Some of the files, opened one after another."""
        for parts in chosen:
            with Path(self.files[parts]).open("rb") as handle:
                yield parts, handle


class TarArchive(Tree):
    """Members of a tar archive, compressed or not, in its own order: sorting would decompress it again and again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: dict[Parts, int] = {}
        with self._opened() as archive:
            for member in archive:
                parts = _inside(member.name)
                if not parts:
                    continue  # "./", the folder that was packed
                if member.isdir():
                    self.folders.add(parts)
                elif member.isfile() or member.islnk() or member.issym():
                    # A member that is added again replaces the first.
                    self.files[parts], self._places[parts] = member.name, member.offset

    def _opened(self) -> tarfile.TarFile:
        return tarfile.open(self.path)

    def read(self, chosen: Collection[Parts]) -> Iterator[tuple[Parts, BinaryIO]]:
        """Some of the members, in memory."""
        with self._opened() as archive:
            for member in archive:
                parts = _inside(member.name)
                if parts not in chosen or self._places.get(parts) != member.offset:
                    continue
                try:
                    content = archive.extractfile(member)
                except KeyError:
                    content = None
                if content is None:
                    self.broken[parts] = f"a link to '{member.linkname}', which is no file in the archive"
                    continue
                yield parts, io.BytesIO(content.read())


class ZipArchive(Tree):
    """Members of a zip archive, sorted by name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda one: _inside(one.filename)):
                parts = _inside(member.filename)
                if not parts:
                    continue
                if member.is_dir():
                    self.folders.add(parts)
                elif stat.S_ISLNK(member.external_attr >> 16):
                    self.broken[parts] = "a link in an archive; pack the file itself"
                elif member.flag_bits & 1:
                    self.broken[parts] = "encrypted; pack it without a password"
                else:
                    self.files[parts] = member.filename

    def read(self, chosen: Collection[Parts]) -> Iterator[tuple[Parts, BinaryIO]]:
        """Some of the members, in memory."""
        with zipfile.ZipFile(self.path) as archive:
            for parts in chosen:
                yield parts, io.BytesIO(archive.read(self.files[parts]))


def _inside(name: str) -> Parts:
    """The parts of a member's name; what would lead out of the archive is left out."""
    return tuple(part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".."))


ARCHIVE_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    NotImplementedError,
    OSError,
)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, by its first bytes or its ending."""
    with path.open("rb") as handle:
        return handle.read(4) in (b"PK\x03\x04", b"PK\x05\x06") or path.suffix.lower() == ".zip"


def tree_at(path: Path) -> Tree:
    """What lies at a path."""
    if path.is_dir():
        return Folder(path)
    return ZipArchive(path) if is_zip(path) else TarArchive(path)
