"""`kernelhub get`: fetch a kernel for this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelhub.cli.options import Backend, Json, Kernel, Refresh, Trust
from kernelhub.cli.render import progress_bar, show_json, show_line


def get(
    kernel: Kernel,
    backend: Backend = None,
    trust: Trust = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Trust every repository.")] = False,
    refresh: Refresh = False,
    accept_older: Annotated[
        bool, typer.Option("--accept-older", help="Ask the hub now, and take what it says though it was newer before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a kernel for this machine, with what it depends on; prints the verified folder."""
    from kernelhub.core.refs import KernelRef
    from kernelhub.hub.client import Hub

    with progress_bar(kernel) as progress:
        path = Hub(progress=progress).install(
            KernelRef.of(kernel),
            backend=backend,
            trust_remote_code=trust_remote_code or tuple(trust or ()),
            refresh=refresh,
            accept_older=accept_older,
        )
    if as_json:
        show_json({"kernel": kernel, "variant": path.name, "path": str(path)})
    else:
        show_line(str(path))
