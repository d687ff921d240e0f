"""`kernelhub revoke`: take back commits and keys."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line
from kernelhub.core.words import counted
from kernelhub.errors import InvalidReference


def revoke(
    hub: Annotated[str, typer.Argument(metavar="HUB", help="The hub: a folder, or a bucket (s3://...).")],
    sign: Annotated[Path, typer.Option("--sign", metavar="KEY", help="The private key that takes them back.")],
    commits: Annotated[
        list[str] | None, typer.Option("--commit", metavar="COMMIT", help="A commit (40 hex digits); may be repeated.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="ID", help="A key's id (32 hex digits); may be repeated.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, as those who use them are told.")] = "",
    as_json: Json = False,
) -> None:
    """Take back commits and keys: whoever trusts the signing key no longer runs them, wherever they come from."""
    from kernelhub.core.refs import is_commit
    from kernelhub.core.revocations import is_key_id
    from kernelhub.hub.publish import time_text
    from kernelhub.hub.revocations import revoke as add
    from kernelhub.hub.signing import load_signer
    from kernelhub.settings import Settings

    for text, fits, kind in [
        *((item, is_commit, "a commit: 40 hex digits") for item in commits or ()),
        *((item, is_key_id, "a key's id: 32 hex digits") for item in keys or ()),
    ]:
        if not fits(text):
            raise InvalidReference(f"{text!r} is not {kind}")
    epoch = Settings.from_env().source_date_epoch
    listed = add(
        hub,
        load_signer(sign),
        time=time_text(int(time.time()) if epoch is None else epoch),
        keys=dict.fromkeys(keys or (), reason),
        commits=dict.fromkeys(commits or (), reason),
    )
    if as_json:
        show_json({"hub": hub, **listed.to_json()})
    else:
        show_line(
            f"list {listed.number} of key {listed.key} in {hub} has {counted(len(listed.commits), 'commit')} and "
            f"{counted(len(listed.keys), 'key')}"
        )
