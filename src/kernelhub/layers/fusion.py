"""Several modules that stand one after another, and one kernel for all of them.

A mapping's key of `((layer name, path), ...)` names them: children of one parent, in the order in which it calls them.
The first one's forward then computes what all of them did, on a layout built of them (`layout.py`); the others' give back
what they are given. No module is replaced, so the state dict, the hooks of the parent and the parameters stay as they are.

What would not be right is refused: a parent that uses what lies in between (`sequence.py`), modules that are called from
two places, or have hooks, adapters or quantised weights, which the kernel would pass by. What changes later is looked for
in each call (`Fusion.together`, 0.8 us).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as everywhere

from kernelhub.errors import InvalidReference, LayerContractError, NoKernelForLayer
from kernelhub.layers.keys import FusionKey, title
from kernelhub.layers.layout import TABLES_OF_MODULES, Layout, lay_out, layout_class, made_of
from kernelhub.layers.mode import Mode
from kernelhub.layers.patterns import path_pattern
from kernelhub.layers.sequence import broken_chain, follows
from kernelhub.layers.survey import AwareClass, Site, Survey, places
from kernelhub.layers.swap import MARKER, of_class

if TYPE_CHECKING:
    from kernelhub.layers.kernel import LayerKernel, Swap

# What a key names in a model


@dataclass
class Group:
    """The modules that a key names under one parent. `at` is where they stand in the tree of the survey.

    `fusion` is what is built for them when they get a kernel.
    """

    key: FusionKey
    path: str
    parent: nn.Module
    parts: tuple[nn.Module, ...]
    at: tuple[int, ...] = ()
    around: tuple[int, ...] = ()  # the modules that hold them, by identity
    places: int = 1  # how often the one that stands there most often does
    fusion: Fusion | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The children's names, in the order of the key."""
        return tuple(path.rpartition(".")[2] for _, path in self.key)

    @property
    def paths(self) -> tuple[str, ...]:
        """The children's paths."""
        return tuple(f"{self.path}.{name}" if self.path else name for name in self.names)

    @property
    def shown(self) -> str:
        """`model.layers.0: norm + mlp`."""
        return f"{self.path or 'the model'}: {' + '.join(self.names)}"

    @property
    def classes(self) -> str:
        """`LlamaRMSNorm + LlamaMLP`."""
        return " + ".join(type(part).__name__ for part in self.parts)


class Named(NamedTuple):
    """What a key names in a model. `problems`: children that are missing, or others than it says; `nothing`: no parent."""

    groups: list[Group]
    problems: list[str]
    nothing: str = ""


