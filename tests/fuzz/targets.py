"""What is fuzzed: each parser of bytes from elsewhere, with files to begin from, and what it may raise.

A target takes bytes and returns; whatever it raises is a bug, for what is documented it does not let through.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from kernelhub.core.canonical import canonical_json
from kernelhub.core.lockfile import LockFile
from kernelhub.core.manifest import ManifestDocument, RefFile, parse_hub_file
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import RepoId, Version
from kernelhub.core.revocations import RevocationsDocument
from kernelhub.errors import IntegrityError, InvalidMetadata, KernelHubError, KernelNotFound
from kernelhub.hub.archive import pack, pack_tar, read, unpack
from kernelhub.hub.sources.base import Moved
from kernelhub.hub.sources.huggingface import HuggingFaceSource, _plan, read_redirect

__all__ = ["TARGETS", "Target", "read"]

REPO = RepoId("org", "relu")
COMMIT, HASH, KEY = "0123456789abcdef0123456789abcdef01234567", "ab" * 32, "cd" * 16
TIME = "2025-11-21T20:00:00Z"

METADATA: dict[str, Any] = {
    "name": "relu",
    "id": "_relu_cuda_1234567",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": ["einops"],
    "kernel-depends": [{"repo-id": "org/other", "version": 1}, {"repo-id": "org/third", "revision": "main"}],
    "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]},
    "digest": {"algorithm": "sha256", "files": {"__init__.py": "A" * 43 + "="}},
    "upstream": "https://example.org/relu",
}
VARIANT = {
    "archive": HASH,
    "size": 1234,
    "metadata": json.dumps(METADATA),
    "layers": {"Relu": {"can_torch_compile": True, "has_backward": False, "forward": "(self, x)"}},
}
MANIFEST = {
    "manifest": {
        "layout": 1,
        "repo": "org/relu",
        "parent": COMMIT,
        "time": TIME,
        "version": 1,
        "variants": {"torch-cpu": VARIANT},
        "files": {"CARD.md": HASH},
    },
    "signatures": [],
}
LISTED = {"layout": 1, "key": KEY, "number": 3, "time": TIME, "keys": {KEY: "lost"}, "commits": {COMMIT: "wrong"}}
REVOKED = {"revocations": LISTED, "signatures": []}
LOCK = [
    {
        "repo_id": "org/relu",
        "sha": COMMIT,
        "variants": {"torch-cpu": {"hash": f"sha256-{HASH}", "hash_type": "git_lfs_concat"}},
    }
]
TREE = [
    {"type": "directory", "path": "build/torch-cpu/more", "oid": COMMIT},
    {"type": "file", "path": "build/torch-cpu/__init__.py", "oid": COMMIT, "size": 12},
    {"type": "file", "path": "build/torch-cpu/a.so", "oid": COMMIT, "size": 9, "lfs": {"oid": HASH, "size": 9}},
]
REFS = {"branches": [{"name": "v1", "targetCommit": COMMIT}], "tags": [{"name": "t/1", "targetCommit": COMMIT}]}
CONFIG = {"schema_version": 1, "kernel_mapping": {"Norm": "org/relu@v1:Norm"}, "use_local_kernel": False}
ROW = {"path": "norm", "class_name": "Norm", "layer_name": "RMSNorm", "device": "cpu", "mode": "INFERENCE"}
REPORT = {"schema_version": 1, "model": "Llama", "rows": [{**ROW, "outcome": "kernel", "calls": 2}], "notes": ["x"]}
FILES = {"a/b.py": b"hello", "c" * 120: b"x" * 600, "é.txt": b""}


@dataclass(frozen=True)
class Target:
    """`run` reads one input; `seeds` are such inputs. `text`: they are JSON or other text, to be changed as such."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    text: bool = True


@contextmanager
def documented(*errors: type[Exception]) -> Iterator[None]:
    """What a parser may raise."""
    with suppress(*errors):
        yield


