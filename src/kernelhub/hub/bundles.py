"""Bundles: kernels in one file, for machines without a network. `bundling.py` makes them, `unbundling.py` installs them.

A bundle is a tar in a zstd frame, as archives of variants are (`archive.py`), of

```
bundle.json                                   {"bundle": 1}; first, so that another format is told at once
kernels.lock                                  what is in it: each kernel, and those that it depends on
<org>/<name>/commits/<commit>.json            manifests with their signatures, as a hub in a folder has them
revocations/<key id>.json                     lists of the keys that signed
blobs/sha256/<2 hex>/<64 hex>                 archives that the manifests name: all of them, or those for one machine
```

A kernel from a hub without manifests is given one, whose `origin` says which hub and commit it came from. Nothing in a
bundle says who may run: see `sources/bundle.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.manifest import Manifest, ManifestDocument, RefFile
from kernelhub.core.refs import RepoId
from kernelhub.errors import IntegrityError, InvalidMetadata, InvalidReference, StoreError, context
from kernelhub.hub.addresses import BUNDLES
from kernelhub.hub.files import LocalFiles
from kernelhub.hub.sources.base import BENCHMARKS, SOURCE, UNAVAILABLE, Progress
from kernelhub.hub.sources.bundle import BundleSource
from kernelhub.hub.sources.project import EMBEDDED_ORG
from kernelhub.hub.store import Store
from kernelhub.hub.store_files import locked, read_json, remove_tree, write_json
from kernelhub.hub.verify import verify

FORMAT = 1
FIRST = "bundle.json"

# Where a bundle is unpacked, and the refs that are to be written when all else is there.
STAGING = ".install-"
_REFS = ".refs.json"


@dataclass(frozen=True)
class BundledKernel:
    """A kernel of a bundle: its entry in the lock, its manifest's commit, and the variants that are there."""

    locked: LockedKernel
    commit: str
    variants: tuple[str, ...]


def check(folder: Path, lock: LockFile, progress: Progress) -> list[BundledKernel]:
    """That what lies in a folder, as bundles have it, is what a lock names; every archive is unpacked and hashed."""
    source = BundleSource(str(folder), str)
    documents = {}
    for path in sorted(folder.glob("*/*/commits/*.json")):
        repo = repo_named("/".join(path.parts[-4:-2]))
        documents[repo, path.stem] = source.document(repo, path.stem)
    kernels, unnamed = [], set(documents)
    for kernel in lock.kernels:
        if kernel.repo.org == EMBEDDED_ORG:
            continue
        commit = next(
            (
                commit
                for (repo, commit), document in documents.items()
                if repo == kernel.repo and kernel.commit in (commit, _origin(document.manifest))
            ),
            None,
        )
        if commit is None:
            raise IntegrityError(f"the lock names {kernel} at {kernel.commit}, and the bundle does not have it")
        unnamed.discard((kernel.repo, commit))
        with context(str(kernel)):
            kernels.append(BundledKernel(kernel, commit, _check_kernel(source, kernel, commit, progress)))
    if unnamed:
        names = ", ".join(f"{repo}@{commit}" for repo, commit in sorted(unnamed))
        raise IntegrityError(f"the bundle has what its lock does not name: {names}")
    return kernels


def _check_kernel(source: BundleSource, kernel: LockedKernel, commit: str, progress: Progress) -> tuple[str, ...]:
    """The variants that are there, each unpacked and hashed."""
    listing, there = source.listing(kernel.repo, commit), []
    for name, details in sorted(listing.variants.items()):
        if UNAVAILABLE in details:
            continue
        with tempfile.TemporaryDirectory(dir=source.url) as folder, context(name):
            source.fetch(kernel.repo, commit, name, details, Path(folder), progress)
            digest = verify(Path(folder)).digest.text
            expected = kernel.variants.get(name, digest)
            if expected.startswith("sha256-") and expected != digest:
                raise IntegrityError(f"it has the digest {digest}, the lock says {expected}")
        there.append(name)
    for part in (SOURCE, BENCHMARKS):
        if part in listing.parts:
            with tempfile.TemporaryDirectory(dir=source.url) as folder, context(part):
                source.fetch_part(kernel.repo, commit, part, listing.parts[part], Path(folder), progress)
    return tuple(there)


# Keeping house


def installed(store: Store) -> list[tuple[RepoId, str, str]]:
    """What bundles brought: repository, version or revision, commit."""
    settle(store)
    folder = store.root / BUNDLES
    source = BundleSource(str(folder), str)
    repos = [repo_named("/".join(path.parts[-3:-1])) for path in sorted(folder.glob("*/*/commits/"))]
    return [(repo, name, commit) for repo in repos for name, commit in sorted(source.refs(repo).items())]


def remove(store: Store, repos: Iterable[RepoId]) -> int:
    """Take out what bundles brought of these repositories, and the archives that no other needs; the bytes freed."""
    freed = 0
    with changing(store) as folder:
        for repo in repos:
            freed += remove_tree(folder / repo.org / repo.name)
            freed += remove_tree(store.root / "kernels" / BUNDLES / f"{repo.org}--{repo.name}")
        needed: set[str] = set()
        for path in folder.glob("*/*/commits/*.json"):
            manifest = ManifestDocument.parse(path.read_bytes()).manifest
            needed |= {item.archive for item in manifest.variants.values()}
            needed |= {item for item in (manifest.source, manifest.benchmarks, manifest.card) if item}
        for blob in folder.glob("blobs/sha256/*/*"):
            if blob.name not in needed:
                freed += remove_tree(blob)
    return freed


# Inside


def _origin(manifest: Manifest) -> str | None:
    """The commit that a manifest which a bundle was given stands for."""
    origin = manifest.raw.get("origin")
    commit = origin.get("commit") if isinstance(origin, dict) else None
    return commit if isinstance(commit, str) else None


def repo_named(text: str) -> RepoId:
    """The repository that a path in a bundle names. Raises `InvalidMetadata` where it names none."""
    try:
        return RepoId.parse(text)
    except InvalidReference as error:
        raise InvalidMetadata(error.message) from error


@contextmanager
def changing(store: Store) -> Iterator[Path]:
    """The folder of what is installed, which one process at a time changes.

    What a process that was killed had begun is ended first. Raises `StoreError` where the folder cannot be written.
    """
    folder = store.root / BUNDLES
    with locked(store.root, folder):
        if folder.is_dir():
            _end(folder)
            for left in folder.glob(f"{STAGING}*"):
                remove_tree(left)
        yield folder


def settle(store: Store) -> None:
    """End what a killed process had begun, before anybody reads half of it. A store that cannot be written stays as it is."""
    if (store.root / BUNDLES / _REFS).exists():
        with suppress(StoreError), changing(store):
            pass


def tidy(store: Store) -> int:
    """Remove what killed processes left of bundles; the bytes freed."""
    left = (path.stat().st_size for path in (store.root / BUNDLES).glob(f"{STAGING}*/**/*") if path.is_file())
    freed = sum(left)
    if freed:
        with changing(store):
            pass
    settle(store)
    return freed


def set_refs(folder: Path, refs: Mapping[str, str]) -> None:
    """Have refs (paths in the folder) name these commits: all of them, also where this is interrupted."""
    try:
        write_json(folder / _REFS, refs, must=True)
        _end(folder)
    except KeyboardInterrupt:
        _end(folder)
        raise


def _end(folder: Path) -> None:
    """Write the refs that were to be written."""
    for path, commit in read_json(folder / _REFS).items():
        LocalFiles(folder).replace(path, RefFile.parse(commit).to_bytes())
    (folder / _REFS).unlink(missing_ok=True)
