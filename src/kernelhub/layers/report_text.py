"""How a report looks: what is the same for all layers in a line, what differs in a table, and each kernel's build once, below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelhub.layers.tables import UNMARKED, table

if TYPE_CHECKING:
    from kernelhub.layers.report_values import KernelReport, ReportRow

__all__ = ["speed", "text"]


def text(report: KernelReport) -> str:
    """The summary, the table of layers, that of the kernels' builds, and the notes."""
    rows = report.rows
    if not rows:
        return "\n".join([report.summary(), UNMARKED, *report.notes])
    same = {name: values.pop() for name, of in _FACTS.items() if len(values := {of(row) for row in rows} - {""}) == 1}
    columns = {name: of for name, of in _columns(rows).items() if name not in same}
    lines = [report.summary()]
    if same:
        lines.append("; ".join(f"{name}: {value}" for name, value in same.items()))
    lines.append(table([*columns], [[of(row) for of in columns.values()] for row in rows]))
    elsewhere = dict.fromkeys(row.timed_on for row in rows if _is_timed_elsewhere(row) and row.timed_on)
    if elsewhere:
        lines.append(f"* timed on another layer of its kind: {', '.join(elsewhere)}")
    builds = dict.fromkeys(map(_build, report.kernels))
    if any(any(build[1:]) for build in builds):
        lines += ["", table(("kernel", "commit", "variant", "file digest"), [*builds])]
    return "\n".join([*lines, *report.notes])


def speed(row: ReportRow) -> str:
    """How many times as fast, with its interval; empty where it was not timed."""
    if row.speedup is None:
        return ""
    return f"{row.speedup:.2f}x ({row.speedup_low:.2f} to {row.speedup_high:.2f})"


# What is mostly the same for all layers that have it.
_FACTS: dict[str, Callable[[ReportRow], str]] = {
    "device": lambda row: row.device or "",
    "mode": lambda row: row.mode or "",
    "against": lambda row: row.reference or "",
    "calls": lambda row: str(row.calls or ""),
    "remembered of": lambda row: (row.remembered or "")[:10],  # the day: seconds differ within one proof
}


def _columns(rows: Sequence[ReportRow]) -> dict[str, Callable[[ReportRow], str]]:
    builds = Counter(repository for repository, *_ in {_build(row) for row in rows if row.outcome == "kernel"})

    def runs(row: ReportRow) -> str:
        if row.outcome != "kernel":
            return "original"
        several = builds[row.repository or ""] > 1 and row.variant
        return f"{row.repository}:{row.layer}" + (f" ({row.variant})" if several else "")

    return {
        "path": lambda row: row.path or "(the model)",
        "layer": lambda row: row.layer_name,
        "runs": runs,
        "error": lambda row: "" if row.max_error is None else f"{row.max_error:.2g}",
        "of largest": lambda row: "" if row.max_relative_error is None else f"{row.max_relative_error:.2g}",
        "worst": lambda row: "" if (row.worst or "").startswith("output") else row.worst or "",
        "speed": lambda row: speed(row) + ("*" if _is_timed_elsewhere(row) else ""),
        **_FACTS,
        "notes": _notes,
    }


def _is_timed_elsewhere(row: ReportRow) -> bool:
    return row.speedup is not None and row.timed_on != row.path


def _build(row: ReportRow) -> tuple[str, str, str, str]:
    return row.repository or "", (row.commit or "")[:12], row.variant or "", (row.digest or "")[:19]


def _notes(row: ReportRow) -> str:
    reason = row.reason
    if row.speedup is not None:  # which stands beside it
        reason = reason.replace(f": {speed(row)}", "").replace(f", timed on {row.timed_on}", "")
    parts = ["shared" if row.shared else "", reason]
    return "; ".join([part for part in parts if part] + [f"lost: {one}" for one in row.lost])
