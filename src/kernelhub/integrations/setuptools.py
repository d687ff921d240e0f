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
    path = lock_to_package(Path.cwd(), _carried(command, basename))
    if path is not None:
        command.write_or_delete_file(basename, filename, path.read_text(encoding="utf-8"))


def _carried(command: Any, basename: str) -> Path | None:
    """Where a source distribution has its lock: setuptools packs what was written here, and nobody the project's own."""
    if not Path("PKG-INFO").is_file():
        return None
    sources = (command.distribution.package_dir or {}).get("", "")
    return Path(sources, Path(command.egg_info).name, basename)
