"""The user's own folder of builds: verified and loaded where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import Pin, RepoId
from kernelhub.core.trust import Origin
from kernelhub.core.variants import BuildVariant, parse_variant
from kernelhub.errors import InvalidMetadata, InvalidReference, KernelNotFound, RepositoryNotFound
from kernelhub.hub.sources.base import LOCAL, Listing, Progress, Source
from kernelhub.hub.sources.project import Building, ProjectSource
from kernelhub.settings import user_path


@dataclass(frozen=True)
class LocalSource:
    """Variants of one repository in a folder. `variants` maps each variant's name to where it lies."""

    repo: RepoId
    folder: Path
    variants: Mapping[str, Path]
    key: str = "local"
    origin: Origin = Origin.FOLDER

    @property
    def name(self) -> str:
        return str(self.folder)

    def check(self) -> None:
        """Nothing to ask: the folder is looked into whenever it is asked."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        self._check(repo)
        return LOCAL

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        self._check(repo)
        return {}

    def listing(self, repo: RepoId, commit: str) -> Listing:
        self._check(repo)
        return Listing({name: {} for name in self.variants})

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        return None

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return None

    def revocations(self, key_id: str) -> bytes | None:
        return None

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        raise InvalidReference(f"{self.folder} is loaded where it lies; {repo} {variant} is not copied from it")

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        raise KernelNotFound(f"{self.name} has no {part} of {repo}")

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        self._check(repo)
        return self.variants.get(variant)

    def _check(self, repo: RepoId) -> None:
        if repo != self.repo:
            raise RepositoryNotFound(f"{self.folder} is {self.repo}, not {repo}")


def local_source(path: Path, repo: RepoId | None = None, building: Building | None = None) -> tuple[Source, RepoId]:
    """The source for a folder that the user named, and what its kernel is called.

    The folder is a kernel repository (with `build/`), its `build` folder, one variant's folder, or a source tree (with
    `build.toml`, and no `build/` or one that `kernelhub build` made from other sources than are there now). `building` is
    for source trees. Raises `InvalidReference`, which says what was expected.
    """
    path = user_path(path)
    if not path.is_dir():
        raise InvalidReference(f"{path} is not a folder", hint="Expected the folder of a kernel.")
    repo = repo or RepoId("local", _name(path))
    if (path / "build.toml").is_file() and (not _folders(path / "build") or edited(path)):
        return ProjectSource.of(path, repo, building), repo
    if (path / "metadata.json").is_file() and isinstance(parse_variant(path.name), BuildVariant):
        return LocalSource(repo, path, {path.name: path}), repo
    builds = path / "build" if (path / "build").is_dir() else path
    variants = {item.name: item for item in _folders(builds)}
    if not any(isinstance(parse_variant(name), BuildVariant) for name in variants):
        raise InvalidReference(
            f"{path} is no kernel",
            hint="Expected a folder with build/<variant>/, a build folder, one variant's folder (with its name), or a "
            "source tree with build.toml.",
        )
    return LocalSource(repo, path, variants), repo


def _folders(builds: Path) -> list[Path]:
    """The folders in a build folder that may be variants, by name; none where there is no such folder."""
    items = sorted(builds.iterdir()) if builds.is_dir() else []
    return [item for item in items if item.is_dir() and not item.name.startswith(".")]


def edited(project: Path) -> bool:
    """Whether what lies in `build/` was made here, and from other sources; builds of other tools are taken as they are.

    Raises `InvalidMetadata` where it was made here and the sources cannot be read any more.
    """
    from kernelhub.build.assemble import BUILT_WITH
    from kernelhub.build.recipe import Recipe
    from kernelhub.build.sources import source_digest

    made_of = set()
    for file in sorted((project / "build").glob("*/metadata.json")):
        try:
            made_of.add(Metadata.parse(file.read_bytes()).raw[BUILT_WITH]["sources"])
        except (InvalidMetadata, KeyError, TypeError):
            return False
    return bool(made_of) and made_of != {source_digest(project, Recipe.load(project))}


def _name(path: Path) -> str:
    """A name that a repository can have, from that of a folder."""
    kept = "".join(char if char.isascii() and char.isalnum() else "_" for char in path.resolve().name)
    return kept[:90] or "kernel"
