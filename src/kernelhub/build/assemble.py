"""A project's Python becomes a variant's files: pure, so that the same sources always give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kernelhub.build.recipe import Recipe
from kernelhub.core.backends import BY_NAME
from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.digest import Digest
from kernelhub.core.metadata import BackendInfo, Metadata
from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.core.variants import BuildVariant, Framework, NoArch
from kernelhub.errors import InvalidMetadata

# What assembling adds to the sources; a new number gives new commits to all.
EDITION = 1

_OPS = '''"""The ops of this build: `torch.ops.{ident}`."""

import torch

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


def noarch_variants(recipe: Recipe) -> dict[BuildVariant, str]:
    """The noarch variants of a project, with the backend of each."""
    return {BuildVariant(Framework("noarch"), NoArch(backend)): backend for backend in recipe.backends}


def sources(project: Path, recipe: Recipe) -> dict[str, bytes]:
    """The Python files of a project, by their path in the package.

    Raises `InvalidMetadata` where there is no `__init__.py`.
    """
    package = project / "torch-ext" / recipe.python_name
    found = {
        safe_path(path.relative_to(package).as_posix()): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix.removeprefix(".") in recipe.pyext and path.is_file() and not is_bytecode(path.as_posix())
    }
    if "__init__.py" not in found:
        raise InvalidMetadata(f"{package} has no __init__.py")
    return found


def source_digest(project: Path, recipe: Recipe) -> str:
    """The hash (64 hex digits) of all that a noarch build is made from."""
    files = {path: sha256_hex(data) for path, data in sources(project, recipe).items()}
    files["build.toml"] = sha256_hex((project / "build.toml").read_bytes())
    return sha256_hex(canonical_json({"edition": EDITION, "files": files}))


def assemble(project: Path, recipe: Recipe, backend: str) -> Mapping[str, bytes]:
    """The files of the noarch variant for a backend, metadata.json with its digest among them."""
    ident = f"_{recipe.python_name}_{backend}_{source_digest(project, recipe)[:12]}"
    files = sources(project, recipe)
    files.setdefault("_ops.py", _OPS.format(ident=ident).encode())
    files.setdefault(f"{recipe.python_name}/__init__.py", _COMPATIBILITY.encode())
    metadata = Metadata(
        name=recipe.name,
        id=ident,
        version=recipe.version,
        license=recipe.license,
        backend=BackendInfo(BY_NAME[backend].name, (recipe.archs or {}).get(backend, ())),
        python_depends=recipe.python_depends_of(backend),
        kernel_depends=recipe.kernel_depends_of(backend),
        upstream=recipe.upstream,
        source=recipe.source,
        digest=Digest.of(files),
    )
    return {**files, "metadata.json": metadata.to_text().encode()}
