"""`kernels.lock`: which commit and which bytes of each kernel a project uses.

Written in one format, read in three: this one, and the two of the `kernels` package (a list of
`{repo_id, sha, variants}`, and a list of `{dependency, lock: {commit}}`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelhub.core.canonical import canonical_json
from kernelhub.core.refs import RepoId, Version, is_commit
from kernelhub.errors import InvalidMetadata, InvalidReference, KernelNotFound

LAYOUT = 1


@dataclass(frozen=True)
class LockedKernel:
    """A kernel in a lock: its commit, and for each variant the digest that it must have.

    `variants` maps a variant's name to `Digest.text` (or to the hash text of another package's lock). `hub` is where it
    came from; None where the file does not say.
    """

    repo: RepoId
    commit: str
    version: Version | None = None
    hub: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict, hash=False)
    depends: tuple[RepoId, ...] = ()


@dataclass(frozen=True)
class LockFile:
    """All kernels of a project, dependencies included."""

    kernels: tuple[LockedKernel, ...] = ()

    def find(self, repo: RepoId) -> LockedKernel:
        """The kernel's first entry. Raises `KernelNotFound`, which names those that there are."""
        for kernel in self.kernels:
            if kernel.repo == repo:
                return kernel
        names = ", ".join(str(kernel.repo) for kernel in self.kernels) or "none"
        raise KernelNotFound(f"{repo} is not in the lock file (there: {names})", hint="Add it with `kernelhub lock`.")

    @classmethod
    def parse(cls, data: bytes | str) -> LockFile:
        """Read a lock file of any of the three formats. Raises `InvalidMetadata`."""
        try:
            raw = json.loads(data)
            canonical_json(raw)  # refuses NaN and lone surrogates, which Python reads and JSON does not have
        except (ValueError, RecursionError) as error:
            raise InvalidMetadata(f"the lock file is not JSON: {error}") from error
        try:
            return cls(tuple(_kernel(item) for item in _entries(raw)))
        except KeyError as error:
            raise InvalidMetadata(f"the lock file is malformed: an entry has no {error}") from error
        except InvalidReference as error:
            raise InvalidMetadata(f"the lock file is malformed: {error.message}") from error

    def to_text(self) -> str:
        """The file's text, sorted: the same kernels always give the same bytes."""
        kernels = [_to_json(kernel) for kernel in sorted(self.kernels, key=_by_name)]
        return json.dumps({"lock": LAYOUT, "kernels": kernels}, indent=2, ensure_ascii=False) + "\n"


def _entries(raw: Any) -> list[Any]:
    if isinstance(raw, list):
        return raw
    if not isinstance(raw, dict) or raw.get("lock") != LAYOUT:
        found = raw.get("lock") if isinstance(raw, dict) else type(raw).__name__
        raise InvalidMetadata(f'the lock file is malformed: expected a list or {{"lock": {LAYOUT}}}, got {found!r}')
    kernels = raw["kernels"]
    if not isinstance(kernels, list):
        raise InvalidMetadata("the lock file is malformed: kernels is not a list")
    return kernels


def _kernel(item: Any) -> LockedKernel:
    item = _object(item, "a kernel")
    if "repo" in item:
        hub, depends = item.get("hub"), item.get("depends") or []
        if not isinstance(depends, list):
            raise InvalidMetadata(f"the lock file is malformed: depends: expected a list, got {depends!r}")
        return LockedKernel(
            _repo(item["repo"]),
            _commit(item["commit"]),
            _version(item.get("version")),
            None if hub is None else _string(hub, "a hub"),
            {name: _string(value["digest"], "a digest") for name, value in _objects(item.get("variants"))},
            tuple(map(_repo, depends)),
        )
    if "repo_id" in item:
        variants = {
            name: f"{_string(value['hash_type'], 'a type of hash')}:{_string(value['hash'], 'a hash')}"
            for name, value in _objects(item["variants"])
        }
        return LockedKernel(_repo(item["repo_id"]), _commit(item["sha"]), variants=variants)
    dependency, lock = _object(item["dependency"], "a dependency"), _object(item["lock"], "a lock")
    repo = dependency["repo_id" if "repo_id" in dependency else "repo-id"]
    return LockedKernel(_repo(repo), _commit(lock["commit"]), _version(dependency.get("version")))


def _by_name(kernel: LockedKernel) -> tuple[RepoId, int, str]:
    return kernel.repo, kernel.version.number if kernel.version else -1, kernel.commit


def _to_json(kernel: LockedKernel) -> dict[str, Any]:
    return {
        "repo": str(kernel.repo),
        "hub": kernel.hub,
        "version": kernel.version.number if kernel.version else None,
        "commit": kernel.commit,
        "variants": {name: {"digest": digest} for name, digest in sorted(kernel.variants.items())},
        "depends": [str(repo) for repo in sorted(kernel.depends)],
    }


def _commit(value: Any) -> str:
    if not isinstance(value, str) or not is_commit(value):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not a commit (40 hex digits)")
    return value


def _version(value: Any) -> Version | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not a version (a whole number)")
    return Version.parse(f"v{value}")


def _repo(value: Any) -> RepoId:
    return RepoId.parse(_string(value, "a repository"))


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not {what}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidMetadata(f"the lock file is malformed: {value!r} is not {what} (an object)")
    return value


def _objects(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The variants of an entry, by name; none where it has none."""
    entries = {} if value is None else _object(value, "a table of variants")
    return [(name, _object(entry, "a variant")) for name, entry in entries.items()]
