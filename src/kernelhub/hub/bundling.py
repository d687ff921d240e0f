"""Making a bundle: from a hub's kernels to one file, checked as it will be where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kernelhub.core.lockfile import NAME as LOCK
from kernelhub.core.lockfile import LockedKernel, LockFile
from kernelhub.core.manifest import Manifest, ManifestDocument, ManifestVariant
from kernelhub.core.revocations import is_key_id, path_of
from kernelhub.errors import InvalidReference, KernelNotFound, NoCompatibleVariant, context
from kernelhub.hub.archive import pack
from kernelhub.hub.bundles import FIRST, FORMAT, BundledKernel, check
from kernelhub.hub.declared import declared_layers
from kernelhub.hub.disk import writing
from kernelhub.hub.files import LocalFiles
from kernelhub.hub.locks import roots
from kernelhub.hub.request import Found
from kernelhub.hub.sources.base import Progress
from kernelhub.hub.sources.deferred import Deferred
from kernelhub.hub.sources.layout import LayoutSource, blob_path
from kernelhub.hub.sources.project import EMBEDDED_ORG
from kernelhub.hub.verify import Verified, scan

if TYPE_CHECKING:
    from kernelhub.hub.client import Hub, Trust

_MAX_FILE = 8 * 1024**3 - 1  # what a tar's header can say
_CHUNK = 1024 * 1024


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
        made = check(staging.root, LockFile(tuple(bundled)), hub.progress)
        staging.create(LOCK, LockFile(tuple(bundled)).to_text().encode())
        staging.create(FIRST, json.dumps({"bundle": FORMAT}).encode() + b"\n")
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
    return (0 if name == FIRST else 2 if name.startswith("blobs/") else 1), name
