"""A new kernel project, which builds, tests and benchmarks as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from kernelhub.core.paths import safe_path
from kernelhub.errors import InvalidMetadata, InvalidReference
from kernelhub.hub.disk import writing

BACKENDS = ("cpu", "cuda")
_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]", re.ASCII)
_SUFFIX = {"cpu": "cpp", "cuda": "cu"}


def create(folder: Path, backends: Sequence[str]) -> list[Path]:
    """Write a project into a new folder, which names it; the files, in order.

    Raises `InvalidReference` where the name is none, or the folder has something in it already, and `StoreError` where it
    cannot be written.
    """
    name = folder.name
    if not _NAME.fullmatch(name):
        raise InvalidReference(
            f"{name!r} cannot be a kernel's name",
            hint="Expected two or more lower-case letters, digits and hyphens, a letter first and no hyphen last, such as my-relu.",
        )
    if not backends or any(item not in BACKENDS for item in backends):
        wrong = ", ".join(item for item in backends if item not in BACKENDS)
        raise InvalidReference(
            f"projects are not made for {wrong}" if wrong else "no backend is named",
            hint=f"Expected {' or '.join(BACKENDS)}, or both.",
        )
    with writing(folder):
        there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if there:
        raise InvalidReference(f"{folder} is there already", hint="Name a folder that is not there, or is empty.")
    made = files(name, list(dict.fromkeys(backends)))
    _check_name(name, made)
    written = []
    with writing(folder):
        for path, text in made.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            written.append(target)
    return written


def _check_name(name: str, made: Mapping[str, str]) -> None:
    """Refuse a name that systems reserve, and that of a module which a new project has."""
    python_name = name.replace("-", "_")
    try:
        safe_path(name)
    except InvalidMetadata as error:
        raise InvalidReference(
            f"{name!r} cannot be a folder's name on every system", hint="Name it otherwise."
        ) from error
    if f"torch-ext/{python_name}/{python_name}.py" in made:
        raise InvalidReference(f"a new project has a module {python_name}.py", hint="Name the kernel otherwise.")


def files(name: str, backends: Sequence[str]) -> dict[str, str]:
    """The files of a project, by path."""
    python_name = name.replace("-", "_")
    templates = {
        "build.toml": "build.toml",
        "CARD.md": "CARD.md",
        "torch-ext/torch_binding.cpp": "torch_binding.cpp",
        "torch-ext/torch_binding.h": "torch_binding.h",
        f"torch-ext/{python_name}/__init__.py": "__init__.py",
        f"torch-ext/{python_name}/layers.py": "layers.py",
        **{f"relu_{backend}/relu.{_SUFFIX[backend]}": f"relu.{_SUFFIX[backend]}" for backend in backends},
        f"tests/test_{python_name}.py": "test.py",
        "benchmarks/benchmark.py": "benchmark.py",
    }
    values = {
        "@name@": name,
        "@backends@": ", ".join(f'"{backend}"' for backend in backends),
        "@sections@": "".join(_section(backend) for backend in backends).rstrip("\n"),
    }
    return {path: _filled(template, values) for path, template in templates.items()}


def _section(backend: str) -> str:
    return (
        f'\n[kernel.relu_{backend}]\nbackend = "{backend}"\ndepends = ["torch"]\n'
        f'src = ["relu_{backend}/relu.{_SUFFIX[backend]}"]\n'
    )


def _filled(template: str, values: dict[str, str]) -> str:
    text = (resources.files("kernelhub.build") / "template" / f"{template}.in").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(key, value)
    return text
