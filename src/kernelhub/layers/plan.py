"""model + mapping -> for each kernel-aware layer what would be tried, or why it keeps its forward.

Nothing is changed and nothing is fetched. What only the loaded kernel can tell (its variant, its backward, whether it
compiles, its contract) is left to `kernelize`.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelhub.errors import InvalidReference, KernelHubError, NoKernelForLayer
from kernelhub.layers.device import Device
from kernelhub.layers.mapping import Row, Table, choose, current_table, needs_capability
from kernelhub.layers.markers import FUNCS, FunctionModule, always
from kernelhub.layers.mode import KernelizeFallback, Mode, serving
from kernelhub.layers.swap import MARKER, USES, in_effect, of_class, ours
from kernelhub.layers.tables import table

Selection = str | type | Iterable[str | type] | None
DeviceLike = str | torch.device | Device | None

_CHECKED_THEN = "its variant, backward, torch.compile and contract are checked when it is loaded"


# Who is kernel-aware


@dataclass(frozen=True)
class AwareClass:
    """A class with a layer's name. `keeps` says why no kernel may stand in for its forward; None: one may."""

    layer_name: str
    condition: Callable[[nn.Module], bool] | None
    keeps: str | None
    always: bool  # a kernel may stand in for every instance


def aware_class(cls: type[nn.Module]) -> AwareClass | None:
    """What the class is marked as; None where it is not kernel-aware."""
    name = getattr(cls, "kernel_layer_name", None)
    if not isinstance(name, str):
        return None
    condition = getattr(cls, "kernel_condition", None)
    marked = next(base for base in cls.__mro__ if "kernel_layer_name" in vars(base))
    keeps = None
    if getattr(cls, "forward", None) is not getattr(marked, "forward", None):
        keeps = f"{cls.__name__} has a forward of its own, and {marked.__name__} is what is marked as {name}"
    asked = None if condition in (None, always) else condition
    return AwareClass(name, asked, keeps, keeps is None and asked is None)


class Site(NamedTuple):
    """A place where a kernel can go: a layer, or a function (`user` is then the module that calls it).

    `at` is where the layer (or the user) stands in the tree, `elsewhere` where it stands too if it is shared. What a
    layer mostly is asked for is noted while it is looked at: whether it is in training mode, and where it runs if nothing
    is special about it (`plain`). Later its memory would have to be fetched again.
    """

    path: str
    module: nn.Module
    aware: AwareClass
    at: int
    training: bool
    plain: torch.device | None = None
    user: nn.Module | None = None
    elsewhere: tuple[int, ...] = ()


class Tree(NamedTuple):
    """The modules on the way of a walk, and for each the index of the one above it (-1: it is the model).

    Two lists and not an object per module: of 10,000 layers, objects made Python's collector run for longer than
    everything else took (70 us a layer with eight of them, 5 with three; benchmarks/kernelize.py).
    """

    modules: list[nn.Module]
    above: list[int]


class Survey(NamedTuple):
    """One walk over a model: its sites, and the modules that carry something of ours."""

    tree: Tree
    sites: list[Site]
    marked: list[tuple[str, nn.Module]]
    users: list[tuple[str, nn.Module]]


