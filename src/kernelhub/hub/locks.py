"""Locks: made of what a project names, found again, and compared with what was fetched."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelhub.core.lockfile import NAME, LockedKernel, LockFile, dependencies_of
from kernelhub.core.refs import KernelRef, Revision
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelCycle,
    KernelHubWarning,
    Yanked,
    context,
)
from kernelhub.hub.disk import writing
from kernelhub.hub.verify import scan
from kernelhub.warning import warn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from kernelhub.hub.client import Hub, Trust

# Where a lock lies in an installed distribution's metadata: as setuptools writes it, and as hatchling does.
_IN_METADATA = (NAME, f"extra_metadata/{NAME}")

# A hash over a variant's files by their git and LFS hashes, of locks that the `kernels` package wrote before 0.15.
_GIT_LFS = "git_lfs_concat:sha256-"

# How many files may be tried both ways where it is not known which were in LFS: 2^12 hashes of some KiB take 10 ms.
_MAX_UNKNOWN = 12

_BINARIES = (".so", ".pyd", ".dll", ".dylib", ".a", ".lib", ".cubin", ".hsaco", ".metallib")


# Making


def project_dependencies(project: Path) -> tuple[KernelRef, ...]:
    """The kernels that a project's pyproject.toml names. Raises `InvalidReference` where it names none."""
    path = project / "pyproject.toml"
    with context(str(path)):
        found = dependencies_of(_pyproject(path))
        if not found:
            raise InvalidReference(
                "it names no kernels",
                hint='Expected a table [tool.kernelhub.dependencies] with lines such as "org/name" = 1.',
            )
        return found


def make_lock(
    hub: Hub, wanted: Sequence[KernelRef], *, trust_remote_code: Trust = False, before: LockFile | None = None
) -> LockFile:
    """The lock of these kernels and of those that any of their variants depends on, as the hubs are now.

    A version that was withdrawn stays where it was locked `before`, with a warning. Raises `KernelCycle`, and what
    `Hub.lock` raises.
    """
    found: dict[KernelRef, LockedKernel] = {}

    def visit(ref: KernelRef, above: tuple[KernelRef, ...]) -> None:
        if ref in above:
            raise KernelCycle([str(item) for item in (*above[above.index(ref) :], ref)])
        if ref in found:
            return
        try:
            kernel, depends = hub.lock(ref, trust_remote_code=trust_remote_code)
        except Yanked as error:
            locked = _locked_before(before, ref)
            if locked is None or locked.commit != error.commit:
                raise
            warn(f"{error.message}\n  It was locked before, and stays.", KernelHubWarning)
            _, depends = hub.lock(KernelRef(ref.repo, Revision(error.commit)), trust_remote_code=trust_remote_code)
            kernel = locked
        for item in depends:
            visit(item, (*above, ref))
        found[ref] = kernel

    for ref in wanted:
        visit(ref, ())
    return LockFile(tuple(found.values()))


def roots(lock: LockFile) -> list[LockedKernel]:
    """The kernels that no other of the lock depends on."""
    needed = {repo for kernel in lock.kernels for repo in kernel.depends}
    return [kernel for kernel in lock.kernels if not needed & {kernel.repo, kernel.asked}]


def write_lock(path: Path, lock: LockFile) -> None:
    """Write a lock file, whole or not at all. Raises `StoreError` where it cannot be written."""
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        beside = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(lock.to_text())
            beside.chmod(0o644)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _locked_before(before: LockFile | None, ref: KernelRef) -> LockedKernel | None:
    kernels = before.kernels if before else ()
    return next((item for item in kernels if (item.asked or item.repo, item.pin) == (ref.repo, ref.pin)), None)


