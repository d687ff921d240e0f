"""What another tool left in the Hugging Face cache, as a source that needs no network.

The layout, as huggingface_hub writes it for `repo_type="kernel"`:

```
<cache>/kernels--<org>--<name>/refs/<ref>                              a commit
                              /snapshots/<commit>/build/<variant>/...  links into blobs/, or plain files on Windows
                              /blobs/<git or LFS hash>
```

A variant is copied out of it and each file checked against the hash that its blob is named by. That finds altered
files; a file that was never downloaded is found by the variant's own digest, so one without a digest may be incomplete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernelhub.core.metadata import MAX_BYTES, Metadata
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.core.refs import Pin, RepoId, Revision, Version, is_commit, is_revision
from kernelhub.core.trust import Origin
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    KernelNotFound,
    RepositoryNotFound,
    Violation,
)
from kernelhub.hub.disk import writing
from kernelhub.hub.sources.base import Listing, Progress

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_CHUNK = 1024 * 1024


def default_cache() -> Path:
    """The folder that huggingface_hub caches in (`HF_HUB_CACHE`, `HF_HOME`)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@dataclass(frozen=True)
class HuggingFaceCacheSource:
    """The Hugging Face cache in `root` (default: huggingface_hub's). It says nothing of who published a kernel, so the user has to trust it."""

    root: Path = field(default_factory=default_cache)

    @property
    def name(self) -> str:
        return f"the Hugging Face cache in {self.root}"

    @property
    def key(self) -> str:
        return f"huggingface-cache-{hashlib.sha256(os.fsencode(self.root.absolute())).hexdigest()[:8]}"

    @property
    def origin(self) -> Origin:
        return Origin.CACHE

    def check(self) -> None:
        """Nothing to ask: a cache that is not there has no kernels."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        """The commit of a version or revision, where its files are here.

        The tools that fill the cache fetch a version by its commit and keep no ref of it. So a version without a ref is
        the newest snapshot whose metadata names it, which may be older than what the hub has.
        """
        commits = self._commits(repo)
        named = pin.commit if isinstance(pin, Revision) else None
        commit = named or self.refs(repo).get(pin.ref, "")
        if commit in commits:
            return commit
        if isinstance(pin, Version):
            for newest in commits:
                if any(version == pin.number for version in self._versions(repo, newest)):
                    return newest
        raise KernelNotFound(f"{repo} is in {self.name}, but not {pin}")

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        """The branches and tags that the cache has a note of, as they were when somebody asked for them by name."""
        folder = self._repo(repo) / "refs"
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and is_revision(name):
                commit = path.read_text(errors="replace")[:100].strip()
                if not is_commit(commit):
                    raise InvalidMetadata(f"{path}: expected a commit of 40 hex digits, got {commit!r}")
                found[name] = commit
        return found

    def listing(self, repo: RepoId, commit: str) -> Listing:
        build = self._snapshot(repo, commit) / "build"
        names = [path.name for path in build.iterdir() if path.is_dir()] if build.is_dir() else []
        return Listing({name: {} for name in sorted(names)})

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        return None

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return None

    def revocations(self, key_id: str) -> bytes | None:
        return None

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        """Copy the variant's files. Raises `IntegrityError` for one that is altered or leads out of the cache."""
        source = self._snapshot(repo, commit) / "build" / safe_path(variant)
        files = {name: self._inside(source / name) for name in sorted(_files(source))}
        bytecode = [Violation("bytecode", name) for name in files if is_bytecode(name)]
        if bytecode:
            raise IntegrityError(f"{source} contains compiled Python, which nobody can read", bytecode)
        for name in files:
            safe_path(name)
        progress.expect(sum(path.stat().st_size for path in files.values()))
        for name, path in files.items():
            _copy(path, folder / name)
            if not _is_what_it_is_named(folder / name, path.name):
                raise IntegrityError(
                    f"{source} is altered", [Violation("different", name)], hint=f"Delete {self._repo(repo)}."
                )
            progress.advance(path.stat().st_size)

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        raise KernelNotFound(f"{self.name} has no {part} of {repo}")

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def _repo(self, repo: RepoId) -> Path:
        return self.root / f"kernels--{repo.org}--{repo.name}"

    def _snapshot(self, repo: RepoId, commit: str) -> Path:
        path = self._repo(repo) / "snapshots" / commit
        if not is_commit(commit) or not path.is_dir():
            raise KernelNotFound(f"{repo} is not in {self.name} at {commit}")
        return path

    def _commits(self, repo: RepoId) -> list[str]:
        """The commits of which there are files, the newest download first."""
        folder = self._repo(repo) / "snapshots"
        if not folder.is_dir():
            raise RepositoryNotFound(f"{repo} is not in {self.name}")
        found = [path for path in folder.iterdir() if is_commit(path.name) and (path / "build").is_dir()]
        return [path.name for path in sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))]

    def _versions(self, repo: RepoId, commit: str) -> Iterator[int]:
        for path in sorted(self._snapshot(repo, commit).glob("build/*/metadata.json")):
            try:
                inside = self._inside(path)
                if inside.stat().st_size <= MAX_BYTES:
                    yield Metadata.parse(inside.read_bytes()).version
            except (InvalidMetadata, IntegrityError, OSError):
                continue  # what is malformed names no version; if it is asked for by commit, loading says what is wrong

    def _inside(self, path: Path) -> Path:
        """The regular file that a path in a snapshot stands for, which must lie in the cache."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:  # a link that leads to itself
            raise IntegrityError(f"{path} leads to no file") from error
        if not real.is_file() or not real.is_relative_to(self.root.resolve()):
            raise IntegrityError(f"{path} leads to {real}, which is not a file in {self.name}")
        return real


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of the files below a folder; a link to a folder is not followed and counts as a file."""
    waiting = [""]
    while waiting:
        above = waiting.pop()
        for entry in os.scandir(folder / above):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{above}{entry.name}/")
            else:
                yield f"{above}{entry.name}"


def _copy(source: Path, target: Path) -> None:
    with writing(f"{target} (a copy of {source})"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target, follow_symlinks=False)


def _is_what_it_is_named(path: Path, name: str) -> bool:
    """Whether a file has the git hash or the SHA-256 that its blob's name is; a plain name says nothing."""
    if not _BLOB.fullmatch(name):
        return True
    header = b"blob %d\0" % path.stat().st_size
    digest = hashlib.sha1(header, usedforsecurity=False) if len(name) == 40 else hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == name
