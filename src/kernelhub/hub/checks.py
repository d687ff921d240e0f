"""What must hold of a verified kernel before any of its code is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator

from kernelhub.core.archs import covers
from kernelhub.core.backends import BY_NAME, Backend
from kernelhub.core.metadata import KERNELS_LEVEL, PYTHON_DEPENDS, Metadata, PythonPackage
from kernelhub.errors import IncompatibleDevice, InvalidMetadata, InvalidReference, MissingDependency
from kernelhub.hub.probe import current_device, visible_archs


def check_level(metadata: Metadata) -> None:
    """Raises `InvalidReference` for a kernel that needs what newer clients have."""
    if metadata.kernels_minver and metadata.kernels_minver > KERNELS_LEVEL:
        need, have = (".".join(map(str, level)) for level in (metadata.kernels_minver, KERNELS_LEVEL))
        raise InvalidReference(
            f"{metadata.name} needs what the kernels package has from {need} on; this one has the level {have}",
            hint="pip install --upgrade kernelhub",
        )


def check_python_depends(metadata: Metadata) -> None:
    """Raises `MissingDependency` for packages that are not installed, `InvalidMetadata` for names that are not known."""
    rows = python_packages(metadata.python_depends, metadata.backend.type)
    missing = [row.package for row in rows if importlib.util.find_spec(row.module) is None]
    if missing:
        raise MissingDependency(f"{metadata.name} needs {', '.join(missing)}", packages=missing)


def python_packages(names: Iterable[str], backend: str) -> list[PythonPackage]:
    """The packages of these names. Raises `InvalidMetadata` for one that kernels for the backend may not depend on."""
    found = []
    for name in names:
        row = PYTHON_DEPENDS.get(name)
        if row is None or backend not in row.backends:
            known = ", ".join(key for key, item in PYTHON_DEPENDS.items() if backend in item.backends)
            raise InvalidMetadata(
                f"python-depends: {name!r} is not a package that kernels for {BY_NAME[backend].title} may "
                f"depend on; known: {known}"
            )
        found.append(row)
    return found


def check_archs(metadata: Metadata, backend: Backend) -> Iterator[str]:
    """Yields a warning for each visible device that the build does not cover.

    Raises `IncompatibleDevice` where the current one is among them.
    """
    if not metadata.backend.archs or metadata.backend.type != backend.name:
        return
    archs, devices = metadata.backend.archs, visible_archs(backend)
    uncovered = [index for index, arch in enumerate(devices) if not covers(archs, arch)]
    built = f"{metadata.name} is built for {', '.join(archs)}"
    if uncovered and current_device() in uncovered:
        raise IncompatibleDevice(
            f"{built}; the current device {current_device()} has {devices[current_device()]}",
            hint="Build it for this device, or pass check_arch=False if another device will run it.",
        )
    yield from (f"{built}; device {index} has {devices[index]} and cannot run it" for index in uncovered)
