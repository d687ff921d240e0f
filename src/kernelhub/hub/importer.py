"""A verified folder becomes a module, under a name of its own; and what has been loaded.

A kernel's code is imported from outside `sys.path`, under a private root name derived from its content, so that no kernel
can replace a module of the same name and several versions live side by side. Only source is compiled: no bytecode is read
or written, whatever lies in the folder, and each source file is compared with the digest again at the moment that it is
compiled, also when that is long after the kernel was verified.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from kernelhub.core.canonical import b64
from kernelhub.core.digest import Digest
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import RepoId
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    KernelHubError,
    KernelImportError,
    KernelNotFound,
    MissingDependency,
    Violation,
)
from kernelhub.hub.verify import Verified

_PREFIX = "_kernelhub_"


@dataclass(frozen=True)
class RepoInfo:
    """Where a kernel came from: its repository, and the commit (40 hex digits)."""

    repo_id: str
    revision: str


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that was loaded in this process.

    `repo_info` is None for a kernel from the user's own folder; `digest` stands for every file (`sha256-...`), `depends`
    has those of the kernels that it depends on, and that they do.
    """

    metadata: Metadata
    module: ModuleType
    repo_info: RepoInfo | None
    path: Path
    variant: BuildVariant | None
    digest: str
    depends: tuple[str, ...] = ()


@dataclass
class Importer:
    """Imports verified folders, once each, and remembers them. One serves the process."""

    _lock: threading.RLock = field(default_factory=threading.RLock)
    _modules: dict[str, ModuleType] = field(default_factory=dict)
    _loaded: list[LoadedKernel] = field(default_factory=list)
    _natives: dict[str, tuple[str, str]] = field(default_factory=dict)

    def load(
        self,
        verified: Verified,
        variant: BuildVariant | None,
        repo_info: RepoInfo | None,
        dependencies: Mapping[RepoId, ModuleType],
        depends: tuple[str, ...] = (),
    ) -> LoadedKernel:
        """The kernel in the folder; one that is loaded already with the same dependencies, from wherever, is the same module.

        `depends` are the digests of all that `dependencies` brought. Raises `IntegrityError` where another build with the
        same id is loaded (their ops would mix), or the same build with other dependencies, which it holds on to,
        `InvalidMetadata` where there is no `__init__.py`, `MissingDependency` where its code imports what is not installed.
        """
        needs = " ".join(sorted(f"{repo}={module.__name__}" for repo, module in dependencies.items()))
        name = _module_name(verified, needs)
        with self._lock:
            if name not in self._modules:
                self._claim(verified, needs)
                with _dependencies_of(verified.metadata, dependencies):
                    self._modules[name] = _import(name, verified)
            kernel = LoadedKernel(
                verified.metadata, self._modules[name], repo_info, verified.path, variant, verified.digest.text, depends
            )
            if kernel not in self._loaded:
                self._loaded.append(kernel)
            return kernel

    def loaded(self) -> list[LoadedKernel]:
        """All kernels that were loaded, in order."""
        with self._lock:
            return list(self._loaded)

    def _claim(self, verified: Verified, needs: str) -> None:
        """Ops are registered in `torch.ops.<id>`, which is global: one build an id, registered once."""
        if not verified.compiled:
            return
        ident, digest = verified.metadata.id, verified.digest.text
        loaded, loaded_with = self._natives.setdefault(ident, (digest, needs))
        if loaded != digest:
            raise IntegrityError(
                f"another build with the id {ident!r} is loaded in this process; the ops of both are torch.ops.{ident}",
                hint="Load this one in a new process, or rebuild it: builders give each build an id of its own.",
            )
        if loaded_with != needs:
            raise IntegrityError(
                f"{verified.metadata.name} is loaded in this process with other builds of the kernels that it depends on",
                hint="Load it in a new process: what is compiled is loaded once, and holds on to what it was loaded with.",
            )


def get_kernel_dep(repo_id: str) -> ModuleType:
    """A kernel that the kernel being loaded declares in its `kernel-depends`; to be called while it is imported.

    Raises `KernelNotFound` where it is not declared, or where no kernel is being loaded.
    """
    current = _current.get()
    repo = RepoId.parse(repo_id)
    if current is None:
        raise KernelNotFound(
            f"get_kernel_dep({repo_id!r}): no kernel is being loaded",
            hint="Call it at the top of the kernel's module and keep what it returns; elsewhere use get_kernel.",
        )
    metadata, modules = current
    if repo not in modules:
        names = ", ".join(str(item.repo) for item in metadata.kernel_depends) or "none"
        raise KernelNotFound(
            f"{metadata.name} does not declare that it depends on {repo} (declared: {names})",
            hint="Add it to kernel-depends in build.toml.",
        )
    return modules[repo]


