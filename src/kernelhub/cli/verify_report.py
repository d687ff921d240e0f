"""`kernelhub verify-report`: a saved report checked again, here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import progress_bar, show_json, show_line, show_table
from kernelhub.core.words import counted


def verify_report(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="What KernelReport.save wrote.")],
    as_json: Json = False,
) -> int:
    """Fetch the kernels that a saved report names, by commit, and hash them; nothing is imported, nothing measured.

    Ends with 0 where all are what the report says, 1 where some cannot be had here, 4 where one is different or revoked.
    """
    from kernelhub.hub.client import Hub
    from kernelhub.layers.receipt import DIFFERENT, SAME, check_report
    from kernelhub.layers.report_values import KernelReport

    read = KernelReport.load(report)
    with progress_bar(str(report)) as progress:
        kernels = check_report(read, Hub(progress=progress))
    checked = sum(kernel.layers for kernel in kernels if kernel.state == SAME)
    named = sum(kernel.layers for kernel in kernels)
    if as_json:
        show_json(
            {
                "model": read.model,
                "machine": dict(read.machine),
                "kernels": [asdict(kernel) for kernel in kernels],
                "layers": named,
                "checked": checked,
            }
        )
    else:
        cells = [
            (
                one.repository,
                (one.commit or "")[:12],
                one.variant,
                (one.digest or "")[:19],
                one.layers,
                one.state,
                one.reason,
            )
            for one in kernels
        ]
        show_table(read.model, ("kernel", "commit", "variant", "digest", "layers", "here", "why"), cells)
        runs = f"{counted(named, 'layer')} with a kernel {'runs' if checked == 1 else 'run'} what is here"
        show_line(f"{checked} of {runs}; figures were not measured again")
    if any(kernel.state == DIFFERENT for kernel in kernels):
        return 4
    return 0 if checked == named else 1
