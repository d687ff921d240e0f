"""How `kernelhub demo` looks: what each model's layers run, and the comparison."""

from __future__ import annotations

import re
from statistics import median
from typing import TYPE_CHECKING

from kernelhub.cli.render import show_line, show_table

if TYPE_CHECKING:
    from kernelhub.cli.demo import Comparison, Demo, Times
    from kernelhub.layers.report_values import KernelReport, ReportRow


def show_demo(demo: Demo) -> None:
    """Print a report per model, the comparison of all, and what went wrong."""
    for comparison in demo.comparisons:
        show_table(
            _title(comparison),
            (
                "layers",
                "",
                "class",
                "runs",
                "variant",
                "digest",
                "error",
                "against",
                "speed",
                "calls",
                "faster",
                "why not",
            ),
            grouped(comparison.report, comparison.proof),
        )
        for name, reason in comparison.unreached.items():
            show_line(f"not reached: {name}: {reason}")
        show_line()
    show_table(
        "before and after",
        ("model", "on", "kernels", "faster", "largest difference", "timed", "before", "after", "speed", "undone", ""),
        [row for comparison in demo.comparisons for row in _compared(comparison)],
    )
    for comparison in demo.comparisons:
        for problem in comparison.problems:
            show_line(f"{comparison.name}: {problem}")


def grouped(report: KernelReport, proof: KernelReport | None = None) -> list[tuple[str, ...]]:
    """The report's rows, those alike but for numbers in their paths together: path, count, class, what it runs.

    With a `proof`, what was measured of the kernels: the largest error, against what, how much faster, on how many calls,
    and how many of them are faster, which the others keep their forward for.
    """
    measured = {row.path: row for row in proof.rows} if proof is not None else {}
    groups: dict[tuple[str, ...], list[ReportRow]] = {}
    for row in report.rows:
        groups.setdefault(_cells(row), []).append(measured.get(row.path, row))
    return [(path, f"{len(rows)} x", *rest, *_measured(rows), reason) for (path, *rest, reason), rows in groups.items()]


def _title(comparison: Comparison) -> str:
    every, swapped = len(comparison.report.rows), len(comparison.report.kernels)
    faster = len(comparison.proof.kernels)
    stay = f"; timed with the {faster} that were faster here, the other {every - faster} keep their forward"
    return f"{comparison.name}: {swapped} of {every} layers run a kernel{stay if swapped else ''}"


def _measured(rows: list[ReportRow]) -> tuple[str, ...]:
    """What holds for all of these layers: the largest error, the speeds that were measured, how many kernels were faster."""
    faster = [row.outcome == "kernel" for row in rows if row.max_error is not None or row.speedup is not None]
    errors = [row.max_error for row in rows if row.max_error is not None]
    speeds = sorted({row.speedup for row in rows if row.speedup is not None})
    different = [row.reason for row in rows if "not equal" in row.reason]
    return (
        "NOT EQUAL" if different else f"{max(errors):.2g}" if errors else "",
        "/".join(sorted({row.reference for row in rows if row.reference is not None})),
        " to ".join(dict.fromkeys(f"{speed:.2f}x" for speed in (speeds[0], speeds[-1]))) if speeds else "",
        str(max((row.calls for row in rows), default=0) or ""),
        f"{sum(faster)} of {len(rows)}" if faster else "",
    )


def _cells(row: ReportRow) -> tuple[str, ...]:
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path or "(the model)")
    if row.outcome != "kernel":
        return pattern, row.class_name, "its own forward", "", "", row.reason
    return (
        pattern,
        row.class_name,
        f"{row.repository}:{row.layer}",
        row.variant or "",
        (row.digest or "")[:19],
        row.reason,
    )


def _compared(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for the whole input, and one for a token more where that was timed."""
    rows: list[tuple[str, ...]] = [
        (
            comparison.name,
            f"{comparison.device}, {comparison.dtype}",
            f"{len(comparison.report.kernels)}/{len(comparison.report.rows)}",
            str(len(comparison.proof.kernels)),
            f"{comparison.max_error:.2g} (allowed {comparison.tolerance:g})",
            f"{'forward' if comparison.step is None else 'prefill'}, {comparison.inputs}",
            *_timed(comparison.forward),
            "exactly" if comparison.restored else "NOT",
            "FAILED" if comparison.problems else "ok",
        )
    ]
    if comparison.step is not None:
        rows.append(("", "", "", "", "", "one-token step", *_timed(comparison.step), "", ""))
    return rows


def _timed(times: Times) -> tuple[str, str, str]:
    low, high = times.speedup_range
    return (
        f"{median(times.before) * 1e3:.2f} ms",
        f"{median(times.after) * 1e3:.2f} ms",
        f"{times.speedup:.2f}x ({low:.2f} to {high:.2f})",
    )
