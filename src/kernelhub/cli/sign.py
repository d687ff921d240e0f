"""`kernelhub sign`: vouch for a commit that is in a hub already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line
from kernelhub.errors import InvalidReference


def sign(
    hub: Annotated[str, typer.Argument(metavar="HUB", help="The hub: a folder, or a bucket (s3://...).")],
    kernel: Annotated[str, typer.Argument(metavar="ORG/NAME@COMMIT", help="The kernel, at a commit (40 hex digits).")],
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The private key, as `kernelhub keygen` makes it.")],
    as_json: Json = False,
) -> None:
    """Sign a commit with another key, as when keys are changed. It is named by its hash, so that the hub cannot choose."""
    from kernelhub.core.refs import KernelRef, Revision
    from kernelhub.hub.publish import sign as sign_commit
    from kernelhub.hub.signing import load_signer

    ref = KernelRef.parse(kernel)
    commit = ref.pin.commit if isinstance(ref.pin, Revision) else None
    if commit is None:
        raise InvalidReference(
            f"{kernel!r} does not name a commit",
            hint='Expected "org/name@" and 40 hex digits: `kernelhub versions` has them.',
        )
    signer = load_signer(key)
    sign_commit(hub, ref.repo, commit, signer)
    if as_json:
        show_json({"kernel": str(ref.repo), "commit": commit, "hub": hub, "signed_by": signer.public.id})
    else:
        show_line(f"signed {ref.repo} at {commit} with key {signer.public.id}")
