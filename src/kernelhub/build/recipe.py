"""`build.toml` as a value. Noarch projects are read; what compiles is refused with what is missing.

The format is that of the `kernels` project's builder, editions 4 and 5 (the sections that noarch projects have).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub.core.backends import BY_NAME
from kernelhub.core.metadata import KernelDepend
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata, InvalidReference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]", re.ASCII)
_GENERAL = {
    "name", "version", "edition", "license", "backends", "upstream", "source", "python-depends", "kernel-depends",
    "hub", "cuda", "neuron", "tpu", "xpu",
}  # fmt: skip
_NOARCH = {"pyext", "cuda_capabilities", "rocm_archs"}
_COMPILED = ("torch", "tvm-ffi", "kernel")


@dataclass(frozen=True)
class Recipe:
    """What a noarch `build.toml` says. `depends` and `python_depends` are per backend; "" is for all."""

    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    pyext: tuple[str, ...] = ("py", "pyi")
    archs: Mapping[str, tuple[str, ...]] | None = None
    upstream: str | None = None
    source: str | None = None
    python_depends: Mapping[str, tuple[str, ...]] | None = None
    kernel_depends: Mapping[str, tuple[KernelDepend, ...]] | None = None

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")

    @classmethod
    def load(cls, project: Path) -> Recipe:
        """Read `<project>/build.toml`. Raises `InvalidMetadata`, which names the file and the key."""
        path = project / "build.toml"
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidMetadata(f"{project} has no build.toml") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidMetadata(f"{path}: {error}") from error
        try:
            return cls.from_raw(raw)
        except InvalidMetadata as error:
            error.add_context(str(path))
            raise

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Recipe:
        """The value of a parsed build.toml."""
        general = _table(raw, "general")
        if compiled := [key for key in _COMPILED if key in raw]:
            raise InvalidMetadata(
                f"[{compiled[0]}]: kernels with sources to compile cannot be built by this version",
                hint="Projects with a [torch-noarch] section can be.",
            )
        _known(raw, {"general", "torch-noarch"}, "")
        _known(general, _GENERAL, "general.")
        noarch = _table(raw, "torch-noarch")
        _known(noarch, _NOARCH, "torch-noarch.")
        name = general.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidMetadata(f"general.name: expected lower-case letters, digits and hyphens, got {name!r}")
        version = general.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise InvalidMetadata(f"general.version: expected a whole number, got {version!r}")
        backends = _strings(general, "backends", "general.")
        if not backends or any(item not in BY_NAME for item in backends):
            raise InvalidMetadata(f"general.backends: expected some of {', '.join(sorted(BY_NAME))}, got {backends!r}")
        sections = {"": general, **{key: general[key] for key in ("cuda", "neuron", "tpu", "xpu") if key in general}}
        return cls(
            name=name,
            version=version,
            license=_text(general, "license", "general.") or "",
            backends=backends,
            pyext=_strings(noarch, "pyext", "torch-noarch.") or cls.pyext,
            archs={
                "cuda": _strings(noarch, "cuda_capabilities", "torch-noarch."),
                "rocm": _strings(noarch, "rocm_archs", "torch-noarch."),
            },
            upstream=_text(general, "upstream", "general."),
            source=_text(general, "source", "general."),
            python_depends={key: _strings(table, "python-depends", key) for key, table in sections.items()},
            kernel_depends={key: _depends(table, key) for key, table in sections.items()},
        )

    def python_depends_of(self, backend: str) -> tuple[str, ...]:
        """The Python packages that the variant for a backend needs."""
        depends = self.python_depends or {}
        return tuple(dict.fromkeys((*depends.get("", ()), *depends.get(backend, ()))))

    def kernel_depends_of(self, backend: str) -> tuple[KernelDepend, ...]:
        """The kernels that the variant for a backend needs."""
        depends = self.kernel_depends or {}
        return tuple(dict.fromkeys((*depends.get("", ()), *depends.get(backend, ()))))


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise InvalidMetadata(f"[{key}]: expected this section, got {'nothing' if value is None else repr(value)}")
    return value


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise InvalidMetadata(f"{where}{key}: unknown key; expected one of {', '.join(sorted(known))}")


def _text(table: Mapping[str, Any], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidMetadata(f"{where}{key}: expected text, got {value!r}")
    return value


def _strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidMetadata(f"{where}{key}: expected a list of text, got {value!r}")
    return tuple(value)


def _depends(table: Mapping[str, Any], where: str) -> tuple[KernelDepend, ...]:
    found = []
    for item in table.get("kernel-depends", []):
        if not isinstance(item, dict) or ("version" in item) == ("revision" in item):
            raise InvalidMetadata(
                f'{where}kernel-depends: expected {{repo-id = "org/name", version = 1}} or a revision, got {item!r}'
            )
        try:
            pin = Version.parse(f"v{item['version']}") if "version" in item else Revision.parse(str(item["revision"]))
            found.append(KernelDepend(RepoId.parse(str(item.get("repo-id"))), pin))
        except InvalidReference as error:
            raise InvalidMetadata(f"{where}kernel-depends: {error.message}") from error
    return tuple(found)
