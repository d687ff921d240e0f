"""One walk over a model: who is kernel-aware, and where each layer runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from kernelhub.errors import InvalidReference
from kernelhub.layers.markers import FUNCS, FunctionModule, always
from kernelhub.layers.swap import MARKER, USES, settle

if TYPE_CHECKING:
    from kernelhub.layers.fusion import Group

# What a kernel can read as it is; anything else is quantised, or no weight.
PLAIN_DTYPES = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.bool}
)


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
    group: Group | None = None  # several modules that one kernel may stand in for; `module` is the first of them


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
    settle()
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
        if children and isinstance(children, dict):  # a program of TorchScript has another table, and nothing to swap
            prefix = f"{path}." if path else ""
            for name in reversed(list(children)):
                child = children[name]
                if child is not None:
                    paths.append(prefix + name)
                    waiting.append(child)
                    parents.append(index)
    return found


def places(tree: Tree) -> dict[int, int]:
    """Where each module stands in the tree (the first time), by its identity."""
    at = range(len(tree.modules) - 1, -1, -1)
    return dict(zip(map(id, reversed(tree.modules)), at, strict=True))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returns. Raises `InvalidReference` [ValueError] for what is no module."""
    if not isinstance(model, nn.Module):
        raise InvalidReference(f"expected a model (an nn.Module), got {_called(model)}")
    inner = model._modules.get("_orig_mod") if isinstance(model._modules, dict) else None
    return inner if inner is not None else model


def _called(found: Any) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__


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


def _plain_device(attributes: dict[str, Any]) -> torch.device | None:
    """The device of a layer with plain weights, no children, and nothing put on the instance; else None."""
    if attributes["_modules"] or "forward" in attributes or "_hf_hook" in attributes:
        return None
    device = None
    for parameter in attributes["_parameters"].values():
        if parameter is not None:
            if type(parameter) is not nn.Parameter or parameter.dtype not in PLAIN_DTYPES:
                return None
            device = device or parameter.device
    return device


def site_class(site: Site) -> str:
    """What to call a site's class; of several modules, their classes."""
    return site.group.classes if site.group is not None else class_name(site.module)


def class_name(module: nn.Module) -> str:
    """What to call the module's class; for a function, the function."""
    return str(module.__dict__["__qualname__"]) if isinstance(module, FunctionModule) else type(module).__name__


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
