"""model + mapping -> for each kernel-aware layer what would be tried, or why it keeps its forward.

Nothing is changed and nothing is fetched. What only the loaded kernel can tell (its variant, its backward, whether it
compiles, its contract) is left to `kernelize`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelhub.errors import InvalidReference, KernelHubError, NoKernelForLayer
from kernelhub.layers.device import Device
from kernelhub.layers.fitness import READABLE, children, foreign_forward, gathered_by_fsdp, weights
from kernelhub.layers.fusion import Group, unfit, with_groups
from kernelhub.layers.keys import title
from kernelhub.layers.mapping import Name, Row, Table, choose, current_table, needs_capability
from kernelhub.layers.markers import calls_children
from kernelhub.layers.mode import KernelizeFallback, Mode, serving
from kernelhub.layers.patterns import path_pattern
from kernelhub.layers.survey import Devices, Site, Survey, capability, device_type, site_class, survey
from kernelhub.layers.tables import UNMARKED, table

Selection = str | type | Iterable[str | type] | None
DeviceLike = str | torch.device | Device | None

_CHECKED_THEN = "its variant, backward, torch.compile and contract are checked when it is loaded"
_OF_SEVERAL = "the fastest of them where they are measured, else the first that can be used"


# What was asked for, and what comes of it


class Selector:
    """`include` and `exclude`: module paths (`*` is one segment, `**` any number, at the end at least one) or classes."""

    def __init__(self, include: Selection, exclude: Selection) -> None:
        given = {name: _listed(of) for name, of in (("include", include), ("exclude", exclude)) if of is not None}
        self._include = _matcher("include", given["include"]) if "include" in given else None
        self._exclude = _matcher("exclude", given["exclude"]) if "exclude" in given else None
        self.idle = not given
        self._patterns = [(name, item) for name, items in given.items() for item in items if isinstance(item, str)]

    def refuses(self, path: str, module: nn.Module) -> str | None:
        """Why the layer is left out; None where it is not."""
        if self._include is not None and not self._include(path, module):
            return "it is not in `include`"
        if self._exclude is not None and self._exclude(path, module):
            return "it is in `exclude`"
        return None

    def unmatched(self, found: Survey) -> list[str]:
        """Of each path pattern at which the model has no module and no function, that this is so, and what is near."""
        if not self._patterns:
            return []
        root = found.tree.modules[0]
        paths = {path for path, _ in root.named_modules()} | {site.path for site in found.sites}
        lines = []
        for argument, text in self._patterns:
            pattern = re.compile(path_pattern(text))
            if not any(map(pattern.fullmatch, paths)):
                near = difflib.get_close_matches(text, sorted(paths), n=1)
                lines.append(f"{argument}: no module is at {text!r}" + (f"; there is {near[0]!r}" if near else ""))
        return lines


def _listed(items: Any) -> list[Any]:
    return list(items) if not isinstance(items, (str, type)) and isinstance(items, Iterable) else [items]


def _matcher(argument: str, listed: list[Any]) -> Callable[[str, nn.Module], bool]:
    for item in listed:
        if not isinstance(item, (str, type)) or item == "":
            raise InvalidReference(
                f"{argument}: {item!r} names no layers", hint='Expected paths such as "model.layers.*.mlp", or classes.'
            )
    classes = tuple(item for item in listed if isinstance(item, type))
    patterns = [path_pattern(item) for item in listed if isinstance(item, str)]
    regex = re.compile("|".join(patterns)) if patterns else None
    return lambda path, module: isinstance(module, classes) or bool(regex and regex.fullmatch(path))


@dataclass(frozen=True)
class Request:
    """What `kernelize` and `plan_kernels` were asked for, with the registrations that hold here."""

    mode: Mode
    device: torch.device | None
    selector: Selector
    table: Table

    @classmethod
    def of(cls, mode: Mode, device: DeviceLike, include: Selection, exclude: Selection) -> Request:
        """Raises `InvalidReference` [ValueError] for a mode, device or selection that cannot be."""
        serving(mode)
        return cls(mode, _parse_device(device), Selector(include, exclude), current_table())


def _parse_device(device: DeviceLike) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    name = device.type if isinstance(device, Device) else device
    try:
        return torch.device("cuda" if name == "rocm" else name)
    except (RuntimeError, TypeError) as error:
        raise InvalidReference(f"{device!r} is not a device", hint='Such as "cuda", "cuda:1" or "cpu".') from error


class Decision(NamedTuple):
    """What comes of a site: a registration to try, or the reason (and the case) why it keeps its forward.

    Layers of one kind on one device share one. `inside` is what only a kernel that calls the layer's children may have there.
    """

    device: torch.device | None
    row: Row | None
    case: KernelizeFallback | None = None
    reason: str = ""
    distributed: bool = False
    inside: str = ""


def decide(found: Survey, request: Request) -> list[Decision]:
    """A decision for each site. Raises `NoKernelForLayer` where no device can be told, and what conditions raise."""
    managed = functools.cache(lambda: gathered_by_fsdp(found.tree.modules))
    rows: dict[tuple[str, torch.device], Decision] = {}
    facts = _Facts(request, Devices(found.tree), rows, managed)
    idle, given, decisions = request.selector.idle, request.device, []
    for site in found.sites:
        _, _, aware, _, _, device, _, _, group = site
        decision = _decide_group(site, group, facts) if group is not None else None
        if decision is None and device is not None and idle and aware.always:
            # Nothing is special about it: it was decided with the first of its kind.
            decision = rows.get((aware.layer_name, given or device))
        decisions.append(decision or _decide(site, facts))
    return decisions


class _Facts(NamedTuple):
    """What is found out once for a model, and serves every site."""

    request: Request
    devices: Devices
    rows: dict[tuple[str, torch.device], Decision]
    managed: Callable[[], frozenset[int]]


def _decide(site: Site, facts: _Facts) -> Decision:
    aware, elsewhere = site.aware, site.elsewhere
    request, devices, rows, _ = facts
    reason = _left_out(site, request.selector)
    if reason is not None:
        return Decision(None, None, None, reason)
    name = aware.layer_name
    if not request.table.get(name):
        return Decision(None, None, KernelizeFallback.NO_LAYER, f"no kernel is registered for {name}")
    device = _device(site, facts)
    if isinstance(device, Decision):
        return device
    if elsewhere and request.device is None and (other := _other_device(elsewhere, device, devices)):
        return Decision(device, None, None, f"it is shared between {device} and {other}")
    decision = rows.get((name, device))
    if decision is None:
        decision = rows[name, device] = _row(name, device, request)
    return decision if decision.row is None else _fit(site, decision, facts)


def _decide_group(site: Site, group: Group, facts: _Facts) -> Decision:
    """The decision for several modules with one kernel: what keeps one of them apart keeps all."""
    request, devices, _, managed = facts
    for path, part in zip(group.paths, group.parts, strict=True):
        if reason := request.selector.refuses(path, part):
            return Decision(None, None, None, f"{path}: {reason}")
    found = {request.device or devices.of(at) for at in group.at} - {None}
    device = _device(site, facts)
    if isinstance(device, Decision):
        return device
    if len(found) > 1:
        return Decision(device, None, None, f"its layers are on {' and '.join(sorted(map(str, found)))}")
    reason = unfit(group, [_apart(part, managed) for part in group.parts])
    return Decision(device, None, None, reason) if reason else _row(group.key, device, request)


def _device(site: Site, facts: _Facts) -> torch.device | Decision:
    """Where the site will run, or the decision where that is no device. Raises `NoKernelForLayer` where none can be told."""
    device = facts.request.device or facts.devices.of(site.at)
    if device is None:
        raise NoKernelForLayer(
            f"{site.path or type(site.module).__name__}: neither it nor the model around it has parameters",
            hint='Say where it will run: kernelize(model, mode=..., device="cuda").',
        )
    if device.type == "meta":
        return Decision(device, None, None, "its parameters are on the meta device; say device= to kernelize it")
    return device


def _apart(part: nn.Module, managed: Callable[[], frozenset[int]]) -> str | None:
    """Why a kernel that reads the module's weights would compute something else than the module does."""
    reason = foreign_forward(part)
    if reason is None:
        readable = weights(part, managed)
        reason = readable.reason or ("its weights are DTensors" if readable.distributed else None)
    return reason or children(part, managed)


