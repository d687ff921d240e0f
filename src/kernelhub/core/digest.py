"""The digest of a variant's files, and what is wrong between two.

>>> Digest("sha256", {"__init__.py": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}).violations({})
[Violation(kind='missing', path='__init__.py')]
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelhub.core.canonical import b64, canonical_json
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.errors import InvalidMetadata, Violation, context

ALGORITHMS = {"sha256": 32, "sha512": 64}

# The top-level files that no digest covers: the one that holds it, and the signature over that.
NOT_COVERED = frozenset({"metadata.json", "metadata.json.sigstore"})


@dataclass(frozen=True)
class Digest:
    """The hash of each file, base64, by its path relative to the variant's folder (`/` on every system)."""

    algorithm: str
    files: Mapping[str, str] = field(hash=False)

    @classmethod
    def of(cls, contents: Mapping[str, bytes], algorithm: str = "sha256") -> Digest:
        """The digest of these files; those that no digest covers are left out."""
        return cls(
            algorithm,
            {
                path: b64(hashlib.new(algorithm, data).digest())
                for path, data in sorted(contents.items())
                if path not in NOT_COVERED
            },
        )

    @classmethod
    def parse(cls, value: Any) -> Digest:
        """Read the `digest` of a metadata.json. Raises `InvalidMetadata`."""
        if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
            raise InvalidMetadata(
                f'digest: expected {{"algorithm": ..., "files": {{...}}}}, got {type(value).__name__}'
            )
        algorithm = value.get("algorithm")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise InvalidMetadata(f"digest: expected algorithm {' or '.join(ALGORITHMS)}, got {algorithm!r}")
        with context("digest"):
            _check(value["files"], algorithm)
        return cls(algorithm, dict(sorted(value["files"].items())))

    def to_json(self) -> dict[str, Any]:
        return {"algorithm": self.algorithm, "files": dict(sorted(self.files.items()))}

    @property
    def text(self) -> str:
        """The digest of the digest, as lock files and reports give it: `sha256-` and base64."""
        return "sha256-" + b64(hashlib.sha256(canonical_json(self.to_json())).digest())

    def violations(self, actual: Mapping[str, str]) -> list[Violation]:
        """What is wrong with files whose hashes are `actual`: missing, unknown, different, or bytecode."""
        found = [Violation("bytecode", path) for path in actual if is_bytecode(path)]
        found += [Violation("missing", path) for path in self.files if path not in actual and path not in NOT_COVERED]
        for path, value in actual.items():
            if path in NOT_COVERED or is_bytecode(path):
                continue
            expected = self.files.get(path)
            if expected is None:
                found.append(Violation("unknown", path))
            elif expected != value:
                found.append(Violation("different", path))
        return sorted(found, key=lambda violation: (violation.path, violation.kind))


def _check(files: dict[str, Any], algorithm: str) -> None:
    for path, text in files.items():
        if safe_path(path).casefold() in NOT_COVERED:
            raise InvalidMetadata(f"{path}: no digest covers this file")
        if not isinstance(text, str) or _decoded_size(text) != ALGORITHMS[algorithm]:
            raise InvalidMetadata(f"{path}: not a base64 {algorithm} hash: {text!r}")
    if len({path.casefold() for path in files}) != len(files):
        raise InvalidMetadata("two paths differ only in upper and lower case")


def _decoded_size(text: str) -> int:
    """How many bytes base64 stands for; -1 where it is none, or not the one spelling that hashes compare equal by."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return -1
    return len(data) if b64(data) == text else -1