def survey(model: nn.Module) -> Survey:
    """Walk the model once; a module that is reached twice is met once. A compiled model is walked inside."""
    found = Survey(Tree([], []), [], [], [])
    (modules, above), sites = found.tree, found.sites
    classes: dict[type, AwareClass | None] = {}
    seen: dict[int, int] = {}
    paths, waiting, parents = [""], [uncompiled(model)], [-1]
    while waiting:
        path, module, index = paths.pop(), waiting.pop(), len(modules)
        modules.append(module)
        above.append(parents.pop())
        if id(module) in seen:
            _meet_again(sites, seen[id(module)], index)
            continue
        cls, attributes = type(module), module.__dict__
        if cls not in classes:
            classes[cls] = aware_class(cls)
        aware = classes[cls]
        seen[id(module)] = -1 if aware is None else len(sites)
        if aware is not None:
            sites.append(Site(path, module, aware, index, attributes["training"], _plain_device(attributes)))
        if MARKER in attributes:
            found.marked.append((path, module))
        if FUNCS in attributes or USES in attributes:
            _functions(found, classes, path, module, index)
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            for name in reversed(list(children)):
                child = children[name]
                if child is not None:
                    paths.append(prefix + name)
                    waiting.append(child)
                    parents.append(index)
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returns."""
    inner = model._modules.get("_orig_mod")
    return inner if inner is not None else model


def _meet_again(sites: list[Site], at: int, index: int) -> None:
    if at >= 0:
        sites[at] = sites[at]._replace(elsewhere=(*sites[at].elsewhere, index))


def _functions(found: Survey, classes: dict[type, AwareClass | None], path: str, module: nn.Module, index: int) -> None:
    if USES in module.__dict__:
        found.users.append((path, module))
    for name, function in module.__dict__.get(FUNCS, {}).items():
        cls = type(function)
        if cls not in classes:
            classes[cls] = aware_class(cls)
        aware = classes[cls]
        if aware is not None:
            place = f"{path}.{name}" if path else name
            found.sites.append(Site(place, function, aware, index, function.training, None, module))


# Where a layer runs


class Devices:
    """Where layers run; each module is looked into once, so that a model is looked through in linear time."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._first: dict[int, torch.device | None] = {}

    def of(self, index: int) -> torch.device | None:
        """The device of the module's parameters, else of its nearest ancestor that has any."""
        modules, above = self._tree
        while index >= 0:
            device = self._inside(modules[index])
            if device is not None:
                return device
            index = above[index]
        return None

    def _inside(self, module: nn.Module) -> torch.device | None:
        device = _own_device(module)
        if device is not None or not module._modules:
            return device
        key = id(module)
        if key not in self._first:
            inside = (self._inside(child) for child in module._modules.values() if child is not None)
            self._first[key] = next((found for found in inside if found is not None), None)
        return self._first[key]


def _own_device(module: nn.Module) -> torch.device | None:
    if "_hf_hook" in module.__dict__:
        device = _execution_device(module.__dict__["_hf_hook"])
        if device is not None:
            return device
    for parameter in module._parameters.values():
        if parameter is not None:
            return _device_of(parameter)
    return None


def _device_of(parameter: torch.Tensor) -> torch.device:
    # A sharded parameter may wait on the CPU (FSDP2's offload policy) for a device that its mesh names.
    mesh = getattr(parameter, "device_mesh", None) if type(parameter) is not nn.Parameter else None
    if mesh is not None and mesh.device_type != parameter.device.type:
        return torch.device(mesh.device_type)
    return parameter.device


def _execution_device(hook: Any) -> torch.device | None:
    """Where accelerate runs a module, wherever its weights wait; hooks can be lists of hooks."""
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def device_type(device: torch.device) -> str:
    """The name that mappings use: ROCm's devices are `cuda` to torch."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def capability(device: torch.device) -> int | None:
    """A GPU's compute capability, 90 for 9.0; None where it has none or there is no such device here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


# What else keeps a layer's forward


class Weights(NamedTuple):
    """What a layer's weights are: why a kernel cannot read them (None: it can), and whether they are DTensors."""

    reason: str | None
    distributed: bool


_READABLE = Weights(None, False)
_PLAIN_DTYPES = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.bool}
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def foreign_forward(module: nn.Module) -> str | None:
    """Why a forward on the instance keeps the layer as it is; None where a kernel can go there, or under it."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    if forward is None or of_class(module, forward) or ours(module):
        return None
    hooked = "_hf_hook" in attributes and isinstance(forward, functools.partial)
    if hooked and of_class(module, attributes.get("_old_forward")):
        return None
    return "somebody else put a forward of their own on this instance"


def weights(module: nn.Module, managed: Callable[[], frozenset[int]]) -> Weights:
    """Whether a kernel can read the module's own weights. `managed()` are those that FSDP gathers before a forward."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is nn.Parameter:
            if parameter.dtype not in _PLAIN_DTYPES:
                return Weights(f"its {name} is quantised ({_dtype(parameter)})", False)
        elif _is_dtensor(parameter):
            if id(parameter) not in managed():
                return Weights(None, True)
        elif _is_special(type(parameter)):
            return Weights(f"its {name} is a {type(parameter).__name__}, not a plain tensor", False)
    return _READABLE


def children(module: nn.Module, managed: Callable[[], frozenset[int]]) -> str | None:
    """Why a kernel that reads the weights of the module's children would compute something else than they do."""
    for path, child in module.named_modules():
        if child is module:
            continue
        if any(child.__dict__.get(name) for name in _HOOKS):
            return f"its {path} has hooks, which the kernel would not call"
        if "forward" in child.__dict__ and not (in_effect(child) or of_class(child, child.__dict__["forward"])):
            return f"its {path} has a forward of its own on the instance, which the kernel would not call"
        if "base_layer" in child._modules:
            return f"its {path} is adapted ({type(child).__name__}), and the kernel would not call the adapter"
        reason, distributed = weights(child, managed)
        if reason or distributed:
            return f"its {path}: {reason or 'its weights are DTensors'}"
        if _packed(child):
            return f"its {path} is quantised ({type(child).__name__})"
    return None


