"""Files in folders that others may write to, opened so that none of them stops whoever reads it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path) -> BinaryIO:
    """Open a file to read. Raises `OSError`, also for a pipe or a device: some wait for ever, and some have no end."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - it is handed on
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for somebody to write to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