def _left_out(site: Site, selector: Selector) -> str | None:
    """Why no kernel is looked for: the class or the user says so."""
    reason = site.aware.keeps or selector.refuses(site.path, site.module)
    if reason is None and site.aware.condition is not None and not _holds(site):
        return "its condition says that no kernel may stand in for it"
    return reason


def _fit(site: Site, decision: Decision, facts: _Facts) -> Decision:
    """The decision, if what the instance is lets a kernel stand in for its forward."""
    module, readable = site.module, READABLE
    reason = foreign_forward(module) if "forward" in module.__dict__ else None
    if site.user is None and reason is None:
        readable = weights(module, facts.managed)
        reason = readable.reason
        if reason is None and module._modules:
            reason = children(module, facts.managed)
            if reason is not None and calls_children(module):
                decision, reason = decision._replace(inside=reason), None
    if reason is not None:
        return Decision(decision.device, None, None, reason)
    return decision._replace(distributed=True) if readable.distributed else decision


def _holds(site: Site) -> bool:
    assert site.aware.condition is not None
    try:
        return bool(site.aware.condition(site.module))
    except KernelHubError as error:
        error.add_context(f"in the condition of {site.path} ({type(site.module).__name__})")
        raise


def _other_device(elsewhere: Iterable[int], device: torch.device, devices: Devices) -> torch.device | None:
    """Where else a module without parameters runs, if that is another kind of device than `device`."""
    for index in elsewhere:
        other = devices.of(index)
        if other is not None and other.type != device.type:
            return other
    return None


