"""Tables of a TOML file, read strictly: an error names the line and the key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernelhub.core.backends import VersionPair
from kernelhub.errors import InvalidMetadata

_VERSION = re.compile(r"(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})(?:\.\d+)?", re.ASCII)
_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:"[^"]*"|'[^']*'|[-\w.])+)\s*=""")


@dataclass(frozen=True)
class Table:
    """A table at `path` of the file whose text is `text`. Each reader returns None, or nothing, for a missing key."""

    value: Mapping[str, Any]
    path: tuple[str, ...]
    text: str

    def error(self, key: str, message: str) -> InvalidMetadata:
        """The error that a key here is wrong."""
        path = (*self.path, key)
        line = key_line(self.text, path)
        return InvalidMetadata(f"line {line}: {'.'.join(path)}: {message}")

    def known(self, keys: set[str]) -> None:
        """Refuse keys that are not among these."""
        for key in self.value:
            if key not in keys:
                expected = f"expected one of {', '.join(sorted(keys))}" if keys else "expected none"
                raise self.error(key, f"unknown key; {expected}")

    def has(self, key: str) -> bool:
        return key in self.value

    def raw(self, key: str) -> Any:
        return self.value.get(key)

    def table(self, key: str) -> Table | None:
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"expected a section, got {value!r}")
        return Table(value, (*self.path, key), self.text)

    def string(self, key: str) -> str | None:
        value = self.value.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"expected text, got {value!r}")
        return value

    def whole(self, key: str) -> int | None:
        value = self.value.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(key, f"expected a whole number, got {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"expected a list of text, got {value!r}")
        return tuple(value)

    def version(self, key: str) -> VersionPair | None:
        """`"12.8"` as (12, 8)."""
        text = self.string(key)
        if text is None:
            return None
        match = _VERSION.fullmatch(text)
        if not match:
            raise self.error(key, f'expected a version such as "2.10", got {text!r}')
        return int(match[1]), int(match[2])


def key_line(text: str, path: tuple[str, ...]) -> int:
    """The line (from 1) where a key stands, else that of the nearest table above it that has one; 1 where none has.

    >>> key_line('[general]\\nname = "x"\\n[kernel.a]\\nsrc = []\\n', ("kernel", "a", "src"))
    4
    >>> key_line('[general]\\nhub = {branch = 1}\\n', ("general", "hub", "branch"))
    2
    """
    found: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = _split(header[1])
            here = section
        elif key := _KEY.match(line):
            here = (*section, *_split(key[1]))
        else:
            continue
        for length in range(1, len(here) + 1):
            found.setdefault(here[:length], number)
    while path and path not in found:
        path = path[:-1]
    return found.get(path, 1)


def _split(key: str) -> tuple[str, ...]:
    """The parts of a dotted key, quoted or not."""
    return tuple(part.strip().strip("\"'") for part in re.findall(r"""\s*(?:"[^"]*"|'[^']*'|[-\w]+)\s*""", key))
