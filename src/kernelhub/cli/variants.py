"""`kernelhub variants`: the builds of a kernel, and why this machine takes one."""

from __future__ import annotations

from kernelhub.cli.options import Backend, Json, Kernel
from kernelhub.cli.render import show_json, show_table


def variants(kernel: Kernel, backend: Backend = None, as_json: Json = False) -> int:
    """List a kernel's builds: those that run here, best first, then the others with the reason. Ends with 1 if none runs."""
    from kernelhub.core.refs import KernelRef
    from kernelhub.core.variants import VariantAccepted
    from kernelhub.hub.client import Hub

    ranked = Hub().variants(KernelRef.of(kernel), backend=backend)
    rows = [
        {
            "variant": item.variant.variant_str,
            "runs_here": isinstance(item, VariantAccepted),
            "reason": None if isinstance(item, VariantAccepted) else item.reason,
        }
        for item in ranked
    ]
    if as_json:
        show_json({"kernel": kernel, "variants": rows})
    else:
        cells = [
            (row["variant"], "yes, and chosen" if index == 0 else "yes", "")
            if row["runs_here"]
            else (row["variant"], "no", row["reason"])
            for index, row in enumerate(rows)
        ]
        show_table(kernel, ("variant", "runs here", "why not"), cells)
    return 0 if any(row["runs_here"] for row in rows) else 1
