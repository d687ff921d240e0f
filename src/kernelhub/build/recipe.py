"""`build.toml` as a value: every key of editions 3 to 6 of the `kernels` project's format.

An error names the line and the key. Older editions are read as they are; `Recipe.notes` says what edition 5 would have
otherwise, and `update` writes that. One thing is read beyond the format: a project may have both [torch] and
[torch-noarch], and then has compiled and noarch variants of the same Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kernelhub.build.toml import Table, key_line
from kernelhub.core.archs import is_cuda_arch
from kernelhub.core.backends import BY_NAME, VersionPair
from kernelhub.core.metadata import KernelDepend
from kernelhub.core.paths import safe_path
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata, InvalidReference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EDITION = 5
NEWEST = 6  # as 5, but that a [kernel.<name>] has `language = "cpp-<backend>"` where it had `backend`
_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]", re.ASCII)
_DEPENDS = re.compile(r"torch|cutlass_\d+_\d+|sycl_tla|metal-cpp", re.ASCII)

FRAMEWORKS = ("torch", "torch-noarch", "tvm-ffi")
_TOP = {"general", "kernel", *FRAMEWORKS}
_GENERAL = {
    "name", "version", "edition", "license", "backends", "upstream", "source", "python-depends", "kernel-depends",
    "hub", "cuda", "neuron", "tpu", "xpu",
}  # fmt: skip
_BACKEND_TABLES = {
    "cuda": {"minver", "maxver", "python-depends", "kernel-depends"},
    "neuron": {"python-depends", "kernel-depends"},
    "tpu": {"python-depends", "kernel-depends"},
    "xpu": {"python-depends", "kernel-depends"},
}
_TORCH = {"src", "include", "minver", "maxver", "pyext", "cxx-flags", "stable-abi"}
_TVM_FFI = {"src", "include", "pyext", "cxx-flags"}
_NOARCH = {"pyext", "cuda_capabilities", "rocm_archs"}
_KERNEL = {"backend", "depends", "src", "include", "cxx-flags"}
_KERNEL_OF = {
    "cpu": set[str](),
    "cuda": {"cuda-capabilities", "cuda-flags", "cuda-minver"},
    "metal": set[str](),
    "rocm": {"rocm-archs", "hip-flags"},
    "xpu": {"sycl-flags"},
}
# What files older than edition 3 have; nothing of theirs can be read.
_ANCIENT = (("general", "language"), ("general", "universal"), ("torch", "universal"), ("torch", "name"))


@dataclass(frozen=True)
class Binding:
    """The section of a compiled framework: the sources that register the ops, and what they are built with.

    `stable_abi` maps a backend to the torch version whose stable ABI is used; "" is for all backends.
    """

    sources: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    cxx_flags: tuple[str, ...] = ()
    minver: VersionPair | None = None
    maxver: VersionPair | None = None
    stable_abi: Mapping[str, VersionPair] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Section:
    """One `[kernel.<name>]`: sources for one backend. `flags` are for the backend's own compiler."""

    name: str
    backend: str
    sources: tuple[str, ...]
    depends: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    cxx_flags: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    minver: VersionPair | None = None