_current: ContextVar[tuple[Metadata, Mapping[RepoId, ModuleType]] | None] = ContextVar("loading", default=None)


@contextmanager
def _dependencies_of(metadata: Metadata, modules: Mapping[RepoId, ModuleType]) -> Iterator[None]:
    token = _current.set((metadata, modules))
    try:
        yield
    finally:
        _current.reset(token)


def _module_name(verified: Verified, needs: str) -> str:
    text = f"{verified.digest.text} {verified.metadata.to_text()} {needs}"
    return f"{_PREFIX}{verified.metadata.id}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _import(name: str, verified: Verified) -> ModuleType:
    _finder.add(name, verified)
    try:
        return importlib.import_module(name)
    except BaseException as error:
        _finder.forget(name)
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
        if isinstance(error, KernelHubError) or not isinstance(error, Exception):
            raise
        kernel = verified.metadata.name
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(_PREFIX):
            package = error.name.partition(".")[0]
            raise MissingDependency(
                f"{kernel}: its code imports {error.name}, which is not installed", packages=[package]
            ) from error
        raise KernelImportError(f"{kernel}: its code raised {type(error).__name__}: {error}") from error


def _package_folder(verified: Verified) -> Path:
    """Where `__init__.py` lies: at the top, or (older builds) in a folder with the kernel's name."""
    for prefix in ("", f"{verified.metadata.python_name}/"):
        if f"{prefix}__init__.py" in verified.digest.files:
            return verified.path / prefix
    raise InvalidMetadata(
        f"{verified.path} has no __init__.py", hint="A kernel is a Python package: its variants start with one."
    )


class _VerifiedLoader(SourceFileLoader):
    """Compiles source that is what the digest says; neither reads nor writes bytecode."""

    def __init__(self, fullname: str, path: str, *, folder: str, digest: Digest) -> None:
        super().__init__(fullname, path)
        self._folder, self._digest = folder, digest

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        _check(path, self._folder, self._digest, source)
        return self.source_to_code(source, path)


class _VerifiedExtensionLoader(ExtensionFileLoader):
    """Opens machine code that is what the digest says."""

    def __init__(self, fullname: str, path: str, *, folder: str, digest: Digest) -> None:
        super().__init__(fullname, path)
        self._folder, self._digest = folder, digest

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _check(self.path, self._folder, self._digest, Path(self.path).read_bytes())
        return super().create_module(spec)


def _check(path: str, folder: str, digest: Digest, data: bytes) -> None:
    name = os.path.relpath(path, folder).replace(os.sep, "/")
    if digest.files.get(name) != b64(hashlib.new(digest.algorithm, data).digest()):
        kind = "different" if name in digest.files else "unknown"
        raise IntegrityError(f"{path} was changed after the kernel was verified", [Violation(kind, name)])


class _Finder(MetaPathFinder):
    """Finds loaded kernels and their submodules, and answers for nothing else."""

    def __init__(self) -> None:
        self._roots: dict[str, Verified] = {}

    def add(self, root: str, verified: Verified) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._roots[root] = verified

    def forget(self, root: str) -> None:
        self._roots.pop(root, None)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002 - the protocol's
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        verified = self._roots.get(fullname.partition(".")[0])
        if verified is None:
            return None
        source: Any = partial(_VerifiedLoader, folder=str(verified.path), digest=verified.digest)
        if path is None:
            folder = str(_package_folder(verified))
            init = os.path.join(folder, "__init__.py")  # noqa: PTH118 - what the loader wants is text
            return importlib.util.spec_from_file_location(
                fullname, init, loader=source(fullname, init), submodule_search_locations=[folder]
            )
        native: Any = partial(_VerifiedExtensionLoader, folder=str(verified.path), digest=verified.digest)
        loaders: Any = ((native, EXTENSION_SUFFIXES), (source, [".py"]))
        for entry in path:
            if spec := FileFinder(entry, *loaders).find_spec(fullname):
                return spec
        # Not None: Python's own finders would look next, and they read bytecode.
        raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


_finder = _Finder()
