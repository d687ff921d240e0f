"""Kernels' source trees: variants are made when they are asked for. The embedded hub is a folder of them.

A commit is 28 hex digits of the sources and 12 of what they are built with: the compilers, torch, the devices. So an edited
source and a new compiler both give a new build, and a commit that a lock names on another machine is found here by its
first part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kernelhub
from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.refs import Pin, RepoId, Revision, Version
from kernelhub.core.trust import Origin
from kernelhub.errors import KernelHubWarning, KernelNotFound, RepositoryNotFound
from kernelhub.hub.sources.base import UNAVAILABLE, Listing, Progress
from kernelhub.warning import once

if TYPE_CHECKING:
    from kernelhub.build.recipe import Recipe
    from kernelhub.build.targets import Target
    from kernelhub.build.toolchain import Toolchain
    from kernelhub.core.metadata import KernelDepend

# The organisation whose repositories come from this package, whatever others serve under that name.
EMBEDDED_ORG = "kernelhub"

_SOURCES = 28  # hex digits of a commit that stand for the sources
_NOTHING_COMPILED = "0" * (40 - _SOURCES)
_warn = once()


def portable_commit(commit: str) -> str:
    """The commit of a project as it is named for other machines: by the sources alone."""
    return commit[:_SOURCES] + _NOTHING_COMPILED


@dataclass(frozen=True)
class Building:
    """Whether and how kernels are compiled on this machine when they are asked for.

    `mode`: `never`; `auto`, where a compiler is there, the noarch variant serving else; `always`, an error else.
    `folder` is for the compilers' work; `cxx` and `cuda_home` are the tools that the user chose.
    """

    mode: str = "never"
    folder: Path = Path("build")
    cxx: str | None = None
    cuda_home: Path | None = None


@dataclass(frozen=True)
class ProjectSource:
    """Kernel projects, each a folder with a `build.toml`: `<folder>/<name>` for `org/<name>`, or one project alone."""

    folder: Path
    org: str
    name: str
    key: str
    origin: Origin
    single: str | None = None
    building: Building = field(default_factory=Building)

    @classmethod
    def embedded(cls, building: Building | None = None) -> ProjectSource:
        """The kernels inside this package."""
        return cls(
            _embedded_folder(), EMBEDDED_ORG, "the embedded hub", "embedded", Origin.EMBEDDED,
            building=building or Building(),
        )  # fmt: skip

    @classmethod
    def of(cls, project: Path, repo: RepoId, building: Building | None = None) -> ProjectSource:
        """One project that the user named."""
        return cls(
            project, repo.org, str(project), "projects", Origin.FOLDER, single=repo.name,
            building=building or Building(),
        )  # fmt: skip

    def check(self) -> None:
        """Nothing to ask: the folder is looked into whenever it is asked."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        refs = self.refs(repo)
        if isinstance(pin, Revision) and pin.commit:
            if pin.commit[:_SOURCES] == refs["main"][:_SOURCES]:
                return refs["main"]
        elif str(pin) in refs:
            return refs[str(pin)]
        raise KernelNotFound(f"{self.name} has no {repo}@{pin} (there: {', '.join(sorted(refs))})")

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        project = self.project(repo)
        from kernelhub.build.recipe import Recipe

        recipe = Recipe.load(project)
        commit = self._commit(project, recipe)
        return {"main": commit, str(Version(recipe.version)): commit}

    def listing(self, repo: RepoId, commit: str) -> Listing:
        from kernelhub.build.recipe import Recipe
        from kernelhub.build.targets import compiled_target, noarch_targets

        recipe = Recipe.load(self.project(repo))
        found: dict[str, dict[str, str]] = {}
        compiled = set()
        if recipe.binding:
            toolchain, devices = self._machine(recipe)
            for backend in recipe.backends:
                made = compiled_target(recipe, backend, toolchain, devices)
                if made.variant is not None:
                    reason = "KERNELHUB_BUILD=never: nothing is built here" if self._never else made.reason
                    found[str(made.variant)] = _details(backend, reason)
                    compiled.add(backend)
        for target in noarch_targets(recipe):
            instead = self.building.mode == "always" and target.backend in compiled
            reason = "KERNELHUB_BUILD=always asks for the compiled build" if instead else None
            found[str(target.variant)] = _details(target.backend, reason)
        return Listing(found)

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        return None

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return None

    def revocations(self, key_id: str) -> bytes | None:
        return None

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        from kernelhub.build.assemble import Workshop, make_variant

        project = self.project(repo)
        from kernelhub.build.recipe import Recipe

        recipe = Recipe.load(project)
        if self._commit(project, recipe)[:_SOURCES] != commit[:_SOURCES]:
            raise KernelNotFound(f"{project} changed while {repo} {variant} was made from it")
        target = self._target(recipe, variant, details["backend"])
        if target.compiled:
            progress.note(f"building {repo} {variant}")
            began = time.monotonic()
            files = make_variant(project, recipe, target, Workshop(self._machine(recipe)[0], self.building.folder))
            progress.note(f"built {repo} {variant} in {time.monotonic() - began:.1f} s")
        else:
            files = make_variant(project, recipe, target, None)
        progress.expect(sum(map(len, files.values())))
        for path, data in files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            progress.advance(len(data))

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        raise KernelNotFound(f"{self.name} has no {part} of {repo}")

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def kernel_depends(self, repo: RepoId) -> tuple[KernelDepend, ...]:
        """The kernels that a repository's project depends on, for whatever backend."""
        from kernelhub.build.recipe import Recipe

        tables = Recipe.load(self.project(repo)).kernel_depends.values()
        return tuple(dict.fromkeys(item for table in tables for item in table))

    @property
    def _never(self) -> bool:
        return self.building.mode == "never"

    def project(self, repo: RepoId) -> Path:
        """The folder of a repository's project. Raises `RepositoryNotFound`."""
        project = self.folder if self.single else self.folder / repo.name
        if repo.org != self.org or self.single not in (None, repo.name) or not (project / "build.toml").is_file():
            there = sorted(path.parent.name for path in self.folder.glob("*/build.toml")) if not self.single else []
            hint = f"It has {', '.join(f'{self.org}/{name}' for name in there)}." if repo.org == self.org else None
            raise RepositoryNotFound(f"{self.name} has no {repo}", hint=hint if there else None)
        return project

    def _commit(self, project: Path, recipe: Recipe) -> str:
        """What the project is now, and what it would be built with."""
        from kernelhub.build.sources import source_digest

        sources = source_digest(project, recipe)[:_SOURCES]
        if recipe.binding is None or self._never:
            return sources + _NOTHING_COMPILED
        toolchain, devices = self._machine(recipe)
        machine = {"mode": self.building.mode, "toolchain": toolchain.identity, "devices": devices}
        return sources + sha256_hex(canonical_json(machine))[: len(_NOTHING_COMPILED)]

    def _target(self, recipe: Recipe, variant: str, backend: str) -> Target:
        from kernelhub.build.targets import Skipped, compiled_target, noarch_targets

        for target in noarch_targets(recipe):
            if str(target.variant) == variant:
                return target
        made = compiled_target(recipe, backend, *self._machine(recipe))
        if isinstance(made, Skipped) or str(made.variant) != variant:
            reason = f": {made.reason}" if made.reason else ""
            raise KernelNotFound(f"{variant} cannot be built here any more{reason}")
        return made

    def _machine(self, recipe: Recipe) -> tuple[Toolchain, tuple[str, ...] | None]:
        """The toolchain, and the devices to build for; None where there is none to see: a release build serves all."""
        from kernelhub.build.toolchain import broken_cxx, find_toolchain
        from kernelhub.core.backends import BY_NAME
        from kernelhub.hub.probe import detect_host, visible_archs

        # nvcc takes 10 ms to say what it is, and devices are asked through torch: only where they matter.
        cuda = detect_host().backend == "cuda" and recipe.compiles_for("cuda")
        toolchain = find_toolchain(self.building.cxx, self.building.cuda_home, with_cuda=cuda)
        if (broken := broken_cxx(toolchain)) and toolchain.os == "linux" and self.building.mode != "never":
            _warn(f"{broken} Nothing is compiled with it.", KernelHubWarning)
        devices = tuple(sorted(set(visible_archs(BY_NAME["cuda"])))) if cuda else ()
        return toolchain, devices or None


def _details(backend: str, reason: str | None) -> dict[str, str]:
    return {"backend": backend, UNAVAILABLE: reason} if reason else {"backend": backend}


def _embedded_folder() -> Path:
    """`_kernels` in an installed package, `kernels` beside `src` in a checkout."""
    package = Path(kernelhub.__file__).resolve().parent
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent.parent / "kernels"
