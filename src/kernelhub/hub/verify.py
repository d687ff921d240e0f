"""A folder is what was published, or there is an error that names each file that is not.

Run when a variant arrives and each time a process loads it. Hashing is what it costs: about 30 us for a small file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kernelhub.core.canonical import b64
from kernelhub.core.digest import NOT_COVERED, Digest
from kernelhub.core.metadata import Metadata
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.errors import IntegrityError, InvalidMetadata, Violation

METADATA = "metadata.json"

# Files from this size on are worth a stamp; below it reading costs about what asking for the times does.
LARGE = 1 << 20

# inode, size, ctime and mtime in nanoseconds: the file has not been written since it had these.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Verified:
    """A variant's folder whose every file is what `digest` says."""

    path: Path
    metadata: Metadata
    digest: Digest

    @property
    def compiled(self) -> bool:
        """Whether machine code is in it."""
        return any(name.endswith((".so", ".pyd", ".dylib", ".dll")) for name in self.digest.files)


@dataclass(frozen=True)
class Known:
    """What the store learnt of a folder when it was fetched: every file's sha256, and the stamps of large ones."""

    files: Mapping[str, str]
    stamps: Mapping[str, Stamp]


def verify(folder: Path, known: Known | None = None, *, rehash: bool = False) -> Verified:
    """Check every file of a variant's folder.

    A digest in the metadata decides; without one, what is `known` from the fetch; without that (the user's own folder)
    the files are what they are. `rehash` disregards stamps. Raises `IntegrityError`, or `InvalidMetadata` where there is
    no metadata.json that can be read.
    """
    entries = scan(folder)
    if METADATA not in entries:
        raise InvalidMetadata(f"{folder} has no {METADATA}", hint="Every build variant of a kernel needs one.")
    text = _read(folder / METADATA)
    metadata = Metadata.parse(text)
    if known and known.files.get(METADATA) != _sha256(text):
        raise IntegrityError(f"{folder} is not what was fetched", [Violation("different", METADATA)])
    expected = metadata.digest or (Digest("sha256", _covered(known.files)) if known else None)
    algorithm = expected.algorithm if expected else "sha256"
    fresh = {} if rehash or not known or not expected else _unchanged(entries, known)
    actual = {
        path: expected.files[path]
        if expected and path in fresh and path in expected.files
        else _hash(folder / path, algorithm)
        for path in entries
        if path not in NOT_COVERED
    }
    digest = expected or Digest(algorithm, actual)
    if violations := digest.violations(actual):
        raise IntegrityError(f"{folder} is not what was published", violations)
    return Verified(folder, metadata, digest)


def verify_tree(folder: Path, known: Known) -> None:
    """Check every file of a folder that is no variant (a source tree) against what is `known` from the fetch.

    Raises `IntegrityError`.
    """
    actual = {path: _hash(folder / path, "sha256") for path in scan(folder)}
    found = [Violation("missing", path) for path in known.files if path not in actual]
    found += [Violation("unknown", path) for path in actual if path not in known.files]
    found += [Violation("different", path) for path, value in actual.items() if known.files.get(path, value) != value]
    if found:
        raise IntegrityError(f"{folder} is not what was fetched", sorted(found, key=lambda item: item.path))


def learn(folder: Path) -> Known:
    """What to remember of a folder that has just been verified."""
    entries = scan(folder)
    return Known({path: _hash(folder / path, "sha256") for path in entries}, stamps(entries))


def stamps(entries: Mapping[str, os.stat_result]) -> dict[str, Stamp]:
    """The stamps of the large files."""
    return {path: _stamp(stat) for path, stat in entries.items() if stat.st_size >= LARGE}


def scan(folder: Path) -> dict[str, os.stat_result]:
    """The files of a folder, sorted, by relative path. Links to folders, and what is no plain file, are refused.

    A link to a file is read through: what counts is the bytes, and other tools' caches consist of such links.
    """
    found: dict[str, os.stat_result] = {}
    bad: list[Violation] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:  # noqa: PTH118 - a Path costs as much as the stat
            for entry in entries:
                path = prefix + entry.name
                if is_bytecode(path):
                    bad.append(Violation("bytecode", path))
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(path + "/")
                elif (status := _status(entry)) is not None:
                    found[path] = status
                else:
                    bad.append(Violation("unknown", f"{path} (neither a file nor a folder)"))
    if bad:
        raise IntegrityError(f"{folder} has what no kernel may have", sorted(bad, key=lambda item: item.path))
    return {safe_path(path): found[path] for path in sorted(found)}


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """A file's; None for what is none, as a link that leads to itself."""
    try:
        return entry.stat() if entry.is_file() else None
    except OSError:
        return None


def _covered(files: Mapping[str, str]) -> dict[str, str]:
    return {path: value for path, value in files.items() if path not in NOT_COVERED}


def _unchanged(entries: Mapping[str, os.stat_result], known: Known) -> set[str]:
    return {path for path, stamp in known.stamps.items() if path in entries and _stamp(entries[path]) == tuple(stamp)}


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_size, stat.st_ctime_ns, stat.st_mtime_ns


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - twice as fast as Path.open, and there are hundreds of files
        return file.read()


def _sha256(data: bytes) -> str:
    return b64(hashlib.sha256(data).digest())


def _hash(path: Path, algorithm: str) -> str:
    state = hashlib.new(algorithm)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see _read
        while chunk := file.read(LARGE):
            state.update(chunk)
    return b64(state.digest())
