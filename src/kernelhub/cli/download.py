"""`kernelhub download`: fetch what a lock names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json, Project, Trust, TrustAll
from kernelhub.cli.render import progress_bar, show_error, show_json, show_table
from kernelhub.errors import NoCompatibleVariant


def download(
    project: Project = Path(),
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="Every variant that the lock names, not only this machine's.")
    ] = False,
    trust: Trust = None,
    trust_remote_code: TrustAll = False,
    as_json: Json = False,
) -> int:
    """Fetch the kernels of a project's kernels.lock and compare each with it; loading them afterwards sends nothing.

    Ends with 1 where a kernel has no variant for this machine; the others are fetched all the same.
    """
    from kernelhub.core.lockfile import NAME
    from kernelhub.hub.client import Hub, read_lock
    from kernelhub.hub.locks import roots

    path = project / NAME if project.is_dir() else project
    lock = read_lock(path)
    trusted = trust_remote_code or tuple(trust or ())
    rows: list[dict[str, str]] = []
    unfit: list[NoCompatibleVariant] = []
    with progress_bar(str(path)) as progress:
        hub = Hub(progress=progress)
        for kernel in lock.kernels if all_variants else roots(lock):
            try:
                folders = hub.download(kernel, lock, all_variants=all_variants, trust_remote_code=trusted)
            except NoCompatibleVariant as error:
                unfit.append(error)
                continue
            rows += [
                {"kernel": str(kernel), "commit": kernel.commit, "variant": item.path.name, "path": str(item.path)}
                for item in folders
            ]
    if as_json:
        show_json({"lock": str(path), "kernels": rows, "unfit": [str(error) for error in unfit]})
    else:
        cells = [(row["kernel"], row["commit"][:12], row["variant"], row["path"]) for row in rows]
        show_table(str(path), ("kernel", "commit", "variant", "path"), cells)
    for one in unfit:
        show_error(one)
    return 1 if unfit else 0
