"""Relative paths as hubs, archives and digests give them, which may be hostile."""

from __future__ import annotations

import re
import unicodedata

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


class Tree:
    """The files and folders of a tree so far: what can lie beside each other on every file system.

    One that ignores case, or composes letters (macOS), has one place for names that another keeps apart; there the
    second file would win.

    >>> tree = Tree()
    >>> tree.clash("a/b.py"), tree.clash("a/c.py"), tree.clash("A/d.py"), tree.clash("a")
    (None, None, 'a', 'a')
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, bool]] = {}
        self.files = 0

    @property
    def folders(self) -> int:
        """How many there are; a file's path of 1024 characters may name 500."""
        return len(self._places) - self.files

    def clash(self, path: str, *, folder: bool = False) -> str | None:
        """Add a file (which may be there once) or a folder: None, or what is there that it cannot lie beside."""
        parts = path.split("/")
        for depth in range(1, len(parts) + folder):
            place = "/".join(parts[:depth]), True
            there = self._places.setdefault(_folded(place[0]), place)
            if there != place:
                return there[0]
        if not folder:
            place = path, False
            there = self._places.setdefault(_folded(path), place)
            if there is not place:
                return there[0]
            self.files += 1
        return None


def clashing(path: str, there: str) -> str:
    """What is wrong with a path that `Tree.clash` refused."""
    return f"{path!r} is there twice" if path == there else f"{path!r} and {there!r} cannot both be there"


def _folded(path: str) -> str:
    """The path as a file system that ignores case and composes letters sees it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def is_bytecode(path: str) -> bool:
    """Whether a file is, or lies among, compiled Python: code that nobody can read and no digest of sources covers."""
    return path.lower().endswith(_BYTECODE) or "__pycache__" in path.lower().split("/")
