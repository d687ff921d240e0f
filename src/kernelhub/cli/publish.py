"""`kernelhub publish`: a kernel repository's folder into a hub."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line


def publish(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The kernel: a folder with build/<variant>/, as `kernelhub build` makes it."
        ),
    ],
    hub: Annotated[str, typer.Argument(metavar="HUB", help="The hub: a folder, or a bucket (s3://...).")],
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="ORG/NAME", help="What to publish it as.")],
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign it with this private key (`kernelhub keygen`).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a kernel into a hub, under the version that its metadata names. The same content again changes nothing."""
    from kernelhub.core.refs import RepoId
    from kernelhub.hub.publish import publish as publish_folder
    from kernelhub.hub.signing import load_signer
    from kernelhub.settings import Settings

    signer = load_signer(sign) if sign else None
    epoch = Settings.from_env().source_date_epoch
    now = int(time.time()) if epoch is None else epoch
    done = publish_folder(folder, hub, RepoId.parse(repo_id), epoch=now, signer=signer)
    facts = {"ref": done.ref, "commit": done.commit, "changed": done.changed, "signed_by": done.signed_by}
    signed = f", signed by key {done.signed_by}" if done.signed_by else ""
    if as_json:
        show_json({"kernel": repo_id, "hub": hub, **facts})
    elif done.changed:
        show_line(f"published {repo_id}@{done.ref} as {done.commit} in {hub}{signed}")
    else:
        show_line(f"{repo_id}@{done.ref} in {hub} is this already ({done.commit}){signed}")
