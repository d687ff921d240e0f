"""`kernelhub check-abi`: does a compiled kernel run where its name says that it runs?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line


def check_abi(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A shared object, or a folder with some.")],
    as_json: Json = False,
) -> int:
    """Check compiled kernels: symbol versions (manylinux_2_28), Python's limited API, torch's stable ABI, libraries.

    Ends with 1 if something is wrong.
    """
    from kernelhub.build.abi import check

    reports = check(path)
    if as_json:
        show_json([vars(report) for report in reports])
    else:
        for report in reports:
            show_line(f"{report.path}: {'ok' if not report.problems else 'NOT PORTABLE'}")
            show_line(f"    asks for {', '.join(report.versions) or 'no versioned symbols'}")
            show_line(f"    needs {', '.join(report.needed) or 'no library'}")
            for problem in report.problems:
                show_line(f"    {problem}")
    return 1 if any(report.problems for report in reports) else 0