def _pyproject(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidReference(f"cannot read it: {error.strerror}", hint="Name the project's folder.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidReference(f"it is not TOML: {error}") from error


# Packing and finding


def lock_to_package(project: Path, carried: Path | None = None) -> Path | None:
    """The lock that belongs into a project's package; None for a project that names no kernels.

    `carried` is where an unpacked source distribution has it; the project's own comes first. Raises `InvalidReference`
    where there is none, `InvalidMetadata` where it cannot be read, and `KernelNotFound` where it lacks a kernel that the
    project names.
    """
    pyproject = project / "pyproject.toml"
    if not pyproject.is_file():
        return None
    with context(str(pyproject)):
        wanted = dependencies_of(_pyproject(pyproject))
    if not wanted:
        return None
    path = next((path for path in (project / NAME, carried) if path and path.is_file()), None)
    if path is None:
        raise InvalidReference(f"{project} names kernels and has no {NAME}", hint="Make it with `kernelhub lock`.")
    from kernelhub.hub.client import read_lock

    lock = read_lock(path)
    with context(str(path)):
        lock.check_covers(wanted)
    return path


def package_lock(package: str | ModuleType) -> LockFile:
    """The lock that an installed project brings in its metadata.

    `package` is the distribution's name, or a module of it or that module's name (`__name__`). Nothing is imported.
    Raises `InvalidReference` where no installed distribution of this name has a lock, or several have.
    """
    name = package.__name__ if isinstance(package, ModuleType) else package
    if not isinstance(name, str) or not name.strip():
        raise InvalidReference(
            f"{package!r} is neither a module nor a name", hint="Such as package=__name__, or a distribution's name."
        )
    locks: dict[str, str] = {}
    asked: list[str] = []
    for distribution in itertools.chain(_distribution(name), _distributions_with(name.partition(".")[0])):
        asked.append(distribution.name)
        if (text := _lock_text(distribution)) is not None:
            locks[distribution.name] = text
            if distribution.name == name:  # the distribution itself was named
                break
    if len(set(locks.values())) > 1:
        raise InvalidReference(
            f"{name} comes from {' and '.join(sorted(locks))}, and each has a {NAME}",
            hint="Name the distribution: package=...",
        )
    if not locks:
        what = (
            f"none of {', '.join(dict.fromkeys(asked))} has" if asked else "no installed distribution of that name has"
        )
        raise InvalidReference(
            f"{name}: {what} a {NAME} in its metadata",
            hint="Lock the project (`kernelhub lock`), build it with the hook for hatchling or setuptools and install it; "
            "or pass lockfile=.",
        )
    distribution_name, text = next(iter(locks.items()))
    with context(f"{NAME} of {distribution_name}"):
        return LockFile.parse(text)


def _distribution(name: str) -> list[Distribution]:
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return [importlib.metadata.distribution(name)]
    return []


def _distributions_with(module: str) -> Iterator[Distribution]:
    """The installed distributions that the top-level module is part of."""
    for name in sorted(set(_modules_of(tuple(sys.path)).get(module, ()))):
        yield from _distribution(name)


@functools.cache
def _modules_of(path: tuple[str, ...]) -> Mapping[str, list[str]]:  # noqa: ARG001 - what is installed depends on it
    """Which distributions each top-level module is part of. Reads what all of them list: 0.7 s for 150."""
    return importlib.metadata.packages_distributions()


def _lock_text(distribution: Distribution) -> str | None:
    try:
        return next((text for path in _IN_METADATA if (text := distribution.read_text(path)) is not None), None)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidMetadata(f"the {NAME} of {distribution.name} cannot be read: {error}") from error


# Comparing with other packages' hashes


def check_hash(folder: Path, variant: str, expected: str) -> None:
    """Whether a variant's folder has the hash that a lock of the `kernels` package names: over all of its files in
    order, each the path and then git's hash of the file, or its SHA-256 where it was in LFS.

    Which were is not known here: binaries first, then every other way there is. Raises `IntegrityError`, or
    `InvalidMetadata` for a kind of hash that is not known.
    """
    kind, _, wanted = expected.partition("sha256-")
    if f"{kind}sha256-" != _GIT_LFS:
        raise InvalidMetadata(
            f"the lock file has a hash of {variant} of a kind that is not known here: {expected!r:.80}"
        )
    rows = []
    for path in sorted(scan(folder), key=str.encode):
        data = (folder / path).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()
        rows.append((path, git, hashlib.sha256(data).digest(), len(data)))
    for in_lfs in _in_lfs([(path, size) for path, _, _, size in rows]):
        state = hashlib.sha256()
        for path, git, sha256, _ in rows:
            state.update(path.encode())
            state.update(sha256 if path in in_lfs else git)
        if state.hexdigest() == wanted:
            return
    raise IntegrityError(f"{variant} has not the hash that the lock file says: {expected}")


def _in_lfs(files: Sequence[tuple[str, int]]) -> Iterator[frozenset[str]]:
    """Which files may have been in LFS: the binaries; or none; or any of the largest."""
    binaries = frozenset(path for path, _ in files if path.endswith(_BINARIES))
    yield binaries
    largest = [path for path, _ in sorted(files, key=lambda item: -item[1])][:_MAX_UNKNOWN]
    for count in range(len(largest) + 1):
        yield from map(frozenset, itertools.combinations(largest, count))
