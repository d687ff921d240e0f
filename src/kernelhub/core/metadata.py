"""`metadata.json`: what a variant says of itself. Read strictly, written back with every key it had."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelhub.core.backends import BACKENDS, BY_NAME
from kernelhub.core.canonical import canonical_json
from kernelhub.core.digest import Digest
from kernelhub.core.refs import Pin, RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata, InvalidReference, context

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]", re.ASCII)
_LEVEL = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})", re.ASCII)

MAX_BYTES = 16 * 1024 * 1024

# Whose commits `provenance` names: the tool that built the kernel, and the kernel's own source.
PROVENANCE = ("kernel-builder", "kernel")

# The features of the `kernels` package that this one has; compared with `kernels-minver`.
KERNELS_LEVEL = (0, 17, 2)


@dataclass(frozen=True)
class PythonPackage:
    """A Python package that kernels may depend on: its name in metadata, in a registry, and to `import`."""

    name: str
    package: str
    module: str
    backends: tuple[str, ...] = tuple(row.name for row in BACKENDS)


PYTHON_DEPENDS = {
    row.name: row
    for row in (
        PythonPackage("einops", "einops", "einops"),
        PythonPackage("helion", "helion", "helion"),
        PythonPackage("tvm-ffi", "apache-tvm-ffi", "tvm_ffi"),
        PythonPackage("nvidia-cutlass-dsl", "nvidia-cutlass-dsl", "cutlass", ("cuda",)),
        PythonPackage("onednn", "onednn", "onednn", ("xpu",)),
        PythonPackage("nki", "nki", "nki", ("neuron",)),
    )
}


@dataclass(frozen=True)
class KernelDepend:
    """A kernel that a kernel needs."""

    repo: RepoId
    pin: Pin

    def __str__(self) -> str:
        return f"{self.repo}@{self.pin}"


@dataclass(frozen=True)
class BackendInfo:
    """What the build is for; `archs` are its device architectures (empty: all, or not stated)."""

    type: str
    archs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """The commit of a source, and whether the tree had changes that were not committed."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Metadata:
    """A variant's metadata.json.

    `id` is unique to the build and names its ops (`torch.ops.<id>`); `raw` has every key as it was, unknown ones too.
    `python_depends` is as written: whether each name is known is asked after `kernels_minver`, whose error says more.
    """

    name: str
    id: str
    version: int
    license: str
    backend: BackendInfo
    python_depends: tuple[str, ...] = ()
    kernel_depends: tuple[KernelDepend, ...] = ()
    upstream: str | None = None
    source: str | None = None
    kernels_minver: tuple[int, int, int] | None = None
    digest: Digest | None = None
    provenance: Mapping[str, Provenance] = field(default_factory=dict, hash=False)
    raw: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def python_name(self) -> str:
        """The name with underscores: the folder that older clients import."""
        return self.name.replace("-", "_")

    @classmethod
    def parse(cls, data: bytes | str) -> Metadata:
        """Read the text of a metadata.json. Raises `InvalidMetadata`, which names the key."""
        try:
            if len(data) > MAX_BYTES:
                raise InvalidMetadata(f"metadata.json has {len(data):,} bytes; the most is {MAX_BYTES:,}")
            raw = json.loads(data)
            canonical_json(raw)  # refuses NaN and lone surrogates, which Python reads and JSON does not have
        except (ValueError, RecursionError) as error:
            if isinstance(error, InvalidMetadata):
                raise
            raise InvalidMetadata(f"metadata.json is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise InvalidMetadata(f"metadata.json: expected an object, got {type(raw).__name__}")
        return cls.from_raw(raw)

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Metadata:
        """The value of a metadata.json's object. Raises `InvalidMetadata`, which names the key."""
        name, ident = _text(raw, "name"), _text(raw, "id")
        if not _NAME.fullmatch(name):
            raise InvalidMetadata(
                f"metadata.json: name: expected lower-case letters, digits and hyphens, starting with a letter, got {name!r}"
            )
        if not (ident.isidentifier() and ident.isascii()) or keyword.iskeyword(ident):
            raise InvalidMetadata(f"metadata.json: id: expected a Python identifier, got {ident!r}")
        version = raw.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise InvalidMetadata(f"metadata.json: version: expected a whole number, got {version!r}")
        return cls(
            name=name,
            id=ident,
            version=version,
            license=_text(raw, "license"),
            backend=_backend(raw.get("backend")),
            python_depends=_strings(raw, "python-depends", required=True),
            kernel_depends=tuple(_depend(item) for item in _list(raw, "kernel-depends")),
            upstream=_optional_text(raw, "upstream"),
            source=_optional_text(raw, "source"),
            kernels_minver=_level(raw.get("kernels-minver")),
            digest=_digest(raw.get("digest")),
            provenance=_provenance(raw.get("provenance")),
            raw=dict(raw),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that a metadata.json holds: what was read stays as it was, but for the fields that were changed."""
        try:
            before = Metadata.from_raw(self.raw)._of_fields()
        except InvalidMetadata:  # made here and never read: `raw` has at most keys of another tool
            before = {}
        value = self._of_fields()
        kept = {key: item for key, item in self.raw.items() if before.get(key) == value.get(key)}
        return {**value, **kept}

    def _of_fields(self) -> dict[str, Any]:
        """The object that the fields alone stand for."""
        value: dict[str, Any] = {
            "name": self.name,
            "id": self.id,
            "version": self.version,
            "license": self.license,
            "python-depends": list(self.python_depends),
            "backend": {"type": self.backend.type},
        }
        if self.backend.archs:
            value["backend"]["archs"] = list(self.backend.archs)
        if self.upstream is not None:
            value["upstream"] = self.upstream
        if self.source is not None:
            value["source"] = self.source
        if self.kernel_depends:
            value["kernel-depends"] = [
                {"repo-id": str(item.repo), **_pin_json(item.pin)} for item in self.kernel_depends
            ]
        if self.kernels_minver:
            value["kernels-minver"] = ".".join(map(str, self.kernels_minver))
        if self.digest:
            value["digest"] = self.digest.to_json()
        if self.provenance:
            value["provenance"] = {
                key: {"commit": item.commit, "dirty": item.dirty} for key, item in sorted(self.provenance.items())
            }
        return value

    def to_text(self) -> str:
        """The text of the metadata.json: sorted, so that a rebuild gives the same bytes."""
        return json.dumps(self.to_json(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        found = "nothing" if key not in raw else repr(value)
        raise InvalidMetadata(f"metadata.json: {key}: expected text, got {found}")
    return value


def _optional_text(raw: Mapping[str, Any], key: str) -> str | None:
    return _text(raw, key) if raw.get(key) is not None else None


def _list(raw: Mapping[str, Any], key: str, *, required: bool = False) -> list[Any]:
    value = raw.get(key, None if required else [])
    if value is None and not required:
        return []
    if not isinstance(value, list):
        raise InvalidMetadata(f"metadata.json: {key}: expected a list, got {value!r}")
    return value


def _strings(raw: Mapping[str, Any], key: str, *, required: bool = False) -> tuple[str, ...]:
    values = _list(raw, key, required=required)
    if not all(isinstance(value, str) for value in values):
        raise InvalidMetadata(f"metadata.json: {key}: expected a list of text, got {values!r}")
    return tuple(values)


def _backend(value: Any) -> BackendInfo:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str) or value["type"] not in BY_NAME:
        raise InvalidMetadata(
            f'metadata.json: backend: expected {{"type": ...}} with one of {", ".join(sorted(BY_NAME))}, got {value!r}'
        )
    return BackendInfo(value["type"], _strings(value, "archs"))


def _depend(value: Any) -> KernelDepend:
    if not isinstance(value, dict) or not isinstance(value.get("repo-id"), str):
        raise InvalidMetadata(
            f'metadata.json: kernel-depends: expected {{"repo-id": "org/name", "version": 1}}, got {value!r}'
        )
    version, revision = value.get("version"), value.get("revision")
    if (version is None) == (revision is None):
        raise InvalidMetadata(
            f"metadata.json: kernel-depends: {value['repo-id']}: expected one of version and revision"
        )
    if not (isinstance(revision, str) if version is None else type(version) is int):
        raise InvalidMetadata(
            f"metadata.json: kernel-depends: {value['repo-id']}: expected a whole number as version or text as "
            f"revision, got {revision if version is None else version!r}"
        )
    try:
        pin: Pin = Version.parse(f"v{version}") if revision is None else Revision.parse(revision)
        return KernelDepend(RepoId.parse(value["repo-id"]), pin)
    except InvalidReference as error:
        raise InvalidMetadata(f"metadata.json: kernel-depends: {error.message}") from error


def _pin_json(pin: Pin) -> dict[str, Any]:
    return {"version": pin.number} if isinstance(pin, Version) else {"revision": pin.ref}


def _digest(value: Any) -> Digest | None:
    with context("metadata.json"):
        return None if value is None else Digest.parse(value)


def _level(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    match = _LEVEL.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise InvalidMetadata(f"metadata.json: kernels-minver: expected three numbers such as 0.17.2, got {value!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _provenance(value: Any) -> dict[str, Provenance]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidMetadata(f"metadata.json: provenance: expected an object, got {value!r}")
    found = {}
    for key, item in value.items():
        if key not in PROVENANCE:
            continue  # another tool's, kept in `raw`
        commit = item.get("commit", item.get("sha")) if isinstance(item, dict) else None
        if not isinstance(commit, str) or not isinstance(item.get("dirty", False), bool):
            raise InvalidMetadata(
                f'metadata.json: provenance: {key}: expected {{"commit": ..., "dirty": ...}}, got {item!r}'
            )
        found[key] = Provenance(commit, item.get("dirty", False))
    return found
