"""How `kernelhub demo` looks: what each model's layers run, and the comparison."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kernelhub.cli.render import show_line, show_table
from kernelhub.core.words import counted

if TYPE_CHECKING:
    from kernelhub.cli.demo import Comparison, Demo, Times
    from kernelhub.layers.report_values import KernelReport, ReportRow


def show_demo(demo: Demo) -> None:
    """Print a report per model, the kernels, the comparison of all, and what went wrong."""
    for comparison in demo.comparisons:
        rows = grouped(comparison.report, comparison.proof)
        reasons = any(row[-1] for row in rows)
        show_table(
            _title(comparison),
            ("layers", "", "runs", "error", "speed", "faster", *(("why not",) if reasons else ())),
            rows if reasons else [row[:-1] for row in rows],
        )
        for name, reason in comparison.unreached.items():
            show_line(f"not reached: {name}: {reason}")
        show_line()
    show_line("error: the largest difference from the original in float64, if nothing else is said")
    show_line("speed: how many times as long the original took, on what the model calls the layer with")
    show_line()
    if builds := _builds(demo):
        show_table("kernels", ("kernel", "variant", "digest"), builds)
        show_line()
    show_table(
        "checked",
        ("model", "on", "kernels", "largest difference", "undone", ""),
        [_checked(comparison) for comparison in demo.comparisons],
    )
    show_line()
    show_table(
        "before and after",
        ("model", "timed", "faster", "before", "after", "speed"),
        [row for comparison in demo.comparisons for row in _compared(comparison)],
    )
    for comparison in demo.comparisons:
        for problem in comparison.problems:
            show_line(f"{comparison.name}: {problem}")


def grouped(report: KernelReport, proof: KernelReport | None = None) -> list[tuple[str, ...]]:
    """The report's rows, those alike but for numbers in their paths together: path, count, what it runs, and why no kernel.

    With a `proof`, what was measured of the kernels: the largest error, how much faster, and how many of them are faster,
    which the others keep their forward for.
    """
    measured = {row.path: row for row in proof.rows} if proof is not None else {}
    groups: dict[tuple[str, ...], list[ReportRow]] = {}
    for row in report.rows:
        groups.setdefault(_cells(row), []).append(measured.get(row.path, row))
    return [(path, f"{len(rows)} x", *rest, *_measured(rows), reason) for (path, *rest, reason), rows in groups.items()]


def _title(comparison: Comparison) -> str:
    every, swapped = len(comparison.report.rows), len(comparison.report.kernels)
    faster = len(comparison.proof.kernels)
    stay = f"; timed with the {faster} that were faster here"
    return f"{comparison.name}: {swapped} of {counted(every, 'layer')} {'runs' if swapped == 1 else 'run'} a kernel{stay if swapped else ''}"


def _measured(rows: list[ReportRow]) -> tuple[str, ...]:
    """What holds for all of these layers: the largest error, the speeds that were measured, how many kernels were faster."""
    faster = [row.outcome == "kernel" for row in rows if row.max_error is not None or row.speedup is not None]
    errors = [row.max_error for row in rows if row.max_error is not None]
    speeds = sorted({row.speedup for row in rows if row.speedup is not None})
    different = [row.reason for row in rows if "not equal" in row.reason]
    others = sorted({row.reference for row in rows if row.reference not in (None, "float64")})
    against = f" (against the {' and the '.join(others)})" if others else ""
    return (
        "NOT EQUAL" if different else f"{max(errors):.2g}{against}" if errors else "",
        " to ".join(dict.fromkeys(f"{speed:.2f}x" for speed in (speeds[0], speeds[-1]))) if speeds else "",
        f"{sum(faster)} of {len(rows)}" if faster else "",
    )


def _cells(row: ReportRow) -> tuple[str, ...]:
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path or "(the model)")
    if row.outcome != "kernel":
        return pattern, "its own forward", row.reason
    return pattern, f"{row.repository}:{row.layer}", ""


def _builds(demo: Demo) -> list[tuple[str, str, str]]:
    """Each kernel that a layer runs, once: its name, variant and digest."""
    rows = [row for comparison in demo.comparisons for row in comparison.report.kernels]
    return sorted({(row.repository or "", row.variant or "", (row.digest or "")[:19]) for row in rows})


def _checked(comparison: Comparison) -> tuple[str, ...]:
    """That the outputs are those from before, with the kernels and without them again."""
    return (
        comparison.name,
        f"{comparison.device}, {comparison.dtype}",
        f"{len(comparison.report.kernels)}/{len(comparison.report.rows)}",
        f"{comparison.max_error:.2g} (allowed {comparison.tolerance:g})",
        "exactly" if comparison.restored else "NOT",
        "FAILED" if comparison.problems else "ok",
    )


def _compared(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for the whole input, and one for a token more where that was timed."""
    faster = len(comparison.proof.kernels)
    whole = "forward" if comparison.step is None else "prefill"
    rows: list[tuple[str, ...]] = [
        (comparison.name, f"{whole}, {comparison.inputs}", str(faster), *_timed(comparison.forward, faster))
    ]
    if comparison.step is not None:
        rows.append(("", "one-token step", "", *_timed(comparison.step, faster)))
    return rows


def _timed(times: Times, faster: int) -> tuple[str, str, str]:
    (before, after), (low, high) = times.middle, times.speedup_range
    if not faster:
        return f"{before * 1e3:.2f} ms", "", "no kernel was faster"
    return f"{before * 1e3:.2f} ms", f"{after * 1e3:.2f} ms", f"{times.speedup:.2f}x ({low:.2f} to {high:.2f})"
