"""Relative paths as hubs, archives and digests give them, which may be hostile."""

from __future__ import annotations

import re

from kernelhub.errors import InvalidMetadata

# Lone surrogates are among them: JSON can hold them, no file's name and no UTF-8 can.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')
# The names that Windows keeps for devices, with any ending and with spaces before it: `ntpath.isreserved` of 3.13.
_RESERVED = re.compile(r"(?:con|conin\$|conout\$|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(?:\..*)?", re.IGNORECASE)
_BYTECODE = (".pyc", ".pyo")


def safe_path(path: str) -> str:
    """The path, where it stays inside its folder on every system; else `InvalidMetadata`.

    Refused are empty, absolute and `..` paths, drive letters, backslashes, control characters, and names that Windows
    reserves or changes: a kernel that could be stored on one system only would verify on one system only.
    """
    parts = path.split("/")
    if (
        len(path) > 1024
        or _FORBIDDEN.search(path)
        or any(part in ("", ".", "..") or part.endswith((".", " ")) or len(part.encode()) > 255 for part in parts)
        or any(_RESERVED.fullmatch(part) for part in parts)
    ):
        raise InvalidMetadata(f"{path!r} is not a path inside a kernel")
    return path


def is_bytecode(path: str) -> bool:
    """Whether a file is, or lies among, compiled Python: code that nobody can read and no digest of sources covers."""
    return path.lower().endswith(_BYTECODE) or "__pycache__" in path.lower().split("/")
