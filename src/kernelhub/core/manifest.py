"""What lies in a hub's folder, as values: the manifest of a commit, the ref that names a commit, and `hub.json`.

>>> RefFile.parse("0123456789abcdef0123456789abcdef01234567\\nyanked: wrong results on odd widths\\n").yanked
'wrong results on odd widths'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.reading import as_object, json_object, typed
from kernelhub.core.refs import RepoId, is_commit
from kernelhub.core.signatures import Signature, parse_signatures, signatures_to_json
from kernelhub.errors import IntegrityError, InvalidMetadata, InvalidReference

LAYOUT = 1

# A manifest holds every variant's metadata.json. The largest repository seen has 60 builds of 40 KB each.
MAX_BYTES = 64 * 1024 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_YANKED = "yanked:"


@dataclass(frozen=True)
class LayerInfo:
    """What a kernel's layer class says of itself, read from its source: `forward` is the signature's text."""

    can_torch_compile: bool = False
    has_backward: bool = True
    forward: str = ""

    @classmethod
    def parse(cls, value: Any, where: str) -> LayerInfo:
        value = as_object(value, where)
        return cls(
            typed(value, "can_torch_compile", bool, where),
            typed(value, "has_backward", bool, where),
            typed(value, "forward", str, where),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "can_torch_compile": self.can_torch_compile,
            "has_backward": self.has_backward,
            "forward": self.forward,
        }


@dataclass(frozen=True)
class ManifestVariant:
    """A build at a commit: its archive (SHA-256, and size in bytes), its metadata.json's text, and its layers."""

    archive: str
    size: int
    metadata: str
    layers: Mapping[str, LayerInfo] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, value: Any, where: str = "variant") -> ManifestVariant:
        """Read a variant's entry. Raises `InvalidMetadata`, which names the key."""
        value = as_object(value, where)
        size = typed(value, "size", int, where)
        if size <= 0:
            raise InvalidMetadata(f"{where}: size: expected a positive number of bytes, got {size}")
        layers = as_object(value.get("layers", {}), f"{where}: layers")
        return cls(
            archive=_hash(value.get("archive"), f"{where}: archive"),
            size=size,
            metadata=typed(value, "metadata", str, where),
            layers={name: LayerInfo.parse(layer, f"{where}: layers: {name}") for name, layer in layers.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "archive": self.archive,
            "size": self.size,
            "metadata": self.metadata,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
        }


@dataclass(frozen=True)
class Manifest:
    """All that a commit is: which repository, after which commit, and its builds by their folders' names.

    `time` is UTC, `2026-11-21T20:00:00Z`. `card`, `source` and `benchmarks` are the SHA-256 of blobs: the card as it
    is, the others archives. `raw` has every key as it was, so that unknown ones keep the commit what it is.
    """

    repo: RepoId
    version: int
    parent: str | None
    time: str
    variants: Mapping[str, ManifestVariant] = field(hash=False)
    card: str | None = None
    source: str | None = None
    benchmarks: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @classmethod
    def from_raw(cls, raw: Any) -> Manifest:
        """The value of a manifest's object. Raises `InvalidMetadata`, which names the key."""
        raw = as_object(raw, "manifest")
        _check_layout(raw, "manifest")
        repo, parent, time = typed(raw, "repo", str, "manifest"), raw.get("parent"), typed(raw, "time", str, "manifest")
        if parent is not None and not (isinstance(parent, str) and is_commit(parent)):
            raise InvalidMetadata(f"manifest: parent: expected a commit of 40 hex digits or null, got {parent!r}")
        if not _TIME.fullmatch(time):
            raise InvalidMetadata(f"manifest: time: expected such as 2026-11-21T20:00:00Z, got {time!r}")
        version = typed(raw, "version", int, "manifest")
        if version < 0:
            raise InvalidMetadata(f"manifest: version: expected a whole number, got {version}")
        variants = as_object(raw.get("variants"), "manifest: variants")
        try:
            repo_id = RepoId.parse(repo)
        except InvalidReference as error:
            raise InvalidMetadata(f"manifest: repo: {error.message}") from error
        return cls(
            repo=repo_id,
            version=version,
            parent=parent,
            time=time,
            variants={
                name: ManifestVariant.parse(item, f"manifest: variants: {name}") for name, item in variants.items()
            },
            **{key: _optional_hash(raw, key) for key in ("card", "source", "benchmarks")},
            raw=raw,
        )

    def to_json(self) -> dict[str, Any]:
        """The object: every key that it was read with, over those of the fields."""
        value: dict[str, Any] = {
            "layout": LAYOUT,
            "repo": str(self.repo),
            "version": self.version,
            "parent": self.parent,
            "time": self.time,
            "variants": {name: variant.to_json() for name, variant in self.variants.items()},
            "card": self.card,
            "source": self.source,
            "benchmarks": self.benchmarks,
        }
        return {**value, **self.raw}

    @cached_property
    def commit(self) -> str:
        """The commit's name: 40 hex digits, of the SHA-256 of the canonical JSON."""
        return sha256_hex(canonical_json(self.to_json()))[:40]


@dataclass(frozen=True)
class ManifestDocument:
    """The file `commits/<commit>.json`: a manifest, and signatures, which may be added later."""

    manifest: Manifest
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def parse(cls, data: bytes | str) -> ManifestDocument:
        """Read the file. Raises `InvalidMetadata`, which names the key."""
        raw = json_object(data, "the manifest", MAX_BYTES)
        return cls(Manifest.from_raw(raw.get("manifest")), parse_signatures(raw))

    @property
    def payload(self) -> bytes:
        """What signatures are over: the canonical JSON of the manifest."""
        return canonical_json(self.manifest.to_json())

    def checked(self, repo: RepoId, commit: str) -> ManifestDocument:
        """The document, where it is what `commit` of `repo` names; else `IntegrityError`."""
        if self.manifest.commit != commit:
            raise IntegrityError(f"the manifest of {repo} at {commit} has other contents: {self.manifest.commit}")
        if self.manifest.repo != repo:
            raise IntegrityError(f"the manifest of {repo} at {commit} answers for {self.manifest.repo}")
        return self

    def signed(self, signature: Signature) -> ManifestDocument:
        """The document with a signature added; its commit stays the same."""
        return self if signature in self.signatures else replace(self, signatures=(*self.signatures, signature))

    def to_bytes(self) -> bytes:
        """The file's contents, in one canonical text."""
        value = {"manifest": self.manifest.to_json(), "signatures": signatures_to_json(self.signatures)}
        return canonical_json(value) + b"\n"


@dataclass(frozen=True)
class RefFile:
    """The file `refs/<ref>`: the commit that a version or branch is now, and why it was yanked, where it was."""

    commit: str
    yanked: str | None = None

    @classmethod
    def parse(cls, data: bytes | str) -> RefFile:
        """Read the file. Raises `InvalidMetadata`."""
        try:
            text = data.decode() if isinstance(data, bytes) else data
        except UnicodeDecodeError as error:
            raise InvalidMetadata(f"the ref is not text: {error}") from error
        commit, *rest = text.splitlines() or [""]
        if not is_commit(commit) or len(rest) > 1 or (rest and not rest[0].startswith(_YANKED)):
            raise InvalidMetadata(
                f'the ref is malformed: expected 40 hex digits and perhaps a line "{_YANKED} <reason>", got {text[:80]!r}'
            )
        return cls(commit, rest[0].removeprefix(_YANKED).strip() if rest else None)

    def to_bytes(self) -> bytes:
        """The file's contents; the reason of a yank becomes one line."""
        yanked = "" if self.yanked is None else f"{_YANKED} {' '.join(self.yanked.split())}\n"
        return f"{self.commit}\n{yanked}".encode()


def parse_hub_file(data: bytes | str) -> None:
    """Check a `hub.json`. Raises `InvalidMetadata` where it is none, or one of a layout that is not known here."""
    _check_layout(json_object(data, "hub.json", MAX_BYTES), "hub.json")


def hub_file() -> bytes:
    """The contents of `hub.json`."""
    return json.dumps({"layout": LAYOUT}).encode() + b"\n"


def _check_layout(raw: Mapping[str, Any], where: str) -> None:
    layout = raw.get("layout")
    if isinstance(layout, bool) or layout != LAYOUT:
        newer = isinstance(layout, int) and layout > LAYOUT
        raise InvalidMetadata(
            f"{where}: layout: expected {LAYOUT}, got {layout!r}",
            hint="A newer kernelhub made it: pip install --upgrade kernelhub" if newer else None,
        )


def _hash(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise InvalidMetadata(f"{where}: expected a SHA-256 of 64 hex digits, got {value!r:.80}")
    return value


def _optional_hash(raw: Mapping[str, Any], key: str) -> str | None:
    return None if raw.get(key) is None else _hash(raw[key], f"manifest: {key}")
