"""`kernelhub cache`: what is in the local store."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line, show_table, size
from kernelhub.core.words import counted

app = typer.Typer(help="List, verify and prune the local store.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List every kernel in the store."""
    from kernelhub.hub.client import open_store

    store = open_store()
    refs = {(hub, repo, record.commit): ref for hub, repo, ref, record in store.refs()}
    rows = [
        {
            "kernel": str(place.repo),
            "ref": refs.get((place.hub, place.repo, place.commit)),
            "commit": place.commit,
            "variant": str(place.variant),
            "bytes": store.size(place),
            "hub": place.hub,
        }
        for place in store.places()
    ]
    if as_json:
        show_json({"store": str(store.root), "kernels": rows, "verdicts": len(list(store.verdicts()))})
        return
    cells = [
        (row["kernel"], row["ref"], str(row["commit"])[:12], row["variant"], size(int(str(row["bytes"]))), row["hub"])
        for row in rows
    ]
    show_table(f"{store.root}", ("kernel", "ref", "commit", "variant", "size", "hub"), cells)
    show_line(f"{counted(len(list(store.verdicts())), 'verdict')} of proofs")


@app.command()
def verify(as_json: Json = False) -> int:
    """Hash every byte in the store against what was published. Ends with 4 if something differs."""
    from kernelhub.hub.client import open_store

    store = open_store()
    results = [(place, error) for place, error in store.verify_all()]
    if as_json:
        show_json(
            [
                {"kernel": str(place), "path": str(store.path(place)), "error": error and str(error)}
                for place, error in results
            ]
        )
    for place, error in [] if as_json else results:
        show_line(f"{'ok ' if error is None else 'BAD'} {place}")
        if error is not None:
            show_line(f"    {error}")
    return 4 if any(error for _, error in results) else 0


@app.command(short_help="Remove what is left over; with names, kernels too.")
def prune(
    kernels: Annotated[list[str] | None, typer.Argument(metavar="ORG/NAME", help="Also remove these kernels.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also remove every kernel and verdict.")] = False,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Also remove verdicts that were found longer ago than this.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove what killed processes and failed verifications left behind; with names, those kernels too.

    What proofs found of kernels that are gone goes with them.
    """
    from kernelhub.core.refs import RepoId
    from kernelhub.hub.bundles import tidy
    from kernelhub.hub.client import open_store

    store = open_store()
    repos = {RepoId.parse(name) for name in kernels or ()}
    oldest = float("-inf") if older_than is None else time.time() - older_than * 86_400
    folders = list(store.prune(lambda repo: everything or repo in repos))
    verdicts = list(store.prune_verdicts(lambda verdict: everything or verdict.time < oldest))
    removed = [*folders, *verdicts]
    freed = sum(count for _, count in removed) + tidy(store)
    if as_json:
        show_json({"store": str(store.root), "removed": [str(path) for path, _ in removed], "bytes": freed})
    else:
        show_line(f"removed {counted(len(folders), 'folder')} and {counted(len(verdicts), 'verdict')}, {size(freed)}")
