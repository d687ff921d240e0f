"""A report as a value: its rows, its text, as a file and read from one, and what differs between two."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kernelhub.core.words import counted
from kernelhub.errors import InvalidMetadata, InvalidReference, context
from kernelhub.layers.report_text import speed, text

SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class ReportRow:
    """One kernel-aware layer. `outcome` is `kernel` or `original`.

    `stale` says that the layer moved or changed mode since its kernel was chosen: kernelize again. `shared` marks a
    function, which is one module for all models. What was measured is there where it was: see `Evidence`. `lost` says of the
    kernels that were registered beside the one that runs why it is none of them.
    """

    path: str
    class_name: str
    layer_name: str
    device: str | None
    mode: str | None
    outcome: str
    reason: str = ""
    repository: str | None = None
    layer: str | None = None
    commit: str | None = None
    variant: str | None = None
    digest: str | None = None
    reference: str | None = None
    calls: int = 0
    max_error: float | None = None
    max_relative_error: float | None = None
    worst: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    timed_on: str | None = None
    remembered: str | None = None
    lost: tuple[str, ...] = ()
    shared: bool = False
    stale: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KernelReport:
    """A row per kernel-aware layer, in the model's order. `str()` is a table.

    `notes` are about what is no layer and could run a kernel: functions that nothing has made kernel-aware. `machine` is where
    it was made: torch, the devices of the rows by name, and under torch.distributed the rank.
    """

    model: str
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def kernels(self) -> tuple[ReportRow, ...]:
        """The layers that run a kernel."""
        return tuple(row for row in self.rows if row.outcome == "kernel")

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "summary": self.summary(),
            "machine": dict(self.machine),
            "rows": rows,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> KernelReport:
        """The report that `to_dict` was made of. Raises `InvalidMetadata` [ValueError] for what is none."""
        if not isinstance(value, Mapping) or value.get("schema_version") != SCHEMA_VERSION:
            version = value.get("schema_version") if isinstance(value, Mapping) else None
            raise InvalidMetadata(
                f"a kernel report is an object with schema_version {SCHEMA_VERSION}, got {version!r:.40}",
                hint="KernelReport.save writes it; a newer kernelhub may have written this one.",
            )
        model, rows, notes = value.get("model"), value.get("rows"), value.get("notes", [])
        machine = value.get("machine", {})
        if not isinstance(model, str) or not isinstance(rows, list):
            raise InvalidMetadata("a kernel report has the text `model` and the list `rows`")
        if not isinstance(machine, Mapping) or not _texts(machine.values()) or not _texts(notes):
            raise InvalidMetadata("a kernel report's `machine` is an object of text, and its `notes` a list of it")
        return cls(model, tuple(map(_read_row, range(len(rows)), rows)), tuple(notes), dict(machine))

    @classmethod
    def load(cls, path: str | Path) -> KernelReport:
        """Read a report that `save` wrote. Raises `InvalidReference` where there is none, `InvalidMetadata`."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise InvalidReference(f"cannot read the report {path}: {error.strerror or error}") from error
        with context(str(path)):
            if len(data) > MAX_BYTES:
                raise InvalidMetadata(f"it has more than {MAX_BYTES:,} bytes")
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise InvalidMetadata(f"it is not JSON: {error}") from error
            return cls.from_dict(value)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON: a receipt, which `kernelhub verify-report` checks against the kernels it names."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def diff(self, other: KernelReport) -> tuple[str, ...]:
        """What is different in `other`, a line each: of the machine or rank, and of each layer.

        Of a layer that runs the same, errors count from a tenth of their size on, and speeds where their intervals do not
        meet. What is remembered was found of all layers of a kind together: no error of it is compared with a layer's own.
        """
        facts = dict.fromkeys((*self.machine, *other.machine))
        lines = [
            f"{name}: {self.machine.get(name, 'not known')} -> {other.machine.get(name, 'not known')}"
            for name in facts
            if self.machine.get(name) != other.machine.get(name)
        ]
        ours, theirs = ({row.path: row for row in report.rows} for report in (self, other))
        for path in dict.fromkeys((*ours, *theirs)):
            here, there = ours.get(path), theirs.get(path)
            named = path or "(the model)"
            if here is None or there is None or _ran(here) != _ran(there):
                lines.append(f"{named}: {_shown(here)} -> {_shown(there)}")
            else:
                lines += [f"{named}: {text}" for text in _changed(here, there)]
        return tuple(lines)

    def summary(self) -> str:
        """One line: how many layers run kernels, of which repositories."""
        repositories = Counter(row.repository for row in self.kernels)
        named = ", ".join(f"{count} x {name}" for name, count in sorted(repositories.items(), key=str))
        stale = sum(row.stale for row in self.rows)
        runs = "runs" if len(self.kernels) == 1 else "run"
        text = f"{len(self.kernels)} of {counted(len(self.rows), 'kernel-aware layer')} {runs} a kernel"
        return text + (f": {named}" if named else "") + (f"; {stale} stale, kernelize again" if stale else "")

    def __str__(self) -> str:
        return text(self)


