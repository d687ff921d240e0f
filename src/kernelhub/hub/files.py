"""The files of a hub's folder: read and written where they lie, on a disk here or elsewhere through fsspec.

A hub on this machine is read with plain `pathlib`: importing fsspec takes longer (40 ms) than a whole cold load from a
folder (5 ms). What is elsewhere is in `remote.py`, which is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from kernelhub.errors import HubUnavailable, InvalidMetadata
from kernelhub.hub.addresses import local_path
from kernelhub.hub.opening import open_file
from kernelhub.hub.sources.base import Progress

_CHUNK = 1024 * 1024


class Files(Protocol):
    """A tree of files. Paths are relative, with `/`, and made of checked names only.

    Every method raises `HubUnavailable` where the place does not answer. What is not there is no error.
    """

    @property
    def name(self) -> str:
        """What users call the place, without credentials."""

    def read(self, path: str, limit: int) -> bytes | None:
        """A small file's contents; None where there is none. Raises `InvalidMetadata` for more than `limit` bytes."""

    def download(self, path: str, size: int, into: BinaryIO, progress: Progress) -> bool:
        """Write a file into another, at most `size + 1` bytes of it; False where there is none."""

    def names(self, folder: str) -> list[str] | None:
        """The files under a folder, by their paths in it, sorted; None where the place cannot list."""

    def check_root(self) -> None:
        """Say so, where it can be told, if the place itself is not there."""


@runtime_checkable
class WritableFiles(Files, Protocol):
    """A tree that can be published to. No reader ever sees half of a file."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file; False where it is there already. Of any number of writers at once exactly one succeeds."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a file, whether it is there or not."""


@dataclass(frozen=True)
class LocalFiles:
    """A folder on this machine."""

    root: Path

    @property
    def name(self) -> str:
        return str(self.root)

    def read(self, path: str, limit: int) -> bytes | None:
        file = self._open(path)
        if file is None:
            return None
        with file:
            # no more than is there: reading allocates what it is asked for
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        if len(data) > limit:
            raise too_large(self.name, path, limit)
        return data

    def download(self, path: str, size: int, into: BinaryIO, progress: Progress) -> bool:
        file = self._open(path)
        if file is None:
            return False
        left = size + 1
        with file:
            while left and (data := file.read(min(left, _CHUNK))):
                into.write(data)
                left -= len(data)
                progress.advance(len(data))
        return True

    def names(self, folder: str) -> list[str] | None:
        top = self._path(folder)
        found = []
        for parent, _, files in os.walk(top):
            found += [Path(parent, name).relative_to(top).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def check_root(self) -> None:
        if not self.root.is_dir():
            raise HubUnavailable(f"{self.root} is not a folder", hub=self.name, hint="Is the hub's path right?")

    def create(self, path: str, data: bytes) -> bool:
        temporary = self._write_beside(path, data)
        try:
            os.link(temporary, self._path(path))  # complete from its first moment on, and never over another
        except FileExistsError:
            return False
        except OSError as error:
            raise self._unavailable("write", path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def replace(self, path: str, data: bytes) -> None:
        temporary = self._write_beside(path, data)
        try:
            temporary.replace(self._path(path))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unavailable("write", path, error) from error

    def _write_beside(self, path: str, data: bytes) -> Path:
        """The contents on disk, under a name that `names` passes over."""
        target = self._path(path)
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # where a folder was to be there is a file, and nothing in it
                temporary.unlink()
            raise self._unavailable("write", path, error) from error
        return temporary

    def _open(self, path: str) -> BinaryIO | None:
        try:
            return open_file(self._path(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._unavailable("read", path, error) from error

    def _path(self, path: str) -> Path:
        return self.root.joinpath(*path.split("/"))

    def _unavailable(self, request: str, path: str, error: OSError) -> HubUnavailable:
        reason = error.strerror or str(error)
        return HubUnavailable(
            f"cannot {request} {self._path(path)}: {reason}", hub=self.name, request=f"{request} {path}"
        )


def open_files(url: str, user_agent: Callable[[], str]) -> Files:
    """The files of the hub at a path, `file://`, `http(s)://`, `s3://` or another address that fsspec knows.

    Raises `InvalidReference` for what is no address, `MissingDependency` where fsspec lacks a package for it.
    """
    local = local_path(url)
    if local is not None:
        return LocalFiles(local)
    from kernelhub.hub import remote  # here: it imports fsspec

    return remote.open_remote(url, user_agent)


def too_large(hub: str, path: str, limit: int) -> InvalidMetadata:
    return InvalidMetadata(f"{hub}: {path} has more than {limit:,} bytes, so it is not a hub's file")
