"""What a server of kernels has: repositories, their commits, and the files of each.

The folder that is served holds either kernel repositories, `<org>/<name>/build/<variant>/`, or is a hub's folder with a
`hub.json`; both are `Repositories` to the server.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.manifest import ManifestDocument, RefFile, parse_hub_file
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.core.refs import RepoId, Version
from kernelhub.errors import IntegrityError, InvalidMetadata
from kernelhub.hub.archive import unpack

CHUNK = 256 * 1024
_LFS_SIZE = 1024 * 1024  # files from this size on are listed with their sha256, as LFS files are


@dataclass(frozen=True)
class File:
    """A file that is served: where it lies, its size, its git hash, and its SHA-256 where it is listed as LFS."""

    path: Path
    size: int
    oid: str
    sha256: str | None
    modified: int

    @classmethod
    def of(cls, path: Path) -> File:
        """Read and hash the file."""
        stat = path.stat()
        large = stat.st_size >= _LFS_SIZE
        git = hashlib.sha1(b"blob %d\0" % stat.st_size, usedforsecurity=False)
        sha = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                git.update(chunk)
                if large:
                    sha.update(chunk)
        return cls(path, stat.st_size, git.hexdigest(), sha.hexdigest() if large else None, stat.st_mtime_ns)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def unchanged(self) -> bool:
        """Whether the file on disk is still the one that was hashed."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)

    def to_json(self, path: str) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return row


Files = Mapping[str, File]


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit. `variants` maps each variant's folder to a function that gives its files by path.

    Which variants there are is known without reading them; `top` are the files outside `build`. `quick` says that
    the functions do not touch the disk.
    """

    commit: str
    variants: Mapping[str, Callable[[], Files]] = field(hash=False)
    top: Files = field(default_factory=dict, hash=False)
    quick: bool = False

    def below(self, path: str) -> Files:
        """The files at or below a path, and perhaps others: only the variants that it touches are read."""
        parts = path.split("/")
        if parts[0] == "build" and len(parts) > 1:
            return self.variants[parts[1]]() if parts[1] in self.variants else {}
        return self.all

    def file(self, path: str) -> File | None:
        return self.top.get(path) or (self.below(path).get(path) if path.startswith("build/") else None)

    @cached_property
    def all(self) -> Files:
        return {**self.top, **{path: file for files in self.variants.values() for path, file in files().items()}}


class Repositories(Protocol):
    """What a folder holds. Used by several threads."""

    def has_org(self, org: str) -> bool:
        """Whether there is a publisher of this name."""

    def refs(self, repo: RepoId) -> Mapping[str, str] | None:
        """The branches with their commits; None where there is no such repository."""

    def snapshot(self, repo: RepoId, commit: str) -> Snapshot | None:
        """The repository at a commit that `refs` gave or gives; None where there is no such commit."""

    def known(self, repo: RepoId, commit: str) -> Snapshot | None:
        """The repository at a commit, where it was read before: answers at once."""


class RepositoryFolders:
    """`<root>/<org>/<name>/build/<variant>/`: each repository has one commit, made of its content.

    The commit is on `main` and on the branch of each version that a variant's metadata names. When files change, the
    commit does; of an older one, files that are gone or altered are not served.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known: dict[tuple[RepoId, str], Snapshot] = {}
        self._latest: dict[RepoId, tuple[frozenset[tuple[str, int, int]], str, tuple[str, ...]]] = {}

    def has_org(self, org: str) -> bool:
        return (self._root / org).is_dir()

    def refs(self, repo: RepoId) -> Mapping[str, str] | None:
        folder = self._root / repo.org / repo.name
        if not folder.is_dir():
            return None
        with self._lock:
            stamps = frozenset(_stamps(folder))
            if repo not in self._latest or self._latest[repo][0] != stamps:
                snapshot = _snapshot(folder, [path for path, _, _ in stamps])
                self._known[repo, snapshot.commit] = snapshot
                self._latest[repo] = (stamps, snapshot.commit, _versions(snapshot))
            _, commit, branches = self._latest[repo]
        return dict.fromkeys(("main", *branches), commit)

    def snapshot(self, repo: RepoId, commit: str) -> Snapshot | None:
        if (repo, commit) not in self._known:
            self.refs(repo)
        return self.known(repo, commit)

    def known(self, repo: RepoId, commit: str) -> Snapshot | None:
        return self._known.get((repo, commit))


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of every file that is served: no links, no compiled Python, nothing like `.git`."""
    for child in folder.iterdir():
        if child.name.startswith(".") or child.is_symlink():
            continue
        for path in child.rglob("*") if child.is_dir() else (child,):
            name = path.relative_to(folder).as_posix()
            if _is_safe(name) and not is_bytecode(name) and not path.is_symlink() and path.is_file():
                stat = path.stat()
                yield name, stat.st_size, stat.st_mtime_ns


def _is_safe(name: str) -> bool:
    try:
        safe_path(name)
    except InvalidMetadata:
        return False
    return True


def _snapshot(folder: Path, names: list[str]) -> Snapshot:
    files = {name: File.of(folder / name) for name in sorted(names)}
    commit = sha256_hex(canonical_json({name: file.etag for name, file in files.items()}))[:40]
    groups: dict[str, dict[str, File]] = {}
    top: dict[str, File] = {}
    for name, file in files.items():
        parts = name.split("/")
        (groups.setdefault(parts[1], {}) if parts[0] == "build" and len(parts) > 2 else top)[name] = file
    return Snapshot(commit, {variant: _always(group) for variant, group in groups.items()}, top, quick=True)


def _always(files: Files) -> Callable[[], Files]:
    return lambda: files


def _versions(snapshot: Snapshot) -> tuple[str, ...]:
    """The branches of the versions that the variants' metadata name; a malformed one names none."""
    found = set()
    for variant in snapshot.variants:
        metadata = snapshot.file(f"build/{variant}/metadata.json")
        try:
            value = json.loads(metadata.path.read_bytes()) if metadata else None
            version = value.get("version") if isinstance(value, dict) else None
            if isinstance(version, int):
                found.add(Version.parse(f"v{version}"))
        except (ValueError, OSError):
            continue
    return tuple(str(version) for version in sorted(found))


