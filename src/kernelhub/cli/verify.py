"""`kernelhub verify`: who signed a kernel, and whether it is what they signed."""

from __future__ import annotations

from kernelhub.cli.options import Backend, Json, Kernel, Refresh
from kernelhub.cli.render import progress_bar, show_json, show_table


def verify(kernel: Kernel, backend: Backend = None, refresh: Refresh = False, as_json: Json = False) -> int:
    """Show who signed a kernel and hash every byte of this machine's build; none of its code is imported.

    Ends with 0 where somebody whom you trust signed it, 1 where nobody did, 4 where it is revoked or not what was signed.
    """
    from kernelhub.core.refs import KernelRef
    from kernelhub.hub.client import Hub
    from kernelhub.hub.gate import WRONG

    with progress_bar(kernel) as progress:
        facts = Hub(progress=progress).verify(KernelRef.of(kernel), backend=backend, refresh=refresh)
    if as_json:
        show_json(facts)
    else:
        shown = ("kernel", "hub", "commit", "published", "variant", "digest", "files", "path")
        rows = [(name, facts[name]) for name in shown if facts[name] is not None]
        rows.append(("signed by", facts["signed_by"] or f"no: {facts['unsigned']}"))
        rows += [(f"key {item['key']}", item["state"]) for item in facts["signatures"]]
        show_table(kernel, ("", ""), rows)
    if any(item["state"] == WRONG for item in facts["signatures"]):
        return 4
    return 0 if facts["signed_by"] else 1
