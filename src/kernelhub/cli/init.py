"""`kernelhub init`: a new kernel project."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line


def init(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="The kernel's name, or a path that ends in it.")],
    backends: Annotated[
        list[str] | None, typer.Option("--backends", metavar="NAMES", help="cpu (the default), cuda, or cpu,cuda.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a kernel project that builds, tests and benchmarks as it is."""
    from kernelhub.build.scaffold import create

    if folder.name in ("", ".."):  # the folder's own name is meant
        folder = folder.resolve()
    wanted = [name.strip() for item in backends or ["cpu"] for name in item.split(",") if name.strip()]
    written = create(folder, wanted)
    if as_json:
        show_json({"folder": str(folder), "files": [str(path) for path in written]})
        return
    for path in written:
        show_line(f"wrote    {path}")
    place = shlex.quote(str(folder))
    show_line(f"next     cd {place} && kernelhub build && python -m pytest && kernelhub benchmark")