class HubFolder:
    """A hub's folder: refs, manifests and archives. An archive is checked and unpacked when a file of it is asked for.

    Unpacked files live in a temporary folder that goes with this object. A ref that was yanked is not served.
    """

    def __init__(self, root: Path) -> None:
        parse_hub_file((root / "hub.json").read_bytes())
        self._root = root
        self._unpacked = tempfile.TemporaryDirectory(prefix="kernelhub-serve-")
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str], Files] = {}
        self._known: dict[tuple[RepoId, str], Snapshot] = {}

    def has_org(self, org: str) -> bool:
        return (self._root / org).is_dir()

    def refs(self, repo: RepoId) -> Mapping[str, str] | None:
        folder = self._root / repo.org / repo.name / "refs"
        if not folder.is_dir():
            return None
        refs = {
            path.relative_to(folder).as_posix(): RefFile.parse(path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        found = {name: ref.commit for name, ref in refs.items() if ref.yanked is None}
        versions = sorted(Version.parse(name) for name in found if re.fullmatch(r"v(0|[1-9][0-9]{0,8})", name))
        if versions:
            found.setdefault("main", found[str(versions[-1])])  # clients take for granted that there is one
        return found

    def snapshot(self, repo: RepoId, commit: str) -> Snapshot | None:
        if (repo, commit) in self._known:
            return self._known[repo, commit]
        path = self._root / repo.org / repo.name / "commits" / f"{commit}.json"
        if not path.is_file():
            return None
        manifest = ManifestDocument.parse(path.read_bytes()).checked(repo, commit).manifest
        variants = {
            name: partial(self._variant, name, variant.archive)
            for name, variant in manifest.variants.items()
            if _is_safe(name) and "/" not in name
        }
        card = self._blob(manifest.card) if manifest.card else None
        top = {"README.md": File.of(card)} if card and card.is_file() else {}
        snapshot = self._known[repo, commit] = Snapshot(commit, variants, top)
        return snapshot

    def known(self, repo: RepoId, commit: str) -> Snapshot | None:
        return self._known.get((repo, commit))

    def _variant(self, name: str, archive: str) -> Files:
        with self._lock:
            if (name, archive) not in self._files:
                blob, folder = self._blob(archive), Path(self._unpacked.name) / archive / name
                if _sha256(blob) != archive:
                    raise IntegrityError(f"{blob} is not what its name says")
                shutil.rmtree(folder, ignore_errors=True)  # half of it, where unpacking failed before
                folder.mkdir(parents=True)
                with blob.open("rb") as stream:
                    unpack(stream, folder)
                self._files[name, archive] = {
                    f"build/{name}/{path.relative_to(folder).as_posix()}": File.of(path)
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                }
            return self._files[name, archive]

    def _blob(self, sha256: str) -> Path:
        return self._root / "blobs" / "sha256" / sha256[:2] / sha256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def repositories(folder: Path) -> Repositories:
    """What a folder holds: a hub where it has a `hub.json`, else kernel repositories."""
    return HubFolder(folder) if (folder / "hub.json").is_file() else RepositoryFolders(folder)
