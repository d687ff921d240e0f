"""Small kernels, written to folders, and a source that keeps them in memory and counts what it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.digest import Digest
from kernelhub.core.refs import Pin, RepoId
from kernelhub.core.trust import Origin
from kernelhub.errors import KernelNotFound, RepositoryNotFound
from kernelhub.hub.sources.base import Listing, Progress

CODE = "def double(x):\n    return x + x\n"


def kernel_files(
    code: str | Mapping[str, str] = CODE, *, name: str = "small", digest: bool = True, **metadata: Any
) -> dict[str, bytes]:
    """The files of a variant. `code` is the text of `__init__.py`, or of several files; `metadata` overrides keys."""
    sources = {"__init__.py": code} if isinstance(code, str) else code
    files = {path: text.encode() for path, text in sources.items()}
    value: dict[str, Any] = {
        "name": name,
        "id": f"_{name}_cpu_{sha256_hex(repr(sorted(files.items())).encode())[:8]}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    if digest:
        value["digest"] = Digest.of(files).to_json()
    value.update({key.replace("_", "-"): item for key, item in metadata.items()})
    return {**files, "metadata.json": json.dumps(value).encode()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files below `folder`."""
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def write_kernel(repository: Path, variant: str = "torch-cpu", **kernel: Any) -> Path:
    """Write a kernel repository with one variant; the repository's folder."""
    write_files(repository / "build" / variant, kernel_files(**kernel))
    return repository


@dataclass
class MemorySource:
    """A remote hub in memory: `kernels` maps a repository to its variants' files. Counts what it is asked in `asked`.

    `fault`, where it is set, is called with each question's name first, and may raise.
    """

    kernels: dict[str, dict[str, dict[str, bytes]]]
    name: str = "https://memory.test"
    key: str = "memory"
    origin: Origin = Origin.REMOTE
    trusted: bool | None = True
    asked: list[str] = field(default_factory=list)
    fault: Callable[[str], None] | None = None
    commit_of: dict[str, str] = field(default_factory=dict)

    def commit(self, repo: str) -> str:
        """The commit that `main` and `v1` of the repository have now."""
        text = repr(sorted((variant, sorted(files.items())) for variant, files in self.kernels[repo].items()))
        return self.commit_of.get(repo, sha256_hex(text.encode())[:40])

    def check(self) -> None:
        if self.fault is not None:
            self.fault("check")

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        self._asked("resolve")
        refs = self._refs(repo)
        if str(pin) in refs.values():
            return str(pin)
        if str(pin) not in refs:
            raise KernelNotFound(f"{repo} has no {pin}")
        return refs[str(pin)]

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        self._asked("refs")
        return self._refs(repo)

    def listing(self, repo: RepoId, commit: str) -> Listing:
        self._asked("listing")
        self._refs(repo)
        return Listing({name: {"files": len(files)} for name, files in self.kernels[str(repo)].items()})

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        self._asked("metadata")
        return self.kernels[str(repo)][variant]["metadata.json"]

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        self._asked("publisher_trusted")
        return self.trusted

    def revocations(self, key_id: str) -> bytes | None:
        return None

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        self._asked("fetch")
        write_files(folder, self.kernels[str(repo)][variant])

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def _refs(self, repo: RepoId) -> dict[str, str]:
        if str(repo) not in self.kernels:
            raise RepositoryNotFound(f"{self.name} has no {repo}")
        return dict.fromkeys(("main", "v1"), self.commit(str(repo)))

    def _asked(self, question: str) -> None:
        self.asked.append(question)
        if self.fault is not None:
            self.fault(question)
