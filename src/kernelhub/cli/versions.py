"""`kernelhub versions`: the versions, branches and tags of a kernel."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_table


def versions(
    kernel: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The kernel.")],
    as_json: Json = False,
) -> None:
    """List a kernel's versions, and its other branches and tags, with their commits."""
    from kernelhub.core.refs import KernelRef, Version, parse_pin
    from kernelhub.hub.client import Hub

    repo = KernelRef.parse(kernel).repo
    source, refs = Hub().versions(repo)
    pins = {name: parse_pin(name) for name in refs}
    numbered = sorted((pin for pin in pins.values() if isinstance(pin, Version)), reverse=True)
    names = [*map(str, numbered), *sorted(name for name, pin in pins.items() if not isinstance(pin, Version))]
    if as_json:
        show_json({"kernel": str(repo), "hub": source.name, "refs": {name: refs[name] for name in names}})
    else:
        show_table(f"{repo} in {source.name}", ("version or ref", "commit"), [(name, refs[name]) for name in names])
