"""A project's Python and what was compiled become a variant's files: pure, so that the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelhub import __version__
from kernelhub.build.compile import Steps, compile_plan
from kernelhub.build.ninja import plan
from kernelhub.build.recipe import Recipe
from kernelhub.build.sources import native_files, python_files, source_digest
from kernelhub.build.targets import Target, noarch_targets
from kernelhub.build.toolchain import Toolchain, ready
from kernelhub.core.backends import BY_NAME
from kernelhub.core.digest import Digest
from kernelhub.core.metadata import BackendInfo, Metadata, Provenance
from kernelhub.core.paths import safe_path
from kernelhub.errors import InvalidMetadata
from kernelhub.hub.checks import python_packages

# The key of metadata.json under which a build says what it was made from; readers that do not know it keep it.
BUILT_WITH = "kernelhub"

_OPS = '''"""The ops of this build: `torch.ops.{ident}`."""

import torch
{load}
ops = torch.ops.{ident}


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an op of this build: "{ident}::<name>"."""
    return f"{ident}::{{name}}"
'''

_COMPATIBILITY = '''"""The kernel's symbols, for clients that look for a package of its name."""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location(
    f"{__name__}_kernel", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
_kernel = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _kernel
_spec.loader.exec_module(_kernel)
globals().update({name: value for name, value in vars(_kernel).items() if not name.startswith("__")})
'''


@dataclass(frozen=True)
class Workshop:
    """Where and how things are compiled: the toolchain, a folder for its work, how many steps at a time."""

    toolchain: Toolchain
    folder: Path
    jobs: int | None = None
    steps: Steps | None = None


def make_variant(
    project: Path,
    recipe: Recipe,
    target: Target,
    workshop: Workshop | None,
    provenance: Mapping[str, Provenance] | None = None,
) -> dict[str, bytes]:
    """The files of a variant, metadata.json with its digest among them. A compiled target needs a `workshop`.

    Raises `BuildFailed`, or `InvalidMetadata` where the project is not what it should be.
    """
    digest = source_digest(project, recipe)
    files = python_files(project, recipe)
    _check_shadowed(files, recipe.python_name)
    python_packages(recipe.python_depends_of(target.backend), BY_NAME[target.backend].name)  # as the loader asks
    built_with: dict[str, Any] = {"version": __version__, "sources": digest}
    load = ""
    if target.compiled:
        assert workshop is not None
        toolchain = ready(workshop.toolchain)
        made = plan(recipe, target, toolchain, native_files(project, recipe), digest)
        ident = made.ident
        library = compile_plan(made, toolchain, workshop.folder, jobs=workshop.jobs, steps=workshop.steps)
        _add(files, f"{ident}.abi3.so", library)
        built_with["toolchain"] = toolchain.identity
        load = f"\nfrom . import {ident}  # registers the ops\n"
    else:
        ident = f"_{recipe.python_name}_{target.backend}_{digest[:12]}"
    _add(files, "_ops.py", _OPS.format(ident=ident, load=load).encode())
    _add(files, f"{recipe.python_name}/__init__.py", _COMPATIBILITY.encode())
    metadata = _metadata(recipe, target, ident, Digest.of(files), provenance or {}, built_with)
    return {**files, "metadata.json": metadata.to_text().encode()}


def assemble(project: Path, recipe: Recipe, backend: str) -> dict[str, bytes]:
    """The files of the noarch variant for a backend."""
    target = next(item for item in noarch_targets(recipe) if item.backend == backend)
    return make_variant(project, recipe, target, None)


def _add(files: dict[str, bytes], path: str, data: bytes) -> None:
    """A file that the builder makes; a project that has it too would get another than it wrote."""
    if path in files:
        raise InvalidMetadata(f"torch-ext: {path} is a file that the builder makes", hint="Give yours another name.")
    files[safe_path(path)] = data


def _check_shadowed(files: Mapping[str, bytes], python_name: str) -> None:
    """Refuse a module of the kernel's own name: the package that the builder makes would be imported for it."""
    for path in files:
        if path == f"{python_name}.py" or path.startswith(f"{python_name}/"):
            raise InvalidMetadata(
                f"torch-ext/{python_name}: {path} would never be imported: the builder makes a package {python_name} there",
                hint="Give yours another name.",
            )


def _metadata(
    recipe: Recipe,
    target: Target,
    ident: str,
    digest: Digest,
    provenance: Mapping[str, Provenance],
    built_with: Mapping[str, Any],
) -> Metadata:
    archs = target.archs if target.compiled else recipe.archs.get(target.backend, ())
    return Metadata(
        name=recipe.name,
        id=ident,
        version=recipe.version,
        license=recipe.license,
        backend=BackendInfo(BY_NAME[target.backend].name, archs),
        python_depends=recipe.python_depends_of(target.backend),
        kernel_depends=recipe.kernel_depends_of(target.backend),
        upstream=recipe.upstream,
        source=recipe.source,
        digest=digest,
        provenance=provenance,
        raw={BUILT_WITH: dict(built_with)},
    )
