"""How `kernelhub demo` looks: what each model's layers run, and the comparison."""

from __future__ import annotations

import re
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING

from kernelhub.cli.render import show_line, show_table

if TYPE_CHECKING:
    from kernelhub.cli.demo import Comparison, Demo
    from kernelhub.layers.report import KernelReport, ReportRow


def show_demo(demo: Demo) -> None:
    """Print a report per model, the comparison of all, and what went wrong."""
    for comparison in demo.comparisons:
        show_table(
            f"{comparison.name}: {len(comparison.report.kernels)} of {len(comparison.report.rows)} layers run a kernel",
            ("layers", "", "class", "runs", "variant", "digest", "why not"),
            grouped(comparison.report),
        )
        for name, reason in comparison.unreached.items():
            show_line(f"not reached: {name}: {reason}")
        show_line()
    show_table(
        "before and after",
        ("model", "on", "kernels", "largest difference", "before", "after", "speed", "undone", ""),
        [_compared(comparison) for comparison in demo.comparisons],
    )
    for comparison in demo.comparisons:
        for problem in comparison.problems:
            show_line(f"{comparison.name}: {problem}")


def grouped(report: KernelReport) -> list[tuple[str, ...]]:
    """The report's rows, those alike but for numbers in their paths together: path, count, class, what it runs."""
    counts = Counter(_cells(row) for row in report.rows)
    return [(path, f"{count} x", *rest) for (path, *rest), count in counts.items()]


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


def _compared(comparison: Comparison) -> tuple[str, ...]:
    low, high = comparison.speedup_range
    return (
        comparison.name,
        f"{comparison.device}, {comparison.dtype}",
        f"{len(comparison.report.kernels)}/{len(comparison.report.rows)}",
        f"{comparison.max_error:.2g} (allowed {comparison.tolerance:g})",
        f"{median(comparison.before) * 1e3:.1f} ms",
        f"{median(comparison.after) * 1e3:.1f} ms",
        f"{comparison.speedup:.2f}x ({low:.2f} to {high:.2f})",
        "exactly" if comparison.restored else "NOT",
        "FAILED" if comparison.problems else "ok",
    )
