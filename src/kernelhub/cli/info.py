"""`kernelhub info`: what a kernel is, where it comes from, and what this machine would run."""

from __future__ import annotations

from kernelhub.cli.options import Backend, Json, Kernel, Trust
from kernelhub.cli.render import show_json, show_table


def info(kernel: Kernel, backend: Backend = None, trust: Trust = None, as_json: Json = False) -> None:
    """Describe a kernel: its source, commit, chosen build, licence, dependencies and digest. Imports none of its code."""
    from kernelhub.core.refs import KernelRef
    from kernelhub.hub.client import Hub

    facts = Hub().describe(KernelRef.of(kernel), backend=backend, trust_remote_code=tuple(trust or ()))
    if as_json:
        show_json(facts)
    else:
        rows = [
            (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
            for name, value in facts.items()
        ]
        show_table(kernel, ("", ""), [row for row in rows if row[1] not in (None, "")])
