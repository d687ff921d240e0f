"""`kernelhub lock`: write down which commit and which bytes of each kernel a project uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json, Project, Trust, TrustAll
from kernelhub.cli.render import progress_bar, show_json, show_line
from kernelhub.core.words import counted


def lock(
    project: Project = Path(),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; end with 1 where the lock is not what it would be now.")
    ] = False,
    trust: Trust = None,
    trust_remote_code: TrustAll = False,
    as_json: Json = False,
) -> int:
    """Write kernels.lock: the commit, and each variant's digest, of every kernel that a project's pyproject.toml names.

    What those depend on is in it too. Hubs are asked now; nothing is imported.
    """
    from kernelhub.core.lockfile import NAME, LockFile, changes
    from kernelhub.hub.client import Hub, read_lock
    from kernelhub.hub.locks import make_lock, project_dependencies, write_lock

    wanted, path = project_dependencies(project), project / NAME
    before = read_lock(path) if path.exists() else LockFile()
    with progress_bar(str(path)) as progress:
        hub = Hub(progress=progress)
        made = make_lock(hub, wanted, trust_remote_code=trust_remote_code or tuple(trust or ()), before=before)
    lines = changes(before, made)
    stale = bool(lines) or not path.exists()
    if not check and (stale or before != made):
        write_lock(path, made)
    if as_json:
        show_json({"lock": str(path), "stale": stale, "changes": lines, "kernels": len(made.kernels)})
    else:
        for line in lines:
            show_line(line)
        state = ("is stale: run `kernelhub lock`" if stale else "is up to date") if check else "is written"
        show_line(f"{path} ({counted(len(made.kernels), 'kernel')}) {state}")
    return 1 if check and stale else 0