class _Said:
    """In place of a hub's client: every question has one answer."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def get_json(self, target: str, **_: Any) -> tuple[Any, str | None]:
        try:
            return json.loads(self.data), None
        except (ValueError, RecursionError) as error:
            raise InvalidMetadata(f"not JSON: {error}") from error

    def get(self, target: str, **_: Any) -> Any:
        raise KernelNotFound(target)


class _Source(HuggingFaceSource):
    @property
    def _http(self) -> Any:
        return self.__dict__["said"]


def _source(data: bytes) -> _Source:
    source = _Source("https://hub.example", lambda: "fuzz")
    source.__dict__["said"] = _Said(data)
    return source


def metadata(data: bytes) -> None:
    with documented(InvalidMetadata):
        found = Metadata.parse(data)
        assert Metadata.parse(found.to_text()) == found


def manifest(data: bytes) -> None:
    with documented(InvalidMetadata, IntegrityError):
        document = ManifestDocument.parse(data)
        assert ManifestDocument.parse(document.to_bytes()) == document
    with documented(InvalidMetadata):
        RefFile.parse(data)
    with documented(InvalidMetadata):
        parse_hub_file(data)


def revocations(data: bytes) -> None:
    with documented(InvalidMetadata, IntegrityError):
        RevocationsDocument.parse(data, KEY)


def lock(data: bytes) -> None:
    with documented(InvalidMetadata):
        LockFile.parse(data)


def archive(data: bytes) -> None:
    """As it is; and, because few changed frames are frames, as what is in one."""
    for packed in (data, zstandard.compress(data, 1)):
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top, "a", "b")
            folder.mkdir(parents=True)
            with documented(InvalidMetadata, IntegrityError):
                unpack(packed, folder)
            found = [path for path in Path(top).rglob("*") if folder not in path.parents]
            assert sorted(found) == [folder.parent, folder], found
            assert not [path for path in folder.rglob("*") if path.is_symlink()]


def tree(data: bytes) -> None:
    """The tree of a variant: whatever it lists, what would be written lies in its folder."""
    source, folder = _source(data), Path("/store/variant")
    with documented(InvalidMetadata, IntegrityError):
        for file in _plan(source._tree("/tree"), "build/torch-cpu/"):
            assert folder in (folder / file.path).parents
            assert ".." not in Path(file.path).parts
            assert file.size >= 0


def hub(data: bytes) -> None:
    """The other answers of a hub."""
    source = _source(data)
    for question in (
        lambda: source.refs(REPO),
        lambda: source.resolve(REPO, Version(1)),
        lambda: source.listing(REPO, COMMIT),
        lambda: source.publisher_trusted(REPO),
    ):
        with documented(InvalidMetadata, IntegrityError, KernelNotFound, Moved):
            question()
    with documented(InvalidMetadata):
        read_redirect(data)


def config(data: bytes) -> None:
    from kernelhub.config import document

    with documented(InvalidMetadata):
        document.from_json(document.parse_text(data), document.Grants())


def report(data: bytes) -> None:
    from kernelhub.layers.report_values import KernelReport

    with documented(KernelHubError):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        KernelReport.from_dict(value)


def _json(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


TARGETS = {
    "metadata": Target(metadata, _json(METADATA)),
    "manifest": Target(
        manifest, (*_json(MANIFEST), canonical_json(MANIFEST), f"{COMMIT}\nyanked: it is bad\n".encode())
    ),
    "archive": Target(archive, (pack(FILES), pack_tar(FILES)), text=False),
    "tree": Target(tree, _json(TREE)),
    "hub": Target(
        hub, (*_json(REFS, TREE, {"trustedKernelPublisher": True}), b'kind = "redirect"\ndestination = "org/other"\n')
    ),
    "lock": Target(lock, _json(LOCK)),
    "revocations": Target(revocations, _json(REVOKED)),
    "config": Target(config, _json(CONFIG)),
    "report": Target(report, _json(REPORT)),
}
