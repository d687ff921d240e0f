"""Kernel projects to build: those in `projects/`, and small ones that compile in half a second."""

from __future__ import annotations

import shutil
from pathlib import Path

from kernelfiles import write_files

PROJECTS = Path(__file__).parent / "projects"

TOML = """
[general]
name = "tiny"
version = 1
edition = 5
license = "Apache-2.0"
backends = ["cpu"]

[torch]
src = ["torch-ext/binding.cpp"]
stable-abi = "2.10"
"""
BINDING = '#include "registration.h"\n#include "value.h"\nREGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n'
PYTHON = "from ._ops import add_op_namespace_prefix\n\nVALUE = 1\nNAMESPACE = add_op_namespace_prefix('')\n"


def copied(name: str, folder: Path) -> Path:
    """A project of `projects/` as somebody has it who works on it."""
    return Path(shutil.copytree(PROJECTS / name, folder / name))


def tiny(folder: Path, *, toml: str = TOML, binding: str = BINDING, value: int = 1, noarch: bool = False) -> Path:
    """A project with an extension that has no ops: it includes Python's header and none of torch's."""
    sources = {
        "build.toml": toml + ("\n[torch-noarch]\n" if noarch else ""),
        "torch-ext/binding.cpp": binding,
        "torch-ext/value.h": f"static const int value = {value};\n",
        "torch-ext/tiny/__init__.py": PYTHON,
    }
    return write_files(folder, {path: text.encode() for path, text in sources.items()})


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """A C++ compiler that writes a line into a file for each object it makes, and that file."""
    log, script = folder / "compiled.log", folder / "counting-g++"
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {log};; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script, log
