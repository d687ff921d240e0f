"""`kernelhub serve`: a hub over HTTP, for clients of the Hugging Face Hub's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.render import show_line


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A hub's folder, or a folder of kernels (<org>/<name>/build/...).")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8765,
) -> None:
    """Serve a folder of kernels as the Hugging Face Hub does, so that HF_ENDPOINT can point at it."""
    from kernelhub.hub.server import listen

    with listen(folder, host, port) as server:
        show_line(f"serving {folder} at {server.url} (Ctrl-C ends it); use it with HF_ENDPOINT={server.url}")
        server.wait()
