"""`kernelhub bundle`: kernels in one file, for machines without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json, Trust, TrustAll
from kernelhub.cli.render import progress_bar, show_json, show_line, show_table, size
from kernelhub.errors import InvalidReference

app = typer.Typer(
    help="Carry kernels in one file to machines without a network.", no_args_is_help=True, rich_markup_mode=None
)
File = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle, such as kernels.khb.")]


@app.command(short_help="Write kernels into one file.")
def create(
    file: File,
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="ORG/NAME@v1", help="The kernels, with version or revision.")
    ] = None,
    lockfile: Annotated[
        Path | None, typer.Option(help="Bundle what this kernels.lock names instead, at its commits.")
    ] = None,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="Every variant, source and benchmarks, not only this machine's.")
    ] = False,
    trust: Trust = None,
    trust_remote_code: TrustAll = False,
    as_json: Json = False,
) -> None:
    """Write kernels, and those that they depend on, into one file: manifests, signatures, archives, and a lock."""
    from kernelhub.core.refs import KernelRef
    from kernelhub.hub.bundling import create as write
    from kernelhub.hub.client import Hub, read_lock
    from kernelhub.hub.locks import make_lock
    from kernelhub.hub.publish import time_text

    if bool(kernels) == (lockfile is not None):
        raise InvalidReference("expected kernels or --lockfile, one of them", hint="Such as org/name@v1.")
    trusted = trust_remote_code or tuple(trust or ())
    with progress_bar(str(file)) as progress:
        hub = Hub(progress=progress)
        wanted = [KernelRef.of(name) for name in kernels or ()]
        lock = read_lock(lockfile) if lockfile else make_lock(hub, wanted, trust_remote_code=trusted)
        epoch = hub.settings.source_date_epoch
        made = write(
            hub,
            file,
            lock,
            time=time_text(int(time.time()) if epoch is None else epoch),
            all_variants=all_variants,
            trust_remote_code=trusted,
        )
    rows = [
        {"kernel": str(item.locked), "commit": item.locked.commit, "variants": list(item.variants)} for item in made
    ]
    count = file.stat().st_size
    if as_json:
        show_json({"bundle": str(file), "bytes": count, "kernels": rows})
    else:
        cells = [(row["kernel"], str(row["commit"])[:12], ", ".join(row["variants"])) for row in rows]
        show_table(f"{file}, {size(count)}", ("kernel", "commit", "variants"), cells)


@app.command(short_help="Check a bundle and install its kernels.")
def install(
    file: File,
    lockfile: Annotated[Path | None, typer.Option(help="Also write the bundle's kernels.lock here.")] = None,
    accept_older: Annotated[
        bool, typer.Option("--accept-older", help="Let installed versions become what they were before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a bundle and install it; loading its kernels afterwards sends nothing.

    It grants no trust: a signature, KERNELHUB_TRUST or trust_remote_code has to let a kernel run, as from any hub.
    """
    from kernelhub.hub.client import Hub
    from kernelhub.hub.locks import write_lock
    from kernelhub.hub.unbundling import install as put

    with progress_bar(str(file)) as progress:
        hub = Hub(progress=progress)
        keys = [item.key for item in hub.settings.trusted_keys]
        lock, kernels = put(file, hub.store, keys=keys, accept_older=accept_older, progress=progress)
    if lockfile is not None:
        write_lock(lockfile, lock)
    rows = [{"kernel": str(item.locked), "commit": item.commit, "variants": list(item.variants)} for item in kernels]
    if as_json:
        show_json({"bundle": str(file), "store": str(hub.store.root), "kernels": rows})
    else:
        cells = [(row["kernel"], str(row["commit"])[:12], ", ".join(row["variants"])) for row in rows]
        show_table(f"{file} is installed in {hub.store.root}", ("kernel", "commit", "variants"), cells)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the kernels that bundles brought."""
    from kernelhub.hub.bundles import installed
    from kernelhub.hub.client import open_store

    store = open_store()
    rows = [{"kernel": str(repo), "ref": ref, "commit": commit} for repo, ref, commit in installed(store)]
    if as_json:
        show_json({"store": str(store.root), "kernels": rows})
    else:
        show_table(f"{store.root}", ("kernel", "ref", "commit"), [tuple(row.values()) for row in rows])


@app.command(short_help="Take out what bundles brought.")
def remove(
    kernels: Annotated[list[str], typer.Argument(metavar="ORG/NAME", help="The kernels, without a version.")],
    as_json: Json = False,
) -> None:
    """Take out what bundles brought of these kernels, so that hubs are asked for them again."""
    from kernelhub.core.refs import RepoId
    from kernelhub.hub.bundles import installed
    from kernelhub.hub.bundles import remove as take_out
    from kernelhub.hub.client import open_store

    store, repos = open_store(), [RepoId.parse(name) for name in kernels]
    brought = {repo for repo, _, _ in installed(store)}
    if missing := [str(repo) for repo in repos if repo not in brought]:
        raise InvalidReference(
            f"no bundle brought {' or '.join(missing)}", hint="`kernelhub bundle list` shows what bundles brought."
        )
    freed = take_out(store, repos)
    if as_json:
        show_json({"store": str(store.root), "bytes": freed})
    else:
        show_line(f"removed {size(freed)}")
