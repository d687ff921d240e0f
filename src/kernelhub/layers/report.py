"""What runs in a model, layer by layer, and why the rest does not.

A row says what the module's forward *is* at the moment of asking, so it is right for copies, for models from files, and
after others changed the model. Only the reasons why layers kept their forwards are kept from the call that decided so
(one value per call, beside the model and not in it): asked later, the registrations may be others.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelhub.errors import InvalidMetadata, InvalidReference, KernelHubError, context
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.machine import summary
from kernelhub.layers.mode import Mode
from kernelhub.layers.plan import Request, decide
from kernelhub.layers.survey import (
    AwareClass,
    Devices,
    Site,
    Survey,
    capability,
    class_name,
    places,
    survey,
    uncompiled,
)
from kernelhub.layers.swap import MARKER, USES, Lost, Marker, Taken, Uses, holds, in_effect
from kernelhub.layers.tables import table

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

        Of a layer that runs the same kernel, errors count from a tenth of their size on, and speeds where their intervals do
        not meet.
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
        text = f"{len(self.kernels)} of {len(self.rows)} kernel-aware layers run a kernel"
        return text + (f": {named}" if named else "") + (f"; {stale} stale, kernelize again" if stale else "")

    def __str__(self) -> str:
        head = (
            "path",
            "class",
            "layer",
            "device",
            "mode",
            "runs",
            "commit",
            "variant",
            "file digest",
            "error",
            "of largest",
            "worst",
            "against",
            "calls",
            "speed",
            "remembered of",
            "reason",
        )
        return "\n".join([self.summary(), table(head, [_cells(row) for row in self.rows]), *self.notes])


def kernel_report(model: nn.Module) -> KernelReport:
    """What each kernel-aware layer of `model` runs: which kernel, which file digest, or why its own forward."""
    found, root = survey(model), uncompiled(model)
    runs = list(_runs_in(root))
    devices, kept = Devices(found.tree), _kept(model, found, runs)
    paths = {id(module): path for path, module in found.marked}
    rows = tuple(_row(site, devices, kept.get(site.path, _Kept()), paths) for site in _with_parts(found))
    on = {row.device for row in rows if row.device is not None}
    return KernelReport(type(root).__name__, rows, (*_noted(root), *_unfused(runs)), summary(on))


def _row(site: Site, devices: Devices, kept: _Kept, paths: Mapping[int, str]) -> ReportRow:
    marker = in_effect(site.module)
    device = devices.of(site.at)
    if marker is None:
        reason, mode = _why_not(site, kept)
        return ReportRow(
            site.path,
            class_name(site.module),
            site.aware.layer_name,
            str(device) if device else None,
            str(mode) if mode else None,
            "original",
            reason,
            **_measured(kept.evidence),
            shared=site.user is not None,
        )
    swap = marker.swap
    stale = _stale(site, marker, device) or _torn(marker)
    first = marker.fusion is None or marker.fusion.parts[0] is site.module
    reasons = [text for text in (stale, _fused(marker, paths), kept.reason, *(swap.notes if first else ())) if text]
    return ReportRow(
        site.path,
        class_name(site.module),
        site.aware.layer_name,
        str(device) if device else swap.device,
        str(swap.mode),
        "kernel",
        "; ".join(reasons),
        swap.repo,
        swap.layer,
        swap.commit,
        swap.variant,
        swap.digest,
        **_measured(swap.evidence if first else None),
        lost=swap.lost,
        shared=site.user is not None,
        stale=bool(stale),
    )


def _measured(evidence: Evidence | None) -> dict[str, Any]:
    return {} if evidence is None else vars(evidence)


def _why_not(site: Site, kept: _Kept) -> tuple[str, Mode | None]:
    """Why the layer runs its own forward, from what lies on the module, else from the call that decided so."""
    marker = site.module.__dict__.get(MARKER)
    if isinstance(marker, Lost):
        return f"its kernel could not be read back: {marker.reason}", marker.swap.mode
    if isinstance(marker, Taken):
        return f"its kernel was taken out: {marker.reason}", marker.swap.mode
    if isinstance(marker, Marker):
        other = marker.module is not site.module
        text = "its forward is bound to the module that it was copied from" if other else "its forward was replaced"
        return f"{text} after kernelize; kernelize again", marker.swap.mode
    uses = site.user.__dict__.get(USES) if site.user is not None else None
    if isinstance(uses, Uses) and any(
        not holds(uses, *stake) for stake in uses.functions.values() if stake[0] is site.module
    ):
        return "somebody else gave the function its original back; kernelize again", kept.mode
    return (kept.reason or "its original was given back", kept.mode)


def _stale(site: Site, marker: Marker, device: torch.device | None) -> str:
    """Why the kernel may not fit any more what the layer is now; empty where it does."""
    swap, chosen = marker.swap, torch.device(marker.swap.device)
    if device is not None and _kind(device) != _kind(chosen):
        return f"stale: it was kernelized for {chosen} and is on {device}; kernelize again"
    if Mode.INFERENCE in swap.mode and site.module.training and not swap.training:
        return f"stale: it was kernelized for {swap.mode} and is in training mode; kernelize again"
    return ""


def _torn(marker: Marker) -> str:
    """Of modules with one kernel: whether one of them does something else by now."""
    fusion = marker.fusion
    torn = fusion is not None and any(in_effect(part) is None for part in fusion.parts)
    return "stale: one of the layers that it is fused with has another forward; kernelize again" if torn else ""


def _fused(marker: Marker, paths: Mapping[int, str]) -> str:
    """Which other layers the kernel computes, or whose kernel computes this one."""
    fusion = marker.fusion
    if fusion is None:
        return ""
    first, *others = (paths.get(id(part), name) for part, name in zip(fusion.parts, fusion.names, strict=True))
    if fusion.parts[0] is marker.module:
        return f"it computes {', '.join(others)} too" if others else ""
    return f"computed by the kernel on {first}"


def _with_parts(found: Survey) -> list[Site]:
    """The sites, with those of modules that run a kernel with others and are not kernel-aware themselves."""
    aware = {id(site.module) for site in found.sites}
    parts = [(path, module, in_effect(module)) for path, module in found.marked if id(module) not in aware]
    if not parts:
        return found.sites
    at = places(found.tree)
    sites = list(found.sites)
    for path, module, marker in parts:
        if marker is not None and marker.fusion is not None:
            name = dict(zip(map(id, marker.fusion.parts), marker.fusion.layers, strict=True))[id(module)]
            kind = AwareClass(name, None, None, False)
            sites.append(Site(path, module, kind, at[id(module)], module.training))
    return sorted(sites, key=lambda site: site.at)


def _unfused(runs: list[tuple[str, Run]]) -> tuple[str, ...]:
    """Why layers are not computed together that a mapping names together."""
    lines = []
    for prefix, run in runs:
        lines += [f"{prefix}{path}: not fused: {reason}" for path, reason in run.kept.items() if " + " in path]
    return tuple(lines)


def _kind(device: torch.device) -> tuple[str, int | None]:
    """Devices of one kind run the same builds."""
    return device.type, capability(device)


# The reasons of the calls


@dataclass(frozen=True)
class Run:
    """What one call of `kernelize` decided: why layers kept their forwards, by path; or all of them (`everywhere`).

    `evidence` has what was measured of kernels that were not swapped in for it, by path.
    """

    mode: Mode
    everywhere: str | None
    kept: Mapping[str, str]
    evidence: Mapping[str, Evidence] = field(default_factory=dict)


class _Kept(NamedTuple):
    """Why a layer kept its forward, in a call for which mode, and what had been measured."""

    reason: str = ""
    mode: Mode | None = None
    evidence: Evidence | None = None


_runs: dict[int, tuple[weakref.ref[nn.Module], Run]] = {}
_notes: dict[int, tuple[weakref.ref[nn.Module], tuple[str, ...]]] = {}


def remember(model: nn.Module, run: Run) -> None:
    """Keep what was decided for as long as the model lives."""
    root = uncompiled(model)
    key = id(root)
    _runs[key] = (weakref.ref(root, lambda _: _runs.pop(key, None)), run)


def note(model: nn.Module, notes: tuple[str, ...]) -> None:
    """Let the reports of the model say this too, for as long as it lives."""
    root = uncompiled(model)
    key = id(root)
    _notes[key] = (weakref.ref(root, lambda _: _notes.pop(key, None)), notes)


def _noted(root: nn.Module) -> tuple[str, ...]:
    known = _notes.get(id(root))
    return known[1] if known is not None and known[0]() is root else ()


def forget(model: nn.Module) -> None:
    """Nothing is decided about the model any more."""
    _runs.pop(id(uncompiled(model)), None)


def _runs_in(root: nn.Module) -> Iterator[tuple[str, Run]]:
    """The calls for the model and for parts of it, with the path that each began at; outermost first."""
    if not _runs:
        return
    for path, module in root.named_modules():
        known = _runs.get(id(module))
        if known is not None and known[0]() is module:
            yield f"{path}." if path else "", known[1]


def _kept(model: nn.Module, found: Survey, runs: list[tuple[str, Run]]) -> dict[str, _Kept]:
    """Why layers kept their forwards: what was decided, and for the others what a plan would say now."""
    kept: dict[str, _Kept] = {}
    unknown = []
    for site in found.sites:
        known = next(
            ((prefix, run) for prefix, run in runs if site.path.startswith(prefix) or f"{site.path}." == prefix), None
        )
        if known is None:
            unknown.append(site)
            continue
        prefix, run = known
        path = site.path[len(prefix) :]
        kept[site.path] = _Kept(run.everywhere or run.kept.get(path, ""), run.mode, run.evidence.get(path))
    if unknown:
        kept.update(_planned(model, found._replace(sites=unknown)))
    return kept


def _planned(model: nn.Module, found: Survey) -> dict[str, _Kept]:
    """What a plan says of layers for which no call is known: `kernelize` was not called, or on another model."""
    markers = (in_effect(site.module) for site in found.sites)
    mode = next((marker.swap.mode for marker in markers if marker), None)
    wanted = mode or (Mode.TRAINING if model.training else Mode.INFERENCE)
    plain = found._replace(sites=[site for site in found.sites if in_effect(site.module) is None])
    try:
        decisions = decide(plain, Request.of(wanted, None, None, None))
    except KernelHubError as error:
        return {site.path: _Kept(error.message, mode) for site in plain.sites}
    return {
        site.path: _Kept(decision.reason or "a kernel is registered for it; kernelize to run it", mode)
        for site, decision in zip(plain.sites, decisions, strict=True)
    }


# Reports from files

_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
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
    return ReportRow(**read)


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


def _changed(here: ReportRow, there: ReportRow) -> list[str]:
    """What else is different about a layer that runs the same."""
    found = [
        f"{name.replace('_', ' ')} {getattr(here, name) or 'none'} -> {getattr(there, name) or 'none'}"
        for name in ("device", "mode", "reason", "reference", "calls", "worst")
        if getattr(here, name) != getattr(there, name)
    ]
    one, other = here.max_error, there.max_error
    if one is not None and other is not None and abs(one - other) > 0.1 * max(one, other):
        found.append(f"error {one:.2g} -> {other:.2g}")
    if _apart(here, there) or _apart(there, here):
        found.append(f"speed {_speed(here)} -> {_speed(there)}")
    return found


def _apart(slower: ReportRow, faster: ReportRow) -> bool:
    high, low = slower.speedup_high, faster.speedup_low
    return high is not None and low is not None and high < low


def _speed(row: ReportRow) -> str:
    if row.speedup is None:
        return ""
    elsewhere = f" on {row.timed_on}" if row.timed_on != row.path else ""
    return f"{row.speedup:.2f}x ({row.speedup_low:.2f} to {row.speedup_high:.2f}){elsewhere}"


def _cells(row: ReportRow) -> tuple[str, ...]:
    runs = f"{row.repository}:{row.layer}" if row.outcome == "kernel" else "original"
    flags = [flag for flag, on in (("shared", row.shared),) if on]
    return (
        row.path or "(the model)",
        row.class_name,
        row.layer_name,
        row.device or "",
        row.mode or "",
        runs,
        (row.commit or "")[:12],
        row.variant or "",
        (row.digest or "")[:19],
        "" if row.max_error is None else f"{row.max_error:.2g}",
        "" if row.max_relative_error is None else f"{row.max_relative_error:.2g}",
        row.worst or "",
        row.reference or "",
        str(row.calls or ""),
        _speed(row),
        row.remembered or "",
        "; ".join([*flags, *([row.reason] if row.reason else []), *(f"lost: {text}" for text in row.lost)]),
    )
