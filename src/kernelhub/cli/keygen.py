"""`kernelhub keygen`: a key to sign kernels with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line


def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where the private key goes; FILE.pub is the public one.")
    ],
    as_json: Json = False,
) -> None:
    """Make a signing key: FILE, which only you can read, and FILE.pub, which those who trust you need."""
    from kernelhub.hub.signing import PUBLIC_SUFFIX, generate

    key = generate(file)
    public = f"{file}{PUBLIC_SUFFIX}"
    if as_json:
        show_json({"id": key.id, "key": str(key), "private": str(file), "public": public})
    else:
        show_line(f"made key {key.id}: {file} (keep it to yourself) and {public}")
        show_line(f"whoever trusts it sets KERNELHUB_TRUSTED_KEYS={key}")
