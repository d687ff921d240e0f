"""JSON objects that others wrote, read key by key: what is not as expected is an error that names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kernelhub.core.canonical import canonical_json
from kernelhub.errors import InvalidMetadata


def json_object(data: bytes | str, where: str, limit: int) -> dict[str, Any]:
    """The object that a text of at most `limit` bytes holds, and that has a canonical text. Raises `InvalidMetadata`."""
    if len(data) > limit:
        raise InvalidMetadata(f"{where} has {len(data):,} bytes; the most is {limit:,}")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(f"{where} is not JSON: {error}") from error
    try:
        canonical_json(raw)  # half of a surrogate pair and NaN, which Python reads, have none
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(f"{where} has no canonical JSON: {error}") from error
    return as_object(raw, where)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """The value, where it is an object. Raises `InvalidMetadata`."""
    if not isinstance(value, dict):
        raise InvalidMetadata(f"{where}: expected an object, got {value!r:.80}")
    return value


def typed(raw: Mapping[str, Any], key: str, kind: type[Any], where: str) -> Any:
    """The value of a key, where it is of a type: text, a whole number, true or false. Raises `InvalidMetadata`."""
    value = raw.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "nothing" if key not in raw else f"{value!r:.80}"
        expected = {str: "text", int: "a whole number", bool: "true or false"}[kind]
        raise InvalidMetadata(f"{where}: {key}: expected {expected}, got {found}")
    return value
