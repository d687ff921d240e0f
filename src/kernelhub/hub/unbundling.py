"""Installing a bundle: every byte of it is looked at with distrust before anything of it is found."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from kernelhub.core.lockfile import MAX_BYTES as MAX_LOCK
from kernelhub.core.lockfile import NAME as LOCK
from kernelhub.core.lockfile import LockFile
from kernelhub.core.manifest import MAX_BYTES as MAX_MANIFEST
from kernelhub.core.manifest import ManifestDocument, RefFile, hub_file
from kernelhub.core.reading import json_object
from kernelhub.core.refs import RepoId
from kernelhub.core.revocations import MAX_BYTES as MAX_REVOCATIONS
from kernelhub.core.revocations import RevocationsDocument, path_of
from kernelhub.core.signatures import PublicKey
from kernelhub.errors import IntegrityError, InvalidMetadata, InvalidReference, context
from kernelhub.hub.addresses import BUNDLES
from kernelhub.hub.archive import Limits, entries
from kernelhub.hub.bundles import FIRST, FORMAT, STAGING, BundledKernel, changing, check, repo_named, set_refs
from kernelhub.hub.files import LocalFiles
from kernelhub.hub.resolve import kept_of
from kernelhub.hub.revocations import RevocationLists, checked
from kernelhub.hub.signing import merged
from kernelhub.hub.sources.base import NoProgress, Progress
from kernelhub.hub.sources.bundle import BundleSource
from kernelhub.hub.sources.layout import blob_path
from kernelhub.hub.sources.project import EMBEDDED_ORG
from kernelhub.hub.store import Store

_MANIFEST = re.compile(r"([^/]+/[^/]+)/commits/([0-9a-f]{40})\.json", re.ASCII)
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})", re.ASCII)
_REVOCATIONS = re.compile(r"revocations/([0-9a-f]{32})\.json", re.ASCII)

# What is in a bundle is compressed already, but for manifests: more than this is a bomb.
_LIMITS = Limits(files=200_000, bytes=1 << 40, ratio=30)

_MAX_PART = 256 * 1024 * 1024  # bytes of a packed source tree, whose size no manifest says
_SMALL = 64 * 1024


def install(
    path: Path,
    store: Store,
    *,
    keys: Iterable[PublicKey] = (),
    accept_older: bool = False,
    progress: Progress | None = None,
) -> tuple[LockFile, list[BundledKernel]]:
    """Check all of a bundle, and add it to those that are installed in the store; all of it, or nothing.

    Revocation lists are taken of the `keys`, which are those that the user trusts. Nothing is imported, and nothing is
    trusted because of it. Raises `IntegrityError` or `InvalidMetadata` for what is not as bundles are, `InvalidReference`
    where there is no such file or a version would become an older one, and `StoreError`.
    """
    keys = list(keys)
    with context(str(path)), _opened(path) as file, changing(store) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder) as name:
            staging = Path(name)
            received = _receive(file, LocalFiles(staging))
            lists = _right_lists(received.revocations, keys)
            kernels = check(staging, received.lock, progress or NoProgress())
            if not accept_older:
                _check_forward(LocalFiles(folder), kernels, received.documents)
            _add_revocations(LocalFiles(folder), lists, store)  # first: nothing is found that they take back
            _add(LocalFiles(folder), staging, received, kernels, store, keys)
    return received.lock, kernels


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InvalidReference("there is no such file") from None
    except OSError as error:  # a folder, or somebody else's: nothing is wrong with the store
        raise InvalidReference(f"it cannot be read: {error.strerror or error}") from error


@dataclass
class _Received:
    """What was read of a bundle. `sizes` has the archives that manifests name, with their sizes where these say so."""

    lock: LockFile = field(default_factory=LockFile)
    documents: dict[tuple[RepoId, str], ManifestDocument] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    revocations: dict[str, bytes] = field(default_factory=dict)


def _receive(file: BinaryIO, staging: LocalFiles) -> _Received:
    """Read a bundle into an empty folder: each file is what its name says before the next is looked at."""
    found, has_lock = _Received(), False
    for number, (path, contents) in enumerate(entries(file, _LIMITS)):
        with context(path):
            if number == 0:
                _check_first(path, contents)
            elif path == LOCK:
                found.lock, has_lock = LockFile.parse(_read(contents, MAX_LOCK)), True
            elif match := _MANIFEST.fullmatch(path):
                _receive_manifest(found, repo_named(match[1]), match[2], _read(contents, MAX_MANIFEST), staging)
            elif match := _BLOB.fullmatch(path):
                _receive_blob(found, match[2], contents, staging)
            elif match := _REVOCATIONS.fullmatch(path):
                found.revocations[match[1]] = _read(contents, MAX_REVOCATIONS)
            else:
                raise IntegrityError("no bundle has such a file")
    if not has_lock:
        raise IntegrityError(f"the bundle has no {LOCK}")
    return found


def _check_first(path: str, contents: Iterator[bytes]) -> None:
    if path != FIRST:
        raise IntegrityError("it is not a bundle: those begin with bundle.json")
    form = json_object(_read(contents, _SMALL), FIRST, _SMALL).get("bundle")
    if isinstance(form, bool) or form != FORMAT:
        newer = isinstance(form, int) and form > FORMAT
        raise InvalidMetadata(
            f"bundle: expected {FORMAT}, got {form!r:.80}",
            hint="A newer kernelhub made it: pip install --upgrade kernelhub" if newer else None,
        )


def _receive_manifest(found: _Received, repo: RepoId, commit: str, data: bytes, staging: LocalFiles) -> None:
    if repo.org == EMBEDDED_ORG:
        raise IntegrityError(f"{repo} is part of kernelhub, and comes from nowhere else")
    document = ManifestDocument.parse(data).checked(repo, commit)
    manifest = document.manifest
    found.documents[repo, commit] = document
    for part in (manifest.source, manifest.benchmarks, manifest.card):
        if part:
            found.sizes.setdefault(part, None)
    for variant in manifest.variants.values():
        if found.sizes.setdefault(variant.archive, variant.size) not in (None, variant.size):
            raise IntegrityError(f"the archive {variant.archive} has two sizes")
        found.sizes[variant.archive] = variant.size
    staging.create(f"{repo}/commits/{commit}.json", data)


def _receive_blob(found: _Received, sha256: str, contents: Iterator[bytes], staging: LocalFiles) -> None:
    if sha256 not in found.sizes:
        raise IntegrityError("no manifest before it names this archive")
    size = found.sizes[sha256]
    limit = _MAX_PART if size is None else size
    target = staging.root.joinpath(*blob_path(sha256).split("/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    state, count = hashlib.sha256(), 0
    with target.open("xb") as file:
        for data in contents:
            count += len(data)
            if count > limit:
                raise IntegrityError(f"the archive has more than {limit:,} bytes")
            state.update(data)
            file.write(data)
    if state.hexdigest() != sha256 or size not in (None, count):
        raise IntegrityError("the archive is not what its name says")


def _check_forward(
    folder: LocalFiles, kernels: Sequence[BundledKernel], documents: Mapping[tuple[RepoId, str], ManifestDocument]
) -> None:
    """Raises `InvalidReference` where a version that is installed would become one that was published before it."""
    source = BundleSource(str(folder.root), str)
    for kernel in kernels:
        repo, pin = kernel.locked.repo, kernel.locked.pin
        data = folder.read(f"{repo}/refs/{pin.ref}", _SMALL) if pin else None
        known = RefFile.parse(data).commit if data else kernel.commit
        if known == kernel.commit:
            continue
        was, now = source.manifest(repo, known).time, documents[repo, kernel.commit].manifest.time
        if now < was:
            raise InvalidReference(
                f"{repo}@{pin} is {known} of {was} here, and the bundle's is {kernel.commit} of {now}",
                hint="To go back: kernelhub bundle install --accept-older",
            )


def _add(
    folder: LocalFiles,
    staging: Path,
    received: _Received,
    kernels: Sequence[BundledKernel],
    store: Store,
    keys: Sequence[PublicKey],
) -> None:
    """Move what was checked to where it is found: archives, then manifests, then refs. No reader sees half of it."""
    folder.create("hub.json", hub_file())
    for blob in sorted(staging.glob("blobs/sha256/*/*")):
        target = folder.root / blob.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.replace(target)
    source = BundleSource(str(folder.root), str)
    for (repo, commit), document in received.documents.items():
        path = f"{repo}/commits/{commit}.json"
        if (data := folder.read(path, MAX_MANIFEST)) is not None:
            document = merged(ManifestDocument.parse(data), document, keys)
        folder.replace(path, document.to_bytes())
        listing = source.listing(repo, commit)  # what the store kept of it may have had fewer archives
        store.set_document(BUNDLES, document, keys)
        store.set_listing(BUNDLES, repo, commit, {**kept_of(listing), "manifest": True})
    refs = {}
    for kernel in kernels:
        locked = kernel.locked
        for name in {locked.commit, *([locked.pin.ref] if locked.pin else [])} - {kernel.commit}:
            refs[f"{locked.repo}/refs/{name}"] = kernel.commit
    set_refs(folder.root, refs)


def _right_lists(lists: Mapping[str, bytes], keys: Iterable[PublicKey]) -> dict[PublicKey, RevocationsDocument]:
    """The lists of the keys. Of others nobody can tell whether they are right. Raises `IntegrityError` for a wrong one."""
    found = {}
    for key in keys:
        if key.id in lists:
            with context(path_of(key.id)):
                found[key] = checked(lists[key.id], key)
    return found


def _add_revocations(folder: LocalFiles, lists: Mapping[PublicKey, RevocationsDocument], store: Store) -> None:
    """Have the lists count with all that the store knows of the keys; the newest of each stays as it is, for other bundles."""
    known = RevocationLists(store, time.time, warnings.warn)
    for key, document in lists.items():
        known.keep(key, document, must=True)
        data = folder.read(path_of(key.id), MAX_REVOCATIONS)
        if data is None or RevocationsDocument.parse(data, key.id).revocations.number < document.revocations.number:
            folder.replace(path_of(key.id), document.to_bytes())


def _read(contents: Iterator[bytes], limit: int) -> bytes:
    """A small file of a bundle."""
    found = bytearray()
    for data in contents:
        found += data
        if len(found) > limit:
            raise InvalidMetadata(f"it has more than {limit:,} bytes")
    return bytes(found)
