"""Bundles: kernels in one file, for machines without a network. Made from hubs, and taken apart with distrust.

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

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kernelhub.core.lockfile import MAX_BYTES as MAX_LOCK
from kernelhub.core.lockfile import NAME as LOCK
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.manifest import MAX_BYTES as MAX_MANIFEST
from kernelhub.core.manifest import Manifest, ManifestDocument, ManifestVariant, RefFile, hub_file
from kernelhub.core.reading import json_object
from kernelhub.core.refs import RepoId
from kernelhub.core.revocations import MAX_BYTES as MAX_REVOCATIONS
from kernelhub.core.revocations import RevocationsDocument, is_key_id, path_of
from kernelhub.core.signatures import MAX_SIGNATURES, PublicKey
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelNotFound,
    NoCompatibleVariant,
    context,
)
from kernelhub.hub.addresses import BUNDLES
from kernelhub.hub.archive import Limits, entries, pack
from kernelhub.hub.declared import declared_layers
from kernelhub.hub.disk import writing
from kernelhub.hub.files import LocalFiles
from kernelhub.hub.locks import roots
from kernelhub.hub.request import Found
from kernelhub.hub.resolve import kept_of
from kernelhub.hub.sources.base import BENCHMARKS, SOURCE, UNAVAILABLE, NoProgress, Progress
from kernelhub.hub.sources.bundle import BundleSource
from kernelhub.hub.sources.deferred import Deferred
from kernelhub.hub.sources.layout import LayoutSource, blob_path
from kernelhub.hub.sources.project import EMBEDDED_ORG
from kernelhub.hub.store import ELSEWHERE, Store, remove_tree
from kernelhub.hub.verify import Verified, scan, verify

if TYPE_CHECKING:
    from kernelhub.hub.client import Hub, Trust

FORMAT = 1
_FIRST = "bundle.json"

_MANIFEST = re.compile(r"([^/]+/[^/]+)/commits/([0-9a-f]{40})\.json", re.ASCII)
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})", re.ASCII)
_REVOCATIONS = re.compile(r"revocations/([0-9a-f]{32})\.json", re.ASCII)

# What is in a bundle is compressed already, but for manifests: more than this is a bomb.
_LIMITS = Limits(files=200_000, bytes=1 << 40, ratio=30)

_MAX_PART = 256 * 1024 * 1024  # bytes of a packed source tree, whose size no manifest says
_MAX_FILE = 8 * 1024**3 - 1  # what a tar's header can say
_CHUNK = 1024 * 1024
_SMALL = 64 * 1024


@dataclass(frozen=True)
class BundledKernel:
    """A kernel of a bundle: its entry in the lock, its manifest's commit, and the variants that are there."""

    locked: LockedKernel
    commit: str
    variants: tuple[str, ...]


# Making


