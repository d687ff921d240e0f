"""What runs in a model, layer by layer, and why the rest does not.

A row says what the module's forward *is* at the moment of asking, so it is right for copies, for models from files, and
after others changed the model. Only the reasons why layers kept their forwards are kept from the call that decided so
(one value per call, beside the model and not in it): asked later, the registrations may be others.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelhub.errors import KernelHubError
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.machine import summary
from kernelhub.layers.mode import Mode
from kernelhub.layers.plan import Request, decide
from kernelhub.layers.report_values import KernelReport, ReportRow
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


def kernel_report(model: nn.Module) -> KernelReport:
    """What each kernel-aware layer of `model` runs: which kernel, which file digest, or why its own forward."""
    found, root = survey(model), uncompiled(model)
    runs = _runs_in(root)
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
    return (kept.reason or "its original was given back, or it was added later", kept.mode)


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
    """The sites, with those of modules that carry a kernel and are not kernel-aware themselves.

    They run it with others, or come from a file: what a class is marked as, another process need not know.
    """
    aware = {id(site.module) for site in found.sites}
    parts = [(path, module) for path, module in found.marked if id(module) not in aware]
    if not parts:
        return found.sites
    at = places(found.tree)
    sites = list(found.sites)
    for path, module in parts:
        kind = AwareClass(_layer_of(module), None, None, False)
        sites.append(Site(path, module, kind, at[id(module)], module.training))
    return sorted(sites, key=lambda site: site.at)


def _layer_of(module: nn.Module) -> str:
    """The name of the layer that a module's kernel is for, or was."""
    marker = module.__dict__[MARKER]
    if isinstance(marker, Marker) and marker.fusion is not None and in_effect(module) is marker:
        return dict(zip(map(id, marker.fusion.parts), marker.fusion.layers, strict=True))[id(module)]
    return str(marker.swap.layer)


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

    `evidence` has what was measured of kernels that were not swapped in for it, by path. Without a mode it is what
    `unkernelize` left.
    """

    mode: Mode | None
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


def decided(model: nn.Module) -> list[tuple[nn.Module, Run]]:
    """What was decided about the model and its parts, to be remembered again."""
    return [(module, _runs[id(module)][1]) for _, module in _known_in(uncompiled(model))]


def undo(model: nn.Module, *, held: bool) -> None:
    """What was decided about the model and its parts no longer holds; `held` says that it had kernels until now."""
    root = uncompiled(model)
    known = decided(root)
    for module, _ in known:
        del _runs[id(module)]
    if known or held:
        remember(root, Run(None, "the model was unkernelized", {}))


def _runs_in(root: nn.Module) -> list[tuple[str, Run]]:
    """The calls for the model and for parts of it, with the path that each began at.

    Outermost first, and what was undone last: a part may have been kernelized since.
    """
    known = [(f"{path}." if path else "", _runs[id(module)][1]) for path, module in _known_in(root)]
    return sorted(known, key=lambda item: item[1].mode is None)


def _known_in(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and those of its parts for which there was a call, outermost first."""
    if not _runs:
        return
    for path, module in root.named_modules():
        known = _runs.get(id(module))
        found = known[0]() if known is not None else None
        if found is not None and found is module:
            yield path, found


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
        everywhere = run.everywhere if in_effect(site.module) is None else None
        kept[site.path] = _Kept(everywhere or run.kept.get(path, ""), run.mode, run.evidence.get(path))
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
