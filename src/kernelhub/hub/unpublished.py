"""A kernel repository's folder, read to be published: what is fit to be, and what is left out."""

from __future__ import annotations

import dataclasses
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kernelhub.core.digest import Digest
from kernelhub.core.metadata import Metadata
from kernelhub.core.paths import is_bytecode
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    Violation,
    context,
)
from kernelhub.hub.archive import check_paths
from kernelhub.hub.signing import HEADER
from kernelhub.hub.sources.local import edited

CARDS = ("CARD.md", "README.md")
_PRIVATE_KEY = re.compile(rb"^(?:\xef\xbb\xbf)?-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Beside:
    """What is published beside the variants."""

    card: bytes | None
    source: dict[str, bytes]
    benchmarks: dict[str, bytes]


def check_repository(folder: Path) -> int:
    """Look whether a kernel repository's folder is fit to be published; the version that all of its variants name.

    Raises `InvalidReference`, `InvalidMetadata` or `IntegrityError`, which name the variant and the file; also where the
    sources, which are published too, are not those that the variants were made of, and for a private key.
    """
    names: dict[str, tuple[str, int]] = {}
    for path in variant_folders(folder):
        metadata, _ = read_variant(path)
        names[path.name] = (metadata.name, metadata.version)
    if len(set(names.values())) != 1:
        told = ", ".join(f"{variant} is {name} version {version}" for variant, (name, version) in names.items())
        raise InvalidMetadata(f"the variants are not of one kernel: {told}")
    if (folder / "build.toml").is_file() and edited(folder):
        raise InvalidMetadata(
            f"the sources in {folder} were changed since they were built",
            hint=f"Run: kernelhub build {shlex.quote(str(folder))}",
        )
    read_beside(folder)
    return next(iter(names.values()))[1]


def variant_folders(folder: Path) -> list[Path]:
    """The variants' folders, by name; what else lies in `build/` is no variant only if its name is hidden."""
    build = folder / "build"
    if not build.is_dir():
        if not folder.is_dir():
            raise InvalidReference(f"there is no folder {folder}")
        if (folder / "build.toml").is_file():
            raise InvalidReference(
                f"{folder} is not built yet", hint=f"Run: kernelhub build {shlex.quote(str(folder))}"
            )
        raise InvalidReference(f"{folder} is no kernel repository", hint="Expected a folder with build/<variant>/.")
    found = sorted(path for path in build.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise InvalidReference(f"{build} has no variants", hint="`kernelhub build` makes them.")
    for path in found:
        BuildVariant.parse(path.name)
    return found


def read_variant(path: Path) -> tuple[Metadata, dict[str, bytes]]:
    """A variant's files, fit to be published: with metadata that holds their digest."""
    with context(path.name):
        contents = read_folder(path)
        for name in ("metadata.json", "__init__.py"):
            if name not in contents:
                raise InvalidMetadata(f"{name} is not there")
        try:
            metadata = Metadata.parse(contents["metadata.json"].decode())
        except UnicodeDecodeError as error:
            raise InvalidMetadata(f"metadata.json is not UTF-8: {error}") from error
        if metadata.digest is None:
            if "metadata.json.sigstore" in contents:
                raise InvalidMetadata("metadata.json is signed and has no digest, and adding one breaks the signature")
            metadata = dataclasses.replace(metadata, digest=Digest.of(contents))
            contents["metadata.json"] = metadata.to_text().encode()
        check_paths(contents)
        violations = _violations(metadata.digest or Digest.of(contents), contents)
        if violations:
            raise IntegrityError(
                "the files are not those of the digest in metadata.json", violations, hint="Build the kernel again."
            )
        return metadata, contents


def _violations(digest: Digest, contents: Mapping[str, bytes]) -> list[Violation]:
    return digest.violations(Digest.of(contents, digest.algorithm).files)


def read_beside(folder: Path) -> Beside:
    """The card, the project's own files where there is a `build.toml`, and the benchmarks. Raises as `read_folder` does."""
    card = next((folder / name for name in CARDS if (folder / name).is_file()), None)
    benchmarks = folder / "benchmarks"
    return Beside(
        card=_read(card) if card else None,
        source=_read_source(folder) if (folder / "build.toml").is_file() else {},
        benchmarks=read_folder(benchmarks, bytecode=False) if benchmarks.is_dir() else {},
    )


def _read_source(folder: Path) -> dict[str, bytes]:
    """The project's own files: not what was built, is published beside them, is hidden, or bytecode."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in ("build", "benchmarks", "__pycache__", *CARDS):
            continue
        if path.is_dir():
            found |= {f"{path.name}/{name}": data for name, data in read_folder(path, bytecode=False).items()}
        else:
            _check_kind(path)
            found[path.name] = _read(path)
    return found


def read_folder(top: Path, *, bytecode: bool = True) -> dict[str, bytes]:
    """The files of a folder, by their paths in it.

    Raises `IntegrityError` for a link, a device or the like, and for a private key. Bytecode is an error too, or passed
    over where `bytecode` is False (importing a benchmark leaves some behind).
    """
    found: dict[str, bytes] = {}
    compiled: list[Violation] = []
    _check_kind(top)
    for path in sorted(_walk(top)):
        name = path.relative_to(top).as_posix()
        if is_bytecode(name):
            compiled.append(Violation("bytecode", name))
        else:
            found[name] = _read(path)
    if compiled and bytecode:
        raise IntegrityError("there is bytecode, which is never published", compiled, hint="Delete it.")
    return found


def _read(path: Path) -> bytes:
    """A file to be published. Raises `IntegrityError` for a private key: who has it signs in its owner's name."""
    data = path.read_bytes()
    if data.startswith(HEADER) or _PRIVATE_KEY.search(data):
        raise IntegrityError(
            f"{path} is a private key, which is never published", hint="Move it out of the folder that is published."
        )
    return data


def _walk(top: Path) -> Iterator[Path]:
    for path in top.iterdir():
        _check_kind(path)
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _check_kind(path: Path) -> None:
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise IntegrityError(f"{path} is {kind}, which is never published", hint="Put the file itself there.")