def find(model: nn.Module, key: FusionKey) -> Named:
    """The modules that a key names under each of the parents that it names."""
    text = key[0][1].rpartition(".")[0]
    regex = re.compile(path_pattern(text))
    found = Named([], [])
    parents = [(path, module) for path, module in model.named_modules() if regex.fullmatch(path)]
    for path, parent in parents:
        group = Group(key, path, parent, ())
        children = [parent._modules.get(name) for name in group.names]
        missing = [where for where, child in zip(group.paths, children, strict=True) if child is None]
        if missing:
            found.problems.append(f"{path or 'the model'} ({type(parent).__name__}) has no {', '.join(missing)}")
            continue
        group.parts = tuple(child for child in children if child is not None)
        found.problems.extend(wrong for wrong in map(_misnamed, key, group.paths, group.parts) if wrong)
        found.groups.append(group)
    if parents:
        return found
    close = difflib.get_close_matches(text, _generalised(path for path, _ in model.named_modules()), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(repr(path) for _, path in key)
    return found._replace(nothing=f"no module is named {text!r}, the parent of {listed}{hint}")


def with_groups(found: Survey, table: Mapping[Any, Any]) -> Survey:
    """The survey with a site for each group of modules that the keys of the table name; they come first.

    A key that names nothing in this model says nothing about it. Raises `InvalidReference` [ValueError] where it names
    parents whose children are others than it says, or a module that another key names too.
    """
    keys = [key for key in table if isinstance(key, tuple)]
    if not keys:
        return found
    modules = found.tree.modules
    counts, first = Counter(map(id, modules)), places(found.tree)
    sites: list[Site] = []
    within: dict[int, str] = {}
    for key in keys:
        named = find(modules[0], key)
        if named.problems:
            raise InvalidReference(f"{title(key)} cannot be fused: {'; '.join(named.problems)}")
        for group in named.groups:
            group.at = tuple(first[id(part)] for part in group.parts)
            group.around = tuple(_above(found, group.at[0]))
            group.places = max(counts[id(part)] for part in group.parts)
            _check_apart(group, within)
            aware = AwareClass(title(key), None, None, False)
            head = group.parts[0]
            sites.append(Site(group.shown, head, aware, group.at[0], head.training, group=group))
    return found._replace(sites=[*sites, *found.sites])


def _check_apart(group: Group, within: dict[int, str]) -> None:
    """Raises `InvalidReference` where one of the modules is in another group too."""
    inside = {
        id(module): path for path, part in zip(group.paths, group.parts, strict=True) for module in part.modules()
    }
    for module, path in inside.items():
        if module in within:
            raise InvalidReference(
                f"{group.shown}: {path} is fused in {within[module]} too", hint="Name each module in one key."
            )
    within.update(dict.fromkeys(inside, group.shown))


def _above(found: Survey, index: int) -> Iterator[int]:
    while (index := found.tree.above[index]) >= 0:
        yield id(found.tree.modules[index])


def _generalised(paths: Iterable[str]) -> list[str]:
    """The paths with `*` for numbers."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths if path))


def _misnamed(named: tuple[str, str], path: str, module: nn.Module) -> str:
    """A part is called by its layer's name, or by its class's, of which the beginning (the model's name) may be left out."""
    name, cls = named[0], type(module).__name__
    layer = getattr(type(module), "kernel_layer_name", None)
    if name == layer or cls.endswith(name):
        return ""
    also = f", registered as {layer!r}" if layer else ""
    return f"{path} is a {cls}{also}, not a {name!r}"


# What may not be fused


def unfit(group: Group, apart: Sequence[str | None]) -> str:
    """Why a kernel may not compute these modules together; `apart` says of each why not of itself."""
    for path, part, reason in zip(group.paths, group.parts, apart, strict=True):
        if reason:
            return f"{path}: {reason}"
        if any(part.__dict__.get(hooks) for hooks in _HOOKS):
            return f"{path} has hooks, which would see what the fused kernel hands on"
        kind: Any = type(part)
        if kind.__call__ is not nn.Module.__call__:
            return f"{path} has a __call__ of its own, which would see what the fused kernel hands on"
        if "_hf_hook" in part.__dict__ or "base_layer" in part._modules:
            return f"{path} is wrapped by another library, which the fused kernel would pass by"
    return f"one of them stands in {group.places} places of the model" if group.places > 1 else ""


# Hooks of all modules, in the tables that torch has of them.
_HOOKS_OF_ALL = (
    everywhere._global_forward_hooks,
    everywhere._global_forward_pre_hooks,
    everywhere._global_backward_hooks,
    everywhere._global_backward_pre_hooks,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_parent(group: Group, name: str) -> None:
    """Raises `LayerContractError` [TypeError] where the parent does not hand the parts' results to each other alone."""
    if len(group.parts) < 2:
        return
    attributes = group.parent.__dict__
    own = attributes.get("forward")
    kind: Any = type(group.parent)
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        why = f"{kind.__name__} has a forward of its own on the instance"
    elif held := _held(attributes, group.parts):
        why = f"{kind.__name__} holds one of them as {held} too"
    else:
        why = "" if follows(group.parent, group.names) else broken_chain(kind, group.names)
    if why:
        raise LayerContractError(f"{name} cannot stand in for {group.shown}", (why,))


def _held(attributes: Mapping[str, Any], parts: tuple[nn.Module, ...]) -> str:
    """The attribute in which a module has one of its children beside its name."""
    wanted = {id(part) for part in parts}
    for name, value in attributes.items():
        if name not in TABLES_OF_MODULES and name != MARKER and _reaches(value, wanted, 3):
            return name
    return ""


def _reaches(value: Any, wanted: set[int], depth: int) -> bool:
    if id(value) in wanted or id(getattr(value, "__self__", None)) in wanted:
        return True
    if depth and type(value) in (list, tuple, dict, set):
        return any(_reaches(item, wanted, depth - 1) for item in (value.values() if type(value) is dict else value))
    return False


# What stands on the modules


class Fusion:
    """What modules with one kernel share: each other, their parent, and the layout that the kernel computes with."""

    def __init__(self, group: Group, layout: Layout) -> None:
        self.parent, self.parts, self.names = group.parent, group.parts, group.names
        self.layers = tuple(name for name, _ in group.key)
        self.laid = layout.laid
        self.module: nn.Module | None = layout.module
        self.made_of = layout.made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        import copy

        made: Fusion = object.__new__(type(self))
        memo[id(self)] = made
        made.names, made.layers, made.laid, made.module, made.made_of = self.names, self.layers, self.laid, None, ()
        made.parent = copy.deepcopy(self.parent, memo)
        made.parts = tuple(copy.deepcopy(part, memo) for part in self.parts)
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A layout's class is the kernel's, which may not be there where the model is read.
        return {**self.__dict__, "module": None, "made_of": ()}

    def together(self) -> bool:
        """Whether the modules still stand where they were fused; and nobody has put a hook, a forward or a parametrization on one of them, or a forward on the parent, since."""
        if any(_HOOKS_OF_ALL):
            return False
        held = self.parent.__dict__  # tables of instances: this is on the call path
        if "forward" in held and "_hf_hook" not in held and not of_class(self.parent, held["forward"]):
            return False
        children = held["_modules"]
        for name, part in zip(self.names, self.parts):  # noqa: B905 - strict costs as much as the rest
            own = part.__dict__
            if children.get(name) is not part or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if own["_backward_hooks"] or own["_backward_pre_hooks"] or "parametrizations" in own["_modules"]:
                return False
            forward = own.get("forward")
            if forward is not None and (
                type(forward) is not MethodType or forward.__func__ is not own[MARKER].function
            ):
                return False
        return True

    def layout(self, cls: type[nn.Module]) -> nn.Module:
        """The layout; built again for a copy, and where it has weights of its own and the modules' were changed."""
        known = self.module
        if known is not None and (
            not self.laid or torch.compiler.is_compiling() or self.made_of == made_of(self.parts)
        ):
            return known
        built = lay_out(cls, self.parts, cls.__name__)
        self.module, self.made_of = built.module, built.made_of
        return built.module


def fuse(group: Group, kernel: LayerKernel, swap: Swap) -> tuple[LayerKernel, Swap]:
    """The kernel as the forward of the group's first module, which gets what is built for it.

    Raises `LayerContractError` [TypeError] where it cannot stand in for these modules, `NoKernelForLayer` [ValueError]
    where it cannot in this mode.
    """
    name = str(kernel.repository)
    check_parent(group, name)
    layout = lay_out(layout_class(kernel.cls, name), group.parts, name)
    notes = list(swap.notes)
    if layout.laid:
        laid = f"its layout keeps weights of its own ({', '.join(layout.laid)}), made of the modules'"
        if Mode.TRAINING in swap.mode:
            raise NoKernelForLayer(f"{name} does not serve {swap.mode}: {laid}, which gradients would not reach")
        if Mode.TORCH_COMPILE in swap.mode:
            raise NoKernelForLayer(
                f"{name} does not serve {swap.mode}: {laid}, which compiled code would not make again"
            )
        notes.append(f"{laid}: for inference")
    group.fusion = Fusion(group, layout)
    cls: Any = kernel.cls
    forward = entering(kernel.forward, cls)
    return replace(kernel, forward=forward), replace(swap, notes=tuple(notes), restore=False)


@functools.cache
def entering(forward: Any, cls: Any) -> Any:
    """The forward of the first module: the kernel's, on the layout. One for a kernel, so that it is compiled once."""
    layout = layout_class(cls, cls.__name__)

    def entered(self: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = _fusion(self)
        if fusion is None or not fusion.together():
            return type(self).forward(self, *args, **kwargs)
        module = fusion.module
        if module is None or fusion.laid:
            module = fusion.layout(layout)
        return forward(module, *args, **kwargs)

    entered.__name__ = "forward"  # a bound method is pickled by the name of its function
    entered.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    entered.fused = True  # type: ignore[attr-defined]
    return entered


def forward(self: Any, value: Any) -> Any:
    """The forward of the modules after the first: what it is given is their result already."""
    fusion = _fusion(self)
    return type(self).forward(self, value) if fusion is None or not fusion.together() else value


forward.fused = True  # type: ignore[attr-defined]
passing: Any = forward


def _fusion(part: Any) -> Any:
    """None where it was taken apart: who has put a forward of his own over this one still calls it."""
    return getattr(getattr(part, MARKER, None), "fusion", None)


# For proofs: the modules as one


class Chain(nn.Module):
    """The modules one after another, as the parent calls them, to be compared with their kernel."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        for name, part in zip(fusion.names, fusion.parts, strict=True):
            self.add_module(name, part)
        self.__dict__["_kernelhub_swap"] = SimpleNamespace(fusion=fusion)
        self.training = fusion.parts[0].training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self._modules.values()
        assert first is not None
        value = first(*args, **kwargs)
        for part in others:
            assert part is not None
            value = part(value)
        return value


def as_one(site: Site) -> Site:
    """The site, of fused modules with all of them as its module, of a class of its own for each kind of group."""
    if site.group is None or site.group.fusion is None:
        return site
    made = _chain_class(tuple(type(part) for part in site.group.parts))(site.group.fusion)
    return site._replace(module=made)


@functools.cache
def _chain_class(kinds: tuple[type[nn.Module], ...]) -> type[Chain]:
    named = " + ".join(kind.__name__ for kind in kinds)
    return type(named, (Chain,), {"__module__": kinds[0].__module__, "__qualname__": named, "forward": Chain.forward})


def recorded_at(module: nn.Module) -> nn.Module:
    """Where the model calls a module that a proof is about: of a chain, its first part."""
    return next(iter(module.children())) if isinstance(module, Chain) else module
