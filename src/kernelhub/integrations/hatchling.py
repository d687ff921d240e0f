"""A build hook for hatchling that puts a project's `kernels.lock` into its package's metadata.

```toml
[build-system]
requires = ["hatchling", "kernelhub"]
build-backend = "hatchling.build"

[tool.hatch.build.hooks.kernelhub]
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.plugin import hookimpl

from kernelhub.core.lockfile import NAME
from kernelhub.hub.locks import lock_to_package


class LockHook(BuildHookInterface[Any]):
    """Wheels, editable ones too, get the lock as `<name>.dist-info/extra_metadata/kernels.lock`."""

    PLUGIN_NAME = "kernelhub"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        path = lock_to_package(Path(self.root))
        if path is not None and self.target_name == "wheel":
            build_data["extra_metadata"][str(path)] = NAME
        elif path is not None:
            build_data["force_include"][str(path)] = NAME  # a wheel may be built from the source distribution


@hookimpl
def hatch_register_build_hook() -> type[LockHook]:
    return LockHook