# Reports from files

_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max),
    "None": lambda value: value is None,
    "tuple[str, ...]": lambda value: isinstance(value, (list, tuple)) and _texts(value),
}


def _read_row(number: int, value: Any) -> ReportRow:
    """A row as `to_dict` writes it. Raises `InvalidMetadata`, which names what is wrong with it."""
    if not isinstance(value, Mapping):
        raise InvalidMetadata(f"row {number} is no object")
    known = {field.name: field for field in fields(ReportRow)}
    for name, item in value.items():
        if name not in known:
            raise InvalidMetadata(
                f"row {number}: {name!r:.40} is nothing that this version knows",
                hint="A newer kernelhub may have written it.",
            )
        kinds = str(known[name].type).split(" | ")
        if not any(_TYPES[kind](item) for kind in kinds):
            raise InvalidMetadata(f"row {number}: {name} is {' or '.join(kinds)}, got {item!r:.60}")
    missing = [name for name, one in known.items() if one.default is MISSING and name not in value]
    if missing:
        raise InvalidMetadata(f"row {number} has no {', '.join(missing)}")
    read: Any = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    row = ReportRow(**read)
    if len({one is None for one in (row.speedup, row.speedup_low, row.speedup_high)}) > 1:
        raise InvalidMetadata(f"row {number} has some of speedup, speedup_low and speedup_high; expected all or none")
    return row


def _texts(values: Any) -> bool:
    listed = isinstance(values, Collection) and not isinstance(values, (str, bytes, Mapping))
    return listed and all(isinstance(value, str) for value in values)


# How rows look


def _ran(row: ReportRow) -> tuple[object, ...]:
    return row.outcome, row.repository, row.layer, row.commit, row.variant, row.digest


def _shown(row: ReportRow | None) -> str:
    if row is None:
        return "not there"
    if row.outcome != "kernel":
        return f"original ({row.reason})" if row.reason else "original"
    return f"{row.repository}:{row.layer} {row.variant or ''} {row.digest or ''}".replace("  ", " ")


# What a reason has of measurements, which are compared on their own: `not faster: 0.93x (0.90 to 0.96), timed on mlp`.
_SPEED = re.compile(r"(not faster): \S+x \([^)]*\)(?:, timed on [^;]+)?")
_DIFFERENCE = re.compile(r"(not equal): [^;]*")


def _changed(here: ReportRow, there: ReportRow) -> list[str]:
    """What else is different about a layer that runs the same."""
    own = not (here.remembered or there.remembered)  # else the errors are the largest of all layers of the kind
    compared = ("device", "mode", "reference", *(("calls", "worst") if own else ()))
    found = [
        f"{name} {getattr(here, name) or 'none'} -> {getattr(there, name) or 'none'}"
        for name in compared
        if getattr(here, name) != getattr(there, name)
    ]
    if _verdict(here, own) != _verdict(there, own):
        found.append(f"reason {here.reason or 'none'} -> {there.reason or 'none'}")
    one, other = here.max_error, there.max_error
    if own and one is not None and other is not None and abs(one - other) > 0.1 * max(one, other):
        found.append(f"error {one:.2g} -> {other:.2g}")
    if _apart(here, there) or _apart(there, here):
        found.append(f"speed {speed(here)} -> {speed(there)}")
    return found


def _verdict(row: ReportRow, own: bool) -> str:
    """The row's reason without figures that are no other verdict in another run."""
    reason = _SPEED.sub(r"\1", row.reason)
    return reason if own else _DIFFERENCE.sub(r"\1", reason)


def _apart(slower: ReportRow, faster: ReportRow) -> bool:
    high, low = slower.speedup_high, faster.speedup_low
    return high is not None and low is not None and high < low
