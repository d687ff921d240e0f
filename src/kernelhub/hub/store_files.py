"""Files and folders that several processes share: appearing whole or not at all, written by one at a time, removed for good."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kernelhub.core.canonical import canonical_json
from kernelhub.errors import StoreError
from kernelhub.hub.disk import writing
from kernelhub.hub.opening import open_file

_log = logging.getLogger("kernelhub")

# How long to wait for another process that is fetching the same variant, in seconds.
LOCK_TIMEOUT = 1800.0

# What to do where the store cannot be written.
ELSEWHERE = "KERNELHUB_CACHE names another folder; `kernelhub cache prune` frees what is not needed."

# What file systems say that cannot lock files, as some over networks; `filelock` itself knows of ENOSYS.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


@contextmanager
def locked(root: Path, folder: Path) -> Iterator[None]:
    """The lock of a folder of the store in `root`; errors of the file system become `StoreError`."""
    with _acquired(root, folder, LOCK_TIMEOUT) as is_ours:
        if not is_ours:
            raise StoreError(f"another process has been writing {folder} for {LOCK_TIMEOUT / 60:.0f} minutes")
        yield


@contextmanager
def locked_unless_busy(root: Path, folder: Path) -> Iterator[bool]:
    """As `locked`, without waiting: false where another process writes the folder."""
    with _acquired(root, folder, 0.0) as is_ours:
        yield is_ours


@contextmanager
def _acquired(root: Path, folder: Path, timeout: float) -> Iterator[bool]:
    from filelock import FileLock, Timeout  # 20 ms, and needed only where something is written

    key = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    lock = FileLock(root / "locks" / f"{key}.lock", timeout=timeout)
    is_ours = True
    with writing(f"to the store {root}", ELSEWHERE):
        try:
            (root / "locks").mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                is_ours = False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                # What appears by a rename is whole without a lock too; the same may then be fetched twice.
                _log.info("files in %s cannot be locked: %s", root, error.strerror)
            yield is_ours
        finally:
            lock.release()


def check_owner(root: Path, folder: Path) -> None:
    """Raises `StoreError` where another user owns a part of the way to the folder, and everybody may write to it."""
    if not hasattr(os, "geteuid"):
        return
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid != os.geteuid() and status.st_mode & stat.S_IWOTH:
            raise StoreError(
                f"{part} belongs to another user, and everybody may write to it: anybody could put code there",
                hint=f"`chmod o-w {part}`, or KERNELHUB_CACHE names a folder of your own.",
            )
        if part == root:
            return


# Small files of ours


def contents(path: Path) -> bytes:
    """The bytes of a file. Raises `OSError`, also for what is no file."""
    with open_file(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """A small file of ours; one that is not there or not readable counts as not written."""
    try:
        raw = json.loads(contents(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def write_json(path: Path, value: Mapping[str, Any], *, must: bool = False) -> None:
    """Write a small file of ours, as `write_file` does."""
    write_file(path, canonical_json(value), must=must)


def write_file(path: Path, data: bytes, *, must: bool = False) -> None:
    """Write a small file of ours. A store that cannot be written does without, unless it `must`."""
    beside = beside_of(path, "tmp")
    try:
        for tries_left in (1, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            try:
                beside.replace(path)
                break
            except FileNotFoundError:  # somebody who prunes took it for what a killed process left
                if not tries_left:
                    raise
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if must:
            raise


# Folders


def inside(root: Path, pattern: str) -> list[Path]:
    """What the pattern names, sorted, without what links in the folder lead to: that is not ours to remove."""
    top = root.resolve()
    return [path for path in sorted(root.glob(pattern)) if path.parent.resolve() == top / path.parent.relative_to(root)]


def beside_of(folder: Path, suffix: str) -> Path:
    """A name in the same place that no reader looks at."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.{suffix}")


def target_of(beside: Path) -> Path:
    """What a name of `beside_of` is beside of."""
    return beside.with_name(beside.name[1:].rsplit(".", 2)[0])


def rename_aside(folder: Path) -> None:
    folder.rename(beside_of(folder, "bad"))


def replace_folder(new: Path, folder: Path) -> None:
    """Rename a folder to where another may be, which is removed then: between two renames there is none."""
    old = beside_of(folder, "old")
    there = folder.exists()
    if there:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if there:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_read_only(folder: Path) -> None:
    """Take write permission from everything in a folder, and from the folder."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            Path(parent, name).chmod(stat.S_IREAD | stat.S_IRGRP | stat.S_IROTH)
        Path(parent).chmod(0o555)


def remove(path: Path) -> int:
    """Remove a file, a link or a folder; the bytes that it held."""
    if path.is_symlink():
        path.unlink()
        return 0
    return remove_tree(path)


def remove_tree(folder: Path) -> int:
    """Remove a folder, read-only or not, or a file; the bytes that it held. Nothing there is nothing to do."""
    if not folder.is_symlink() and not folder.is_dir():
        try:
            size = folder.stat().st_size
            folder.unlink()
        except FileNotFoundError:  # gone, perhaps a moment ago
            return 0
        return size
    size = 0
    for parent, _, files in os.walk(folder):
        Path(parent).chmod(0o755)
        for name in files:
            path = Path(parent, name)
            size += path.lstat().st_size
            if os.name == "nt":
                path.chmod(stat.S_IWRITE)
    shutil.rmtree(folder)
    return size