def create(
    hub: Hub,
    path: Path,
    lock: LockFile,
    *,
    time: str,
    all_variants: bool = False,
    trust_remote_code: Trust = False,
) -> list[BundledKernel]:
    """Write a bundle of a lock's kernels: of each the variant for this machine, or all that the lock names.

    Kernels inside this package are left out: each installation has its own. `time` is what manifests that are made here
    say. Raises what `Hub.gather` raises, `KernelNotFound` for a lock with nothing to bundle, and `StoreError` where the
    file cannot be written; nothing is left then.
    """
    kernels = [kernel for kernel in lock.kernels if kernel.repo.org != EMBEDDED_ORG]
    if not kernels:
        raise KernelNotFound("there is nothing to bundle", hint="The kernels inside this package are there without.")
    needed = {(kernel.repo, kernel.commit) for kernel in roots(lock)}
    with (
        writing(path, "Is its folder there, and the disk not full?"),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name,
    ):
        staging = LocalFiles(Path(name, "hub"))
        for kernel in kernels:
            try:
                found, variants = hub.gather(
                    kernel, lock, all_variants=all_variants, trust_remote_code=trust_remote_code
                )
            except NoCompatibleVariant:
                if (kernel.repo, kernel.commit) in needed:
                    raise
                continue  # what only another machine's variant depends on
            with context(f"while bundling {kernel}"):
                _stage(hub, staging, kernel, found, variants, time, all_variants=all_variants)
        bundled = [kernel for kernel in kernels if (staging.root / kernel.repo.org / kernel.repo.name).is_dir()]
        made = _check(staging.root, LockFile(tuple(bundled)), hub.progress)
        staging.create(LOCK, LockFile(tuple(bundled)).to_text().encode())
        staging.create(_FIRST, json.dumps({"bundle": FORMAT}).encode() + b"\n")
        beside = Path(name, "bundle")
        with beside.open("xb") as file:
            _pack(staging.root, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    return made


def _stage(
    hub: Hub,
    staging: LocalFiles,
    kernel: LockedKernel,
    found: Found,
    variants: Sequence[Verified],
    time: str,
    *,
    all_variants: bool,
) -> None:
    """Write a kernel's manifest and archives into a folder, as a hub has them."""
    source = found.source.source if isinstance(found.source, Deferred) else found.source
    if not isinstance(source, LayoutSource):
        document = ManifestDocument(_made_manifest(staging, kernel, found, variants, time))
    else:
        document = hub.store.document(source.key, found.repo, found.commit) or source.document(found.repo, found.commit)
        manifest = document.manifest
        wanted = [
            (manifest.variants[item.path.name].archive, manifest.variants[item.path.name].size) for item in variants
        ]
        parts = [manifest.source, manifest.benchmarks] if all_variants else [None if variants else manifest.source]
        for sha256, size in [*wanted, *((part, None) for part in parts if part)]:
            _copy(source, sha256, size, staging, hub.progress)
        for key in {item.key for item in document.signatures if is_key_id(item.key)}:
            if (data := source.revocations(key)) is not None:
                staging.replace(path_of(key), data)
    staging.replace(f"{found.repo}/commits/{document.manifest.commit}.json", document.to_bytes())


def _made_manifest(
    staging: LocalFiles, kernel: LockedKernel, found: Found, variants: Sequence[Verified], time: str
) -> Manifest:
    """A manifest for what came from a hub that has none."""
    if not variants:
        raise KernelNotFound(f"{found.source.name} has no build of {found.repo} that could be bundled")
    rows = {}
    for item in variants:
        contents = {path: (item.path / path).read_bytes() for path in scan(item.path)}
        archive = pack(contents)
        sha256 = hashlib.sha256(archive).hexdigest()
        staging.create(blob_path(sha256), archive)
        layers = declared_layers(contents)
        rows[item.path.name] = ManifestVariant(sha256, len(archive), contents["metadata.json"].decode(), layers)
    version = kernel.version.number if kernel.version else variants[0].metadata.version
    origin = {"hub": found.source.name, "commit": kernel.commit}
    return Manifest(found.repo, version, None, time, rows, raw={"origin": origin})


def _copy(source: LayoutSource, sha256: str, size: int | None, staging: LocalFiles, progress: Progress) -> None:
    target = staging.root.joinpath(*blob_path(sha256).split("/"))
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb+") as file:
        source.download_archive(sha256, size, file, progress)


def _pack(folder: Path, file: BinaryIO) -> None:
    """The files of a folder as a bundle, never more than a piece of one in memory."""
    import zstandard

    names = sorted((path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), key=_order)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with compressor.stream_writer(file, closefd=False) as out:
        for name in names:
            path = folder / name
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, 0o644
            if info.size > _MAX_FILE:
                raise InvalidReference(f"{name} has {info.size:,} bytes, more than a bundle can hold of one file")
            out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
            with path.open("rb") as data:
                shutil.copyfileobj(data, out, _CHUNK)
            out.write(b"\0" * (-info.size % tarfile.BLOCKSIZE))
        out.write(b"\0" * (2 * tarfile.BLOCKSIZE))


def _order(name: str) -> tuple[int, str]:
    """First what says what it is, then what names archives, then the archives."""
    return (0 if name == _FIRST else 2 if name.startswith("blobs/") else 1), name


# Installing


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
    folder = store.root / BUNDLES
    with context(str(path)), writing(folder, ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder), tempfile.TemporaryDirectory(prefix=".install-", dir=folder) as name:
            staging = Path(name)
            with _opened(path) as file:
                received = _receive(file, LocalFiles(staging))
            kernels = _check(staging, received.lock, progress or NoProgress())
            if not accept_older:
                _check_forward(LocalFiles(folder), kernels, received.documents)
            _add(LocalFiles(folder), staging, received, kernels, store)
            _add_revocations(LocalFiles(folder), received.revocations, keys)
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
                _receive_manifest(found, _repo(match[1]), match[2], _read(contents, MAX_MANIFEST), staging)
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
    if path != _FIRST:
        raise IntegrityError("it is not a bundle: those begin with bundle.json")
    form = json_object(_read(contents, _SMALL), _FIRST, _SMALL).get("bundle")
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


def _check(folder: Path, lock: LockFile, progress: Progress) -> list[BundledKernel]:
    """That what lies in a folder, as bundles have it, is what a lock names; every archive is unpacked and hashed."""
    source = BundleSource(str(folder), str)
    documents = {}
    for path in sorted(folder.glob("*/*/commits/*.json")):
        repo = _repo("/".join(path.parts[-4:-2]))
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
    folder: LocalFiles, staging: Path, received: _Received, kernels: Sequence[BundledKernel], store: Store
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
            here = ManifestDocument.parse(data).signatures
            more = tuple(item for item in here if item not in document.signatures)
            document = replace(document, signatures=(*document.signatures, *more)[:MAX_SIGNATURES])
        folder.replace(path, document.to_bytes())
        listing = source.listing(repo, commit)  # what the store kept of it may have had fewer archives
        store.set_document(BUNDLES, document)
        store.set_listing(BUNDLES, repo, commit, {**kept_of(listing), "manifest": True})
    for kernel in kernels:
        locked, ref = kernel.locked, RefFile(kernel.commit).to_bytes()
        for name in {locked.commit, *([locked.pin.ref] if locked.pin else [])} - {kernel.commit}:
            folder.replace(f"{locked.repo}/refs/{name}", ref)


def _add_revocations(folder: LocalFiles, lists: Mapping[str, bytes], keys: Iterable[PublicKey]) -> None:
    """Keep the lists of the keys, where they are right and newer. Of others nobody can tell whether they are right."""
    from kernelhub.hub.signing import right_signers

    for key in keys:
        if key.id not in lists:
            continue
        path = path_of(key.id)
        with context(path):
            document = RevocationsDocument.parse(lists[key.id], key.id)
            if not right_signers(document.revocations.payload, document.signatures, [key]):
                raise IntegrityError(f"the revocation list is not signed by its key {key.id}")
        data = folder.read(path, MAX_REVOCATIONS)
        if data is None or RevocationsDocument.parse(data, key.id).revocations.number < document.revocations.number:
            folder.replace(path, document.to_bytes())


# Keeping house


def installed(store: Store) -> list[tuple[RepoId, str, str]]:
    """What bundles brought: repository, version or revision, commit."""
    folder = store.root / BUNDLES
    source = BundleSource(str(folder), str)
    repos = [_repo("/".join(path.parts[-3:-1])) for path in sorted(folder.glob("*/*/commits/"))]
    return [(repo, name, commit) for repo in repos for name, commit in sorted(source.refs(repo).items())]


def remove(store: Store, repos: Iterable[RepoId]) -> int:
    """Take out what bundles brought of these repositories, and the archives that no other needs; the bytes freed."""
    folder, freed = store.root / BUNDLES, 0
    if not folder.is_dir():
        return 0
    with writing(folder, ELSEWHERE), _locked(folder):
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


def _repo(text: str) -> RepoId:
    try:
        return RepoId.parse(text)
    except InvalidReference as error:
        raise InvalidMetadata(error.message) from error


def _read(contents: Iterator[bytes], limit: int) -> bytes:
    """A small file of a bundle."""
    found = bytearray()
    for data in contents:
        found += data
        if len(found) > limit:
            raise InvalidMetadata(f"it has more than {limit:,} bytes")
    return bytes(found)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time changes what is installed."""
    from filelock import FileLock

    with FileLock(folder / ".lock"):
        yield