def _packed(child: nn.Module) -> bool:
    """A layer of a quantisation library: its weights are whole numbers in buffers."""
    if type(child).__module__.startswith("torch.nn.modules."):
        return False
    return any(
        buffer is not None and buffer.dim() >= 2 and buffer.dtype not in _PLAIN_DTYPES
        for buffer in child._buffers.values()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@functools.lru_cache(maxsize=256)
def _is_special(cls: type) -> bool:
    """Whether the tensor class has a behaviour of its own under torch's functions and ops."""
    plain = (torch.Tensor, nn.Parameter)
    functions = {getattr(base.__torch_function__, "__func__", base.__torch_function__) for base in plain}
    function: Any = cls.__torch_function__  # type: ignore[attr-defined]
    dispatch: Any = cls.__torch_dispatch__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function) not in functions or dispatch not in {
        base.__torch_dispatch__ for base in plain
    }


def gathered_by_fsdp(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The sharded parameters that FSDP2 replaces by whole, plain ones while their module runs, by identity.

    A parameter that was a DTensor before it was sharded (tensor parallelism) stays one, and is not among them.
    """
    found: set[int] = set()
    for module in modules:
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        inner = state()
        groups = getattr(inner, "_fsdp_param_groups", None) or [getattr(inner, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if not getattr(parameter, "is_dtensor", False):
                    found.add(id(parameter.sharded_param))
    return frozenset(found)


# What was asked for, and what comes of it


class Selector:
    """`include` and `exclude`: module paths (`*` is one segment, `**` any number) or classes."""

    def __init__(self, include: Selection, exclude: Selection) -> None:
        self._include = None if include is None else _matcher("include", include)
        self._exclude = None if exclude is None else _matcher("exclude", exclude)
        self.idle = include is None and exclude is None

    def refuses(self, path: str, module: nn.Module) -> str | None:
        """Why the layer is left out; None where it is not."""
        if self._include is not None and not self._include(path, module):
            return "it is not in `include`"
        if self._exclude is not None and self._exclude(path, module):
            return "it is in `exclude`"
        return None


def _matcher(argument: str, items: Selection) -> Callable[[str, nn.Module], bool]:
    listed = [items] if isinstance(items, (str, type)) else list(items or ())
    for item in listed:
        if not isinstance(item, (str, type)) or item == "":
            raise InvalidReference(
                f"{argument}: {item!r} names no layers", hint='Expected paths such as "model.layers.*.mlp", or classes.'
            )
    classes = tuple(item for item in listed if isinstance(item, type))
    patterns = [_pattern(item) for item in listed if isinstance(item, str)]
    regex = re.compile("|".join(patterns)) if patterns else None
    return lambda path, module: isinstance(module, classes) or bool(regex and regex.fullmatch(path))


def _pattern(text: str) -> str:
    """A path pattern as a regular expression; `**` also stands for no segment at all."""
    parts = [r"(?:[^.]+\.)*" if part == "**" else f"{_segment(part)}\\." for part in text.split(".")]
    whole = "".join(parts)
    return f"(?:{whole[:-2]})" if not text.endswith("**") else f"(?:{''.join(parts[:-1])}[^.]+(?:\\.[^.]+)*)"


def _segment(text: str) -> str:
    return "[^.]*".join(re.escape(part) for part in text.split("*"))


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

    Layers of one kind on one device share one.
    """

    device: torch.device | None
    row: Row | None
    case: KernelizeFallback | None = None
    reason: str = ""
    distributed: bool = False


def decide(found: Survey, request: Request) -> list[Decision]:
    """A decision for each site. Raises `NoKernelForLayer` where no device can be told, and what conditions raise."""
    managed = functools.cache(lambda: gathered_by_fsdp(found.tree.modules))
    rows: dict[tuple[str, torch.device], Decision] = {}
    facts = _Facts(request, Devices(found.tree), rows, managed)
    idle, given, decisions = request.selector.idle, request.device, []
    for site in found.sites:
        _, _, aware, _, _, device, _, _ = site
        decision = None
        if (
            device is not None and idle and aware.always
        ):  # nothing is special about it: decided with the first of its kind
            decision = rows.get((aware.layer_name, given or device))
        decisions.append(decision or _decide(site, facts))
    return decisions


class _Facts(NamedTuple):
    """What is found out once for a model, and serves every site."""

    request: Request
    devices: Devices
    rows: dict[tuple[str, torch.device], Decision]
    managed: Callable[[], frozenset[int]]


def _plain_device(attributes: dict[str, Any]) -> torch.device | None:
    """The device of a layer with plain weights, no children, and nothing put on the instance; else None."""
    if attributes["_modules"] or "forward" in attributes or "_hf_hook" in attributes:
        return None
    device = None
    for parameter in attributes["_parameters"].values():
        if parameter is not None:
            if type(parameter) is not nn.Parameter or parameter.dtype not in _PLAIN_DTYPES:
                return None
            device = device or parameter.device
    return device


def _decide(site: Site, facts: _Facts) -> Decision:
    module, aware, elsewhere = site.module, site.aware, site.elsewhere
    request, devices, rows, _ = facts
    reason = _left_out(site, request.selector)
    if reason is not None:
        return Decision(None, None, None, reason)
    name = aware.layer_name
    if not request.table.get(name):
        return Decision(None, None, KernelizeFallback.NO_LAYER, f"no kernel is registered for {name}")
    device = request.device or devices.of(site.at)
    if device is None:
        raise NoKernelForLayer(
            f"{site.path or type(module).__name__}: neither the layer nor the model around it has parameters",
            hint='Say where it will run: kernelize(model, mode=..., device="cuda").',
        )
    if device.type == "meta":
        return Decision(device, None, None, "its parameters are on the meta device; say device= to kernelize it")
    if elsewhere and request.device is None and (other := _other_device(elsewhere, device, devices)):
        return Decision(device, None, None, f"it is shared between {device} and {other}")
    decision = rows.get((name, device))
    if decision is None:
        decision = rows[name, device] = _row(name, device, request)
    return decision if decision.row is None else _fit(site, decision, facts)


def _left_out(site: Site, selector: Selector) -> str | None:
    """Why no kernel is looked for: the class or the user says so."""
    reason = site.aware.keeps or selector.refuses(site.path, site.module)
    if reason is None and site.aware.condition is not None and not _holds(site):
        return "its condition says that no kernel may stand in for it"
    return reason


def _fit(site: Site, decision: Decision, facts: _Facts) -> Decision:
    """The decision, if what the instance is lets a kernel stand in for its forward."""
    module, readable = site.module, _READABLE
    reason = foreign_forward(module) if "forward" in module.__dict__ else None
    if site.user is None and reason is None:
        readable = weights(module, facts.managed)
        reason = readable.reason
        if reason is None and module._modules:
            reason = children(module, facts.managed)
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


def _row(name: str, device: torch.device, request: Request) -> Decision:
    rows, kind = request.table.get(name, ()), device_type(device)
    able = capability(device) if needs_capability(rows, kind) else None
    row = choose(name, rows, kind, able, request.mode)
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
        lines = [
            (
                row.path or "(the model)",
                row.class_name,
                row.layer_name,
                row.device or "",
                row.repository or "keep",
                row.reason,
            )
            for row in self.rows
        ]
        return table(("path", "class", "layer", "device", "would try", "reason"), lines)


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
    found = survey(model)
    decisions = zip(found.sites, decide(found, request), strict=True)
    return KernelPlan(tuple(_plan_row(site, decision, mode) for site, decision in decisions))


def _plan_row(site: Site, decision: Decision, mode: Mode) -> PlanRow:
    row = decision.row
    reason = decision.reason
    if row is not None:
        reason = f"{row.mode}; {_CHECKED_THEN}"
        if decision.distributed:
            reason = f"{reason}; its weights are DTensors, which the kernel must take"
    return PlanRow(
        site.path,
        class_name(site.module),
        site.aware.layer_name,
        str(decision.device) if decision.device else None,
        str(mode),
        "keep" if row is None else "try",
        str(row.repository) if row else None,
        reason,
        site.user is not None,
    )


def class_name(module: nn.Module) -> str:
    """What to call the module's class; for a function, the function."""
    return str(module.__dict__["__qualname__"]) if isinstance(module, FunctionModule) else type(module).__name__


def reasons(kept: Mapping[str, int], limit: int = 3) -> str:
    """The reasons why layers kept their forwards, the most frequent first."""
    ranked = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} x {reason}" for reason, count in ranked[:limit]]
    return "; ".join([*shown, "..."] if len(ranked) > limit else shown)
