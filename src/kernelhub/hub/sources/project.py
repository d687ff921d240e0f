"""Kernels' source trees: variants are made when they are asked for. The embedded hub is a folder of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernelhub
from kernelhub.core.refs import Pin, RepoId, Version
from kernelhub.core.trust import Origin
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import KernelNotFound, RepositoryNotFound
from kernelhub.hub.sources.base import Listing, Progress

# The organisation whose repositories come from this package, whatever others serve under that name.
EMBEDDED_ORG = "kernelhub"


@dataclass(frozen=True)
class ProjectSource:
    """Kernel projects, each a folder with a `build.toml`: `<folder>/<name>` for `org/<name>`, or one project alone."""

    folder: Path
    org: str
    name: str
    key: str
    origin: Origin
    single: str | None = None

    @classmethod
    def embedded(cls) -> ProjectSource:
        """The kernels inside this package."""
        return cls(_embedded_folder(), EMBEDDED_ORG, "the embedded hub", "embedded", Origin.EMBEDDED)

    @classmethod
    def of(cls, project: Path, repo: RepoId) -> ProjectSource:
        """One project that the user named."""
        return cls(project, repo.org, str(project), "projects", Origin.FOLDER, single=repo.name)

    def check(self) -> None:
        """Nothing to ask: the folder is looked into whenever it is asked."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        refs = self.refs(repo)
        if str(pin) in refs.values():
            return str(pin)
        if str(pin) not in refs:
            raise KernelNotFound(f"{self.name} has no {repo}@{pin} (there: {', '.join(sorted(refs))})")
        return refs[str(pin)]

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        from kernelhub.build.assemble import source_digest
        from kernelhub.build.recipe import Recipe

        project = self._project(repo)
        recipe = Recipe.load(project)
        commit = source_digest(project, recipe)[:40]
        return {"main": commit, str(Version(recipe.version)): commit}

    def listing(self, repo: RepoId, commit: str) -> Listing:
        from kernelhub.build.assemble import noarch_variants
        from kernelhub.build.recipe import Recipe

        variants = noarch_variants(Recipe.load(self._project(repo)))
        return Listing({str(variant): {"backend": backend} for variant, backend in variants.items()})

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return None

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        from kernelhub.build.assemble import assemble, source_digest
        from kernelhub.build.recipe import Recipe

        project = self._project(repo)
        recipe = Recipe.load(project)
        if source_digest(project, recipe)[:40] != commit:
            raise KernelNotFound(f"{project} changed while {repo} {BuildVariant.parse(variant)} was made from it")
        files = assemble(project, recipe, details["backend"])
        progress.expect(sum(map(len, files.values())))
        for path, data in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            progress.advance(len(data))

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def _project(self, repo: RepoId) -> Path:
        project = self.folder if self.single else self.folder / repo.name
        if repo.org != self.org or self.single not in (None, repo.name) or not (project / "build.toml").is_file():
            raise RepositoryNotFound(f"{self.name} has no {repo}")
        return project


def _embedded_folder() -> Path:
    """`_kernels` in an installed package, `kernels` beside `src` in a checkout."""
    package = Path(kernelhub.__file__).resolve().parent
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent.parent / "kernels"
