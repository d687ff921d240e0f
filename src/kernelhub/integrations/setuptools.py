"""What setuptools calls to put a project's `kernels.lock` into its package's metadata.

Nothing is to be configured but that it is there when the project is built:

```toml
[build-system]
requires = ["setuptools>=64", "kernelhub"]
build-backend = "setuptools.build_meta"
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernelhub.hub.locks import lock_to_package


def write_lock(command: Any, basename: str, filename: str) -> None:
    """An `egg_info.writers` entry point: `command` is the `egg_info` command, `filename` the file to write."""
    path = lock_to_package(Path.cwd())
    if path is not None:
        command.write_or_delete_file(basename, filename, path.read_text(encoding="utf-8"))