def _row(name: Name, device: torch.device, request: Request) -> Decision:
    rows, kind = request.table.get(name, ()), device_type(device)
    able = capability(device) if needs_capability(rows, kind) else None
    row = choose(name if isinstance(name, str) else title(name), rows, kind, able, request.mode)
    return Decision(device, row) if isinstance(row, Row) else Decision(device, None, row.case, row.reason)


# The plan that users see


@dataclass(frozen=True)
class PlanRow:
    """A kernel-aware layer: what would be tried (`action` is `try`), or why it keeps its forward (`keep`)."""

    path: str
    class_name: str
    layer_name: str
    device: str | None
    mode: str
    action: str
    repository: str | None
    reason: str
    shared: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KernelPlan:
    """What `kernelize` would do, as far as that is known without a download or a change. `str()` is a table."""

    rows: tuple[PlanRow, ...]

    @property
    def tried(self) -> tuple[PlanRow, ...]:
        """The layers for which a kernel would be tried."""
        return tuple(row for row in self.rows if row.action == "try")

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        if not self.rows:
            return UNMARKED
        devices = {row.device for row in self.rows if row.device}
        lines = [
            (
                row.path or "(the model)",
                row.class_name,
                row.layer_name,
                (row.device or "") if len(devices) > 1 else "",
                row.repository or "keep",
                row.reason.replace(f"; {_CHECKED_THEN}", "").replace(f"; {_OF_SEVERAL}", ""),
            )
            for row in self.rows
        ]
        facts = [f"device: {device}" for device in devices] if len(devices) == 1 else []
        notes = [f"of a kernel that is tried, {_CHECKED_THEN}"] if self.tried else []
        if any(_OF_SEVERAL in row.reason for row in self.tried):
            notes.append(f"of several that are tried, {_OF_SEVERAL}")
        return "\n".join([*facts, table(("path", "class", "layer", "device", "would try", "reason"), lines), *notes])


def plan_kernels(
    model: nn.Module,
    *,
    mode: Mode,
    device: DeviceLike = None,
    include: Selection = None,
    exclude: Selection = None,
) -> KernelPlan:
    """What `kernelize` would try for each kernel-aware layer, or why the layer keeps its forward.

    Nothing is downloaded or changed. Raises `InvalidReference` [ValueError] for a mode or device that cannot be,
    `NoKernelForLayer` [ValueError] where no device can be told.
    """
    request = Request.of(mode, device, include, exclude)
    found = with_groups(survey(model), request.table)
    decisions = zip(found.sites, decide(found, request), strict=True)
    return KernelPlan(tuple(_plan_row(site, decision, mode) for site, decision in decisions))


def _plan_row(site: Site, decision: Decision, mode: Mode) -> PlanRow:
    row = decision.row
    reason = decision.reason
    if row is not None:
        reason = f"{row.mode}; {_CHECKED_THEN}"
        if row.others:
            reason = f"{reason}; {_OF_SEVERAL}"
        if decision.distributed:
            reason = f"{reason}; its weights are DTensors, which the kernel must take"
    return PlanRow(
        site.path,
        site_class(site),
        site.aware.layer_name,
        str(decision.device) if decision.device else None,
        str(mode),
        "keep" if row is None else "try",
        row.named if row else None,
        reason,
        site.user is not None,
    )


def reasons(kept: Mapping[str, int], limit: int = 3) -> str:
    """The reasons why layers kept their forwards, the most frequent first."""
    ranked = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} x {reason}" for reason, count in ranked[:limit]]
    return "; ".join([*shown, "..."] if len(ranked) > limit else shown)
