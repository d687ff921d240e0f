"""Keys and signatures as values. What only a cryptographic library can tell is told in `hub/signing.py`.

>>> key = PublicKey.parse("ed25519:" + "A" * 43 + "=")
>>> key.id
'66687aadf862bd776c8fc18b8e9f8e20'
>>> str(key) == "ed25519:" + "A" * 43 + "="
True
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kernelhub.core.canonical import b64, sha256_hex
from kernelhub.core.reading import as_object, typed
from kernelhub.errors import InvalidMetadata, InvalidReference

ALGORITHM = "ed25519"

# More than any project has keys in use; checking a hostile list of a million would take minutes.
MAX_SIGNATURES = 64

_KEY_BYTES = 32


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key that signatures are checked with: `ed25519:` and 32 bytes in base64."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read a key's text. Raises `InvalidReference`."""
        algorithm, colon, value = text.strip().partition(":")
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if algorithm != ALGORITHM or not colon or len(raw) != _KEY_BYTES:
            raise InvalidReference(
                f"{text!r:.100} is not a public key",
                hint='Expected "ed25519:" and 44 characters of base64, as `kernelhub keygen` prints it.',
            )
        return cls(raw)

    @cached_property
    def id(self) -> str:
        """What signatures name the key by: 32 hex digits of its SHA-256."""
        return sha256_hex(self.raw)[:32]

    def __str__(self) -> str:
        return f"{ALGORITHM}:{b64(self.raw)}"


@dataclass(frozen=True)
class Signature:
    """A signature over a canonical JSON text: which key, and the signature in base64."""

    key: str
    ed25519: str


def parse_signatures(raw: Mapping[str, Any]) -> tuple[Signature, ...]:
    """The `signatures` beside what they sign. Raises `InvalidMetadata`."""
    value = raw.get("signatures", [])
    if not isinstance(value, list):
        raise InvalidMetadata(f"signatures: expected a list, got {value!r:.80}")
    if len(value) > MAX_SIGNATURES:
        raise InvalidMetadata(f"signatures: {len(value):,} of them; the most is {MAX_SIGNATURES}")
    entries = [as_object(item, "signatures") for item in value]
    return tuple(
        Signature(typed(entry, "key", str, "signatures"), typed(entry, ALGORITHM, str, "signatures"))
        for entry in entries
    )


def signatures_to_json(signatures: Iterable[Signature]) -> list[dict[str, str]]:
    return [{"key": item.key, ALGORITHM: item.ed25519} for item in signatures]