@dataclass(frozen=True)
class Recipe:
    """What a `build.toml` says. `python_depends` and `kernel_depends` are per backend; "" is for all.

    `binding` is the compiled section (of torch, or of tvm-ffi where `tvm_ffi`), `noarch` whether there are noarch
    variants, `archs` theirs. `notes` say what edition 5 would have otherwise.
    """

    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    pyext: tuple[str, ...] = ("py", "pyi")
    noarch: bool = True
    binding: Binding | None = None
    tvm_ffi: bool = False
    sections: tuple[Section, ...] = ()
    archs: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    upstream: str | None = None
    source: str | None = None
    hub_repo: str | None = None
    hub_branch: str | None = None
    cuda_minver: VersionPair | None = None
    cuda_maxver: VersionPair | None = None
    python_depends: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    kernel_depends: Mapping[str, tuple[KernelDepend, ...]] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")

    @classmethod
    def load(cls, project: Path) -> Recipe:
        """Read `<project>/build.toml`. Raises `InvalidMetadata`, which names the file, the line and the key."""
        path = project / "build.toml"
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise InvalidMetadata(f"{project} has no build.toml", hint="`kernelhub init` makes a project.") from None
        except UnicodeDecodeError as error:
            raise InvalidMetadata(f"{path} is not UTF-8: {error}") from error
        except OSError as error:
            raise InvalidMetadata(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls.parse(text)
        except InvalidMetadata as error:
            error.add_context(str(path))
            raise

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The value of a build.toml's text. Raises `InvalidMetadata`, which names the line and the key."""
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidMetadata(str(error)) from error
        _refuse_ancient(raw, text)
        top = Table(raw, (), text)
        top.known(_TOP)
        general = top.table("general")
        if general is None:
            raise top.error("general", "expected this section, got nothing")
        return _recipe(top, general)

    def python_depends_of(self, backend: str) -> tuple[str, ...]:
        """The Python packages that the variant for a backend needs."""
        return tuple(dict.fromkeys((*self.python_depends.get("", ()), *self.python_depends.get(backend, ()))))

    def kernel_depends_of(self, backend: str) -> tuple[KernelDepend, ...]:
        """The kernels that the variant for a backend needs."""
        return tuple(dict.fromkeys((*self.kernel_depends.get("", ()), *self.kernel_depends.get(backend, ()))))

    def sections_of(self, backend: str) -> tuple[Section, ...]:
        """The source groups for a backend."""
        return tuple(section for section in self.sections if section.backend == backend)

    def compiles_for(self, backend: str) -> bool:
        """Whether a backend has a compiled variant: not where it has a noarch one, and other backends alone have sources."""
        if self.binding is None or backend not in self.backends:
            return False
        return not (self.noarch and self.sections and not self.sections_of(backend))

    def stable_abi_of(self, backend: str) -> VersionPair | None:
        """The torch version whose stable ABI the backend's build uses; None where it is for one torch version."""
        abi = self.binding.stable_abi if self.binding else {}
        return abi.get(backend, abi.get(""))


def update(text: str) -> str:
    """The text of a build.toml in edition 5; what it says, its comments, its order and its ends of lines stay.

    Raises `InvalidMetadata` where it cannot be read, and where it is laid out so that lines cannot be put into it.
    """
    recipe = Recipe.parse(text)
    if not recipe.notes:
        return text
    raw = tomllib.loads(text)
    general, noarch = raw["general"], not any(key in raw for key in FRAMEWORKS)
    added = [f"edition = {EDITION}"] if "edition" not in general else []
    if "version" not in general:
        added.append(f"version = {recipe.version}")
    if "license" not in general:
        added.append(f'license = "{recipe.license}"')
    newline = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    lines = (text if text.endswith("\n") else text + newline).splitlines(keepends=True)
    if "edition" in general:
        at = key_line(text, ("general", "edition")) - 1
        lines[at] = re.sub(r"=\s*\d+", f"= {EDITION}", lines[at], count=1)
    at = key_line(text, ("general", "name"))
    lines[at:at] = [line + newline for line in added]
    if noarch:
        lines += [newline, f"[torch-noarch]{newline}"]
    updated = "".join(lines)
    meant = {"version": recipe.version, "license": recipe.license, **general, "edition": EDITION}
    if not _says(updated, {**raw, "general": meant, **({"torch-noarch": {}} if noarch else {})}):
        by_hand = ", ".join(dict.fromkeys((f"edition = {EDITION}", *added)))
        raise InvalidMetadata(
            f"line {key_line(text, ('general',))}: general: it is laid out so that it cannot be rewritten",
            hint=f"Write by hand: {by_hand}{', and a section [torch-noarch]' if noarch else ''}.",
        )
    return updated


def _says(text: str, meant: Mapping[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == meant
    except tomllib.TOMLDecodeError:
        return False


def _refuse_ancient(raw: Mapping[str, Any], text: str) -> None:
    tables = [path for path in _ANCIENT if isinstance(raw.get(path[0]), dict) and path[1] in raw[path[0]]]
    kernels, general = raw.get("kernel"), raw.get("general")
    newest = isinstance(general, dict) and general.get("edition") == NEWEST
    if isinstance(kernels, dict) and not newest:
        tables += [
            ("kernel", name, "language")  # type: ignore[misc]
            for name, table in kernels.items()
            if isinstance(table, dict) and "language" in table
        ]
    if tables:
        path: tuple[str, ...] = tables[0]
        raise InvalidMetadata(
            f"line {key_line(text, path)}: {'.'.join(path)}: this build.toml is older than edition 3, and cannot be read",
            hint="Write it anew in edition 5: general.backends, a [torch] or [torch-noarch] section, and a backend in each "
            "[kernel.<name>].",
        )


def _recipe(top: Table, general: Table) -> Recipe:
    general.known(_GENERAL)
    notes: list[str] = []
    frameworks = [key for key in FRAMEWORKS if top.has(key)]
    edition = _edition(general, frameworks, notes)
    noarch = top.table("torch-noarch")
    binding = top.table("torch") or top.table("tvm-ffi")
    _check_frameworks(top, frameworks, notes)
    if noarch:
        noarch.known(_NOARCH)
    cuda = general.table("cuda")
    hub = general.table("hub")
    if hub:
        hub.known({"repo-id", "branch"})
    backends = general.texts("backends")
    if not backends or any(item not in BY_NAME for item in backends):
        raise general.error(
            "backends", f"expected some of {', '.join(sorted(BY_NAME))}, got {general.raw('backends')!r}"
        )
    depends = {"": general, **{key: table for key in _BACKEND_TABLES if (table := _backend_table(general, key))}}
    pyext = (binding.texts("pyext") if binding else ()) or (noarch.texts("pyext") if noarch else ())
    return Recipe(
        name=_name(general),
        version=_required(general, "version", general.whole, 1, edition, notes),
        license=_required(general, "license", general.string, "unknown", edition, notes),
        backends=tuple(dict.fromkeys(backends)),
        pyext=tuple(item.removeprefix(".") for item in pyext) or Recipe.pyext,
        noarch=noarch is not None or not frameworks,
        binding=_binding(binding) if binding else None,
        tvm_ffi="tvm-ffi" in frameworks,
        sections=_sections(top, backends, edition),
        archs={
            "cuda": _capabilities(noarch, "cuda_capabilities") if noarch else (),
            "rocm": noarch.texts("rocm_archs") if noarch else (),
        },
        upstream=general.string("upstream"),
        source=general.string("source"),
        hub_repo=hub.string("repo-id") if hub else None,
        hub_branch=hub.string("branch") if hub else None,
        cuda_minver=cuda.version("minver") if cuda else None,
        cuda_maxver=cuda.version("maxver") if cuda else None,
        python_depends={key: table.texts("python-depends") for key, table in depends.items()},
        kernel_depends={key: _kernel_depends(table) for key, table in depends.items()},
        notes=tuple(notes),
    )


def _edition(general: Table, frameworks: list[str], notes: list[str]) -> int:
    """The edition: as written, or the oldest that the file can be."""
    written = general.whole("edition")
    if written is not None:
        if written > NEWEST or written < 3:
            raise general.error("edition", f"expected a whole number from 3 to {NEWEST}, got {written}")
        if written < EDITION:
            notes.append(f"general.edition is {written}, the present one is {EDITION}")
        return written
    notes.append(f"general.edition is missing, the present one is {EDITION}")
    return 4 if frameworks and general.has("version") and general.has("license") else 3


def _check_frameworks(top: Table, frameworks: list[str], notes: list[str]) -> None:
    if not frameworks:
        if not notes:  # edition 5 as it should be, but for this
            raise top.error("torch", "expected one of the sections [torch], [torch-noarch] and [tvm-ffi], got none")
        if top.raw("kernel"):
            raise top.error("kernel", "sources to compile need a [torch] section with the bindings in src")
        notes.append("the section [torch-noarch] is missing; without a framework's section a kernel is noarch")
    if "torch" in frameworks and "tvm-ffi" in frameworks:
        raise top.error("tvm-ffi", "expected one framework, got [torch] and [tvm-ffi]")
    if frameworks == ["torch-noarch"] and top.raw("kernel"):
        raise top.error(
            "kernel", "a noarch kernel has no sources to compile; expected [torch] instead of [torch-noarch]"
        )


def _required(
    general: Table, key: str, read: Callable[[str], Any], default: Any, edition: int, notes: list[str]
) -> Any:
    """A key that editions from 4 on must have; in 3 it has a default."""
    value = read(key)
    if value is not None and value != "" and not (isinstance(value, int) and value < 0):
        return value
    if value is None and edition == 3:
        notes.append(f"general.{key} is missing, {default!r} is assumed")
        return default
    expected = "a whole number" if key == "version" else "text"
    raise general.error(key, f"expected {expected}, got {'nothing' if value is None else repr(value)}")


def _name(general: Table) -> str:
    name = general.string("name")
    if name is None or not _NAME.fullmatch(name):
        raise general.error("name", f"expected lower-case letters, digits and hyphens, got {name!r}")
    try:
        return safe_path(name)
    except InvalidMetadata:
        raise general.error("name", f"{name!r} cannot be a folder's name on every system") from None


def _backend_table(general: Table, key: str) -> Table | None:
    table = general.table(key)
    if table:
        table.known(_BACKEND_TABLES[key])
    return table


def _binding(table: Table) -> Binding:
    torch = table.path == ("torch",)
    table.known(_TORCH if torch else _TVM_FFI)
    return Binding(
        sources=table.texts("src"),
        include=_include(table),
        cxx_flags=table.texts("cxx-flags"),
        minver=table.version("minver") if torch else None,
        maxver=table.version("maxver") if torch else None,
        stable_abi=_stable_abi(table) if torch else {},
    )


def _include(table: Table) -> tuple[str, ...]:
    """The include folders. They are inside the project: a header elsewhere is in no digest, and may change unseen."""
    found = table.texts("include")
    for text in found:
        path = str(PurePosixPath(text))
        try:
            if path != ".":
                safe_path(path)
        except InvalidMetadata:
            error = table.error("include", f"expected folders inside the project, got {text!r}")
            error.hint = "Put the headers into the project. CXX may name folders of the system: CXX='g++ -isystem DIR'."
            raise error from None
    return found


def _stable_abi(table: Table) -> dict[str, VersionPair]:
    """`"2.11"`, or a table from backends to versions."""
    if not isinstance(table.raw("stable-abi"), dict):
        version = table.version("stable-abi")
        return {"": version} if version else {}
    per_backend = table.table("stable-abi")
    assert per_backend is not None
    per_backend.known(set(BY_NAME))
    return {key: version for key in BY_NAME if (version := per_backend.version(key))}


def _sections(top: Table, backends: tuple[str, ...], edition: int) -> tuple[Section, ...]:
    tables = top.table("kernel")
    if not tables:
        return ()
    found = [(name, tables.table(name)) for name in tables.value]
    key, prefix = ("language", "cpp-") if edition == NEWEST else ("backend", "")
    return tuple(_section(name, table, backends, key, prefix) for name, table in found if table is not None)


def _section(name: str, table: Table, backends: tuple[str, ...], key: str, prefix: str) -> Section:
    """A section whose backend is what `key` has after `prefix`."""
    written = table.string(key)
    backend = written.removeprefix(prefix) if written and written.startswith(prefix) else None
    if backend not in _KERNEL_OF:
        expected = ", ".join(prefix + item for item in sorted(_KERNEL_OF))
        raise table.error(key, f"expected one of {expected}, got {written!r}")
    table.known(_KERNEL - {"backend"} | {key} | _KERNEL_OF[backend])
    if backend not in backends:
        raise table.error(key, f"{backend!r} is not in general.backends")
    depends = table.texts("depends")
    for item in depends:
        if not _DEPENDS.fullmatch(item):
            raise table.error(
                "depends", f"expected torch, cutlass_<major>_<minor>, sycl_tla or metal-cpp, got {item!r}"
            )
    if not table.texts("src"):
        raise table.error("src", "expected a list of source files, got none")
    flags = {"cuda": "cuda-flags", "rocm": "hip-flags", "xpu": "sycl-flags"}.get(backend)
    return Section(
        name=name,
        backend=backend,
        sources=table.texts("src"),
        depends=depends,
        include=_include(table),
        cxx_flags=table.texts("cxx-flags"),
        flags=table.texts(flags) if flags else (),
        archs=_capabilities(table, "cuda-capabilities") if backend == "cuda" else table.texts("rocm-archs"),
        minver=table.version("cuda-minver") if backend == "cuda" else None,
    )


def _capabilities(table: Table, key: str) -> tuple[str, ...]:
    found = table.texts(key)
    for text in found:
        if not is_cuda_arch(text):
            raise table.error(key, f"expected capabilities such as 9.0, 9.0a or 10.0+PTX, got {text!r}")
    return found


def _kernel_depends(table: Table) -> tuple[KernelDepend, ...]:
    value = table.raw("kernel-depends") or []
    if not isinstance(value, list):
        raise table.error("kernel-depends", f"expected a list of tables, got {value!r}")
    found = []
    for item in value:
        if not isinstance(item, dict) or ("version" in item) == ("revision" in item):
            raise table.error(
                "kernel-depends", f'expected {{repo-id = "org/name", version = 1}} or a revision, got {item!r}'
            )
        if unknown := item.keys() - {"repo-id", "version", "revision"}:
            raise table.error("kernel-depends", f"unknown key {sorted(unknown)[0]!r}")
        try:
            pin = Version.parse(f"v{item['version']}") if "version" in item else Revision.parse(str(item["revision"]))
            found.append(KernelDepend(RepoId.parse(str(item.get("repo-id"))), pin))
        except InvalidReference as error:
            raise table.error("kernel-depends", error.message) from error
    return tuple(found)
