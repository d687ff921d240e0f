"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Kernel = Annotated[str, typer.Argument(metavar="ORG/NAME@v1", help="The kernel, with its version or revision.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Backend = Annotated[str | None, typer.Option(help='"cpu", or what torch was built for (the default).')]
Refresh = Annotated[bool, typer.Option("--refresh", help="Ask the hub now whether the version has moved.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="ORG/NAME", help='Trust this repository, or "org/*" a publisher; may be repeated.'),
]
TrustAll = Annotated[bool, typer.Option("--trust-remote-code", help="Trust every repository.")]
Project = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="The folder of the project: where its pyproject.toml is.")
]
