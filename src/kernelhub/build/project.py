"""Build a project: its variants for this machine into `build/<variant>/`, as kernel repositories have them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelhub.build.assemble import BUILT_WITH, Workshop, make_variant
from kernelhub.build.recipe import Recipe
from kernelhub.build.sources import source_digest
from kernelhub.build.targets import Skipped, Target, targets
from kernelhub.core.metadata import Metadata, Provenance
from kernelhub.errors import BuildFailed, InvalidMetadata, InvalidReference
from kernelhub.hub.disk import writing
from kernelhub.hub.store_files import beside_of, locked, replace_folder


@dataclass(frozen=True)
class Built:
    """What became of one variant: the folder it lies in, or why it was not built. `left_out` are architectures."""

    backend: str
    variant: str | None
    path: Path | None = None
    reason: str | None = None
    left_out: tuple[str, ...] = ()


def build_project(
    project: Path,
    workshop: Workshop,
    *,
    variants: Sequence[str] = (),
    backends: Sequence[str] = (),
    devices: Sequence[str] | None = None,
) -> list[Built]:
    """Build a project's variants into its `build` folder; those that it had from other sources are removed.

    `variants` and `backends` choose; what is chosen and cannot be built is an error, all else is skipped with a reason.
    `devices` are the architectures to build for, None all that a release has. Of several processes one builds at a time.
    Raises `BuildFailed`, `InvalidMetadata`, `InvalidReference` or `StoreError`.
    """
    recipe = Recipe.load(project)
    chosen = _chosen(recipe, targets(recipe, workshop.toolchain, devices), variants, backends)
    provenance = _provenance(project)
    done = []
    with locked(workshop.folder, (project / "build").resolve()):
        _remove_stale(project, recipe)
        for item in chosen:
            if isinstance(item, Skipped):
                done.append(Built(item.backend, str(item.variant) if item.variant else None, reason=item.reason))
                continue
            files = make_variant(project, recipe, item, workshop, provenance)
            path = _write(project / "build" / str(item.variant), files)
            done.append(Built(item.backend, str(item.variant), path, left_out=item.left_out))
    if not any(item.path for item in done):
        reasons = "".join(f"\n    {item.backend}: {item.reason}" for item in done)
        raise BuildFailed(f"nothing of {project} can be built here{reasons}", error="nothing can be built here")
    return done


def _chosen(
    recipe: Recipe, found: list[Target | Skipped], variants: Sequence[str], backends: Sequence[str]
) -> list[Target | Skipped]:
    """What was asked for. Raises `InvalidReference` for what there is not, and for what cannot be built."""
    for backend in backends:
        if backend not in recipe.backends:
            raise InvalidReference(
                f"{recipe.name} is not for {backend!r}", hint=f"Its backends: {', '.join(recipe.backends)}."
            )
    names = {str(item.variant): item for item in found if item.variant}
    for name in variants:
        if name not in names:
            raise InvalidReference(
                f"{recipe.name} has no variant {name!r} here", hint=f"Expected {' or '.join(names)}."
            )
    wanted = [
        item
        for item in found
        if (not backends or item.backend in backends) and (not variants or str(item.variant) in variants)
    ]
    for item in wanted:
        # A backend that has a noarch variant too is built, as far as it can be.
        others = any(isinstance(other, Target) and other.backend == item.backend for other in wanted)
        if isinstance(item, Skipped) and (variants or (backends and not others)):
            raise InvalidReference(f"{item.variant or item.backend} cannot be built here: {item.reason}")
    return wanted


def _remove_stale(project: Path, recipe: Recipe) -> None:
    """Variants that were made here from other sources would be published with the new ones."""
    digest = source_digest(project, recipe)
    for file in sorted((project / "build").glob("*/metadata.json")):
        try:
            with writing(file.parent):
                if Metadata.parse(file.read_bytes()).raw[BUILT_WITH]["sources"] != digest:
                    shutil.rmtree(file.parent)
        except (InvalidMetadata, KeyError, TypeError):
            continue  # another tool's


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    """Put a variant in its place, whole or not at all; the one before is removed when the new one is there."""
    beside = beside_of(folder, "tmp")
    try:
        with writing(folder):
            for path, data in files.items():
                target = beside / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _provenance(project: Path) -> dict[str, Provenance]:
    """The git commit of the project, and whether it has changes; nothing where it is in no git repository."""
    commit = _git(project, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {
        "kernel": Provenance(commit.strip(), bool(_git(project, "status", "--porcelain", "--", ".", ":(exclude)build")))
    }


def _git(project: Path, *arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout if ran.returncode == 0 else ""
