"""Paths of modules with wildcards: `model.layers.*.mlp`."""

from __future__ import annotations

import re


def path_pattern(text: str) -> str:
    """Such a path as a regular expression for the whole of a module's path.

    `*` is a segment or a part of one, `**` for a segment any number of them, at the end at least one.

    >>> [bool(re.fullmatch(path_pattern("layers.**"), path)) for path in ("layers", "layers.0", "layers.0.mlp")]
    [False, True, True]
    """
    *parts, last = text.split(".")
    begin = "".join(r"(?:[^.]+\.)*" if part == "**" else rf"{_segment(part)}\." for part in parts)
    return f"(?:{begin}{r'[^.]+(?:[.][^.]+)*' if last == '**' else _segment(last)})"


def _segment(text: str) -> str:
    if text and not text.strip("*"):
        return "[^.]+"
    return "[^.]*".join(map(re.escape, text.split("*")))
