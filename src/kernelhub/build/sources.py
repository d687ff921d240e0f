"""What a variant is made from: the files of a project that count, and their digest.

Compilers are given copies of these files and no others, so that no file which the digest does not cover can get into a
binary: a header that is missing here is a compile error, never a stale build.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from kernelhub.build.recipe import Recipe
from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.errors import InvalidMetadata

# What the builder does with the sources; a new number gives new commits and new ops namespaces to all.
EDITION = 2

# Headers need not be listed in a section's `src`: all of the project's are there for its sources.
_HEADERS = (".h", ".hh", ".hpp", ".hxx", ".cuh", ".inc", ".inl", ".ipp", ".tpp", ".def")
_NOT_SOURCES = {"build", "dist", "result", "tests", "benchmarks", "docs"}


def python_files(project: Path, recipe: Recipe) -> dict[str, bytes]:
    """The files of the Python package, by their path in it.

    Raises `InvalidMetadata` where there is no `__init__.py`, and for a file that cannot be read.
    """
    package = project / "torch-ext" / recipe.python_name
    found = {
        safe_path(path.relative_to(package).as_posix()): _read(path)
        for path in sorted(package.rglob("*"))
        if path.suffix.removeprefix(".") in recipe.pyext and _is_file(path) and not is_bytecode(path.as_posix())
    }
    if "__init__.py" not in found:
        raise InvalidMetadata(f"{package} has no __init__.py", hint="It is the kernel's Python: what users import.")
    return found


def native_files(project: Path, recipe: Recipe) -> dict[str, bytes]:
    """The sources that build.toml lists, and every header of the project, by path. Raises `InvalidMetadata`."""
    if recipe.binding is None:
        return {}
    listed = [("torch", path) for path in recipe.binding.sources]
    listed += [(f"kernel.{section.name}", path) for section in recipe.sections for path in section.sources]
    found = {path: _read(project / path) for path in _headers(project)}
    for section, text in listed:
        path = str(PurePosixPath(text))
        try:
            found[safe_path(path)] = (project / path).read_bytes()
        except InvalidMetadata as error:
            raise InvalidMetadata(f"[{section}] src: {text!r} is not a path inside the project") from error
        except OSError as error:
            raise InvalidMetadata(
                f"[{section}] src: {text}: {error.strerror}", hint="Paths are relative to build.toml."
            ) from error
    return found


def source_digest(project: Path, recipe: Recipe) -> str:
    """The hash (64 hex digits) of all that is in the project and in its variants."""
    files = {f"python/{path}": data for path, data in python_files(project, recipe).items()}
    files.update((f"native/{path}", data) for path, data in native_files(project, recipe).items())
    files["build.toml"] = _read(project / "build.toml")
    return digest_of(files)


def digest_of(files: Mapping[str, bytes]) -> str:
    """The hash (64 hex digits) of files by name."""
    return sha256_hex(
        canonical_json({"edition": EDITION, "files": {path: sha256_hex(data) for path, data in files.items()}})
    )


def _headers(project: Path) -> Iterator[str]:
    """The headers of a project, sorted; what lies in hidden folders, and where no sources are, is left out."""
    for parent, folders, names in os.walk(project):
        top = Path(parent) == project
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__")) and not (top and name in _NOT_SOURCES)
        )
        for name in sorted(names):
            path = Path(parent) / name
            if name.endswith(_HEADERS) and not name.startswith(".") and _is_file(path):
                yield path.relative_to(project).as_posix()


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link to nothing, which is to be said and not passed over."""
    return path.is_file() or not path.exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidMetadata(f"{path} cannot be read: {error.strerror}", hint="Mend it, or take it away.") from error
