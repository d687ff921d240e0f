"""What a fused kernel computes with: a module that is built from the modules it stands for, and reads their weights.

`<Name>Layout`, beside the kernel `<Name>`, gets the modules in the order of the key. What it is given are views: they have
everything that the modules have, at every moment, but the forward of the class, so that a kernel that calls them reaches
the original and not itself. The layout is no submodule of the model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelhub.errors import LayerContractError
from kernelhub.layers.swap import MARKER
from kernelhub.layers.values import tensors_in

_PART, _PARTS = "_kernelhub_part", "_kernelhub_parts"
_OURS = frozenset({MARKER, "forward", "_old_forward"})
_TABLES = ("_parameters", "_buffers", "__dict__")


@dataclass(frozen=True)
class Layout:
    """A layout and, where it has weights of its own (`laid`), what they were made of."""

    module: nn.Module
    laid: tuple[str, ...]
    made_of: tuple[tuple[object, ...], ...]


def layout_class(kernel: type[nn.Module], name: str) -> type[nn.Module]:
    """The class beside the kernel's. Raises `LayerContractError` [TypeError]; `name` is what to call the kernel."""
    wanted = f"{kernel.__name__}Layout"
    found = getattr(sys.modules.get(kernel.__module__), wanted, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise LayerContractError(
            f"{name} cannot stand in for several modules", (f"there is no nn.Module named {wanted} beside it",)
        )
    return found


def lay_out(cls: type[nn.Module], parts: tuple[nn.Module, ...], name: str) -> Layout:
    """The layout of these modules, which stay as they are.

    Raises `LayerContractError` [TypeError] where it cannot be built, changes a module, or has weights that nobody set.
    """
    views = tuple(map(view, parts))
    before, weights, random = _state(parts), made_of(parts), torch.get_rng_state()
    problem = f"{name} cannot stand in for {', '.join(type(part).__name__ for part in parts)}"
    try:
        layout = cls(*views)
    except Exception as error:
        raise LayerContractError(problem, (f"{cls.__name__} raises {type(error).__name__}: {error}",)) from error
    finally:
        changed = _take_back(before)
        torch.set_rng_state(random)
    if changed or made_of(parts) != weights:
        raise LayerContractError(problem, (f"{cls.__name__} changes {', '.join(changed) or 'their weights'}",))
    layout.train(parts[0].training)
    _read_when_called(layout, views)
    laid = tuple(sorted(_own(layout, views)))
    if laid:
        _check_laid(cls, layout, views, parts, problem)
    return Layout(layout, laid, made_of(parts))


def made_of(parts: tuple[nn.Module, ...]) -> tuple[tuple[object, ...], ...]:
    """What the modules' weights are just now: other ones, or the same written to, give another value."""
    return tuple(
        (id(item), item.data_ptr(), item.dtype, None if item.is_inference() else item._version)
        for part in parts
        for table in (part.parameters(), part.buffers())
        for item in table
    )


def view(part: nn.Module) -> nn.Module:
    """The module again, with the forward of its class: the same tables of weights and children, and attributes looked up."""
    attributes = part.__dict__
    names = tuple(name for name in attributes if name not in TABLES_OF_MODULES and name not in _OURS)
    cls: Any = type(part)
    made: nn.Module = object.__new__(_view_class(cls, names))
    tables = {name: table for name, table in attributes.items() if name in TABLES_OF_MODULES}
    made.__dict__.update({**tables, _PART: part})
    return made


# All that nn.Module keeps on an instance, but for one value.
TABLES_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}


@functools.cache
def _view_class(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    # Not one `__dict__` for both, with a property before its forward: torch.compile's guards read the `__dict__` first.
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **{name: _attribute(name) for name in names}})


def _attribute(name: str) -> property:
    def read(self: nn.Module) -> Any:
        return self.__dict__[_PART].__dict__[name]

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[_PART].__dict__[name] = value

    return property(read, write)


# What a layout has of its own


def _own_modules(layout: nn.Module, views: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The layout, and the modules in it that are none of the model's."""
    inside = {id(module) for part in views for module in part.modules()}
    for path, module in layout.named_modules():
        if id(module) not in inside:
            yield path, module


def _own(layout: nn.Module, views: tuple[nn.Module, ...]) -> dict[str, torch.Tensor]:
    """The tensors that the layout keeps, by name."""
    found = {}
    for path, module in _own_modules(layout, views):
        for name, value in _attributes(module):
            for at, tensor in enumerate(tensors_in(value)):
                found[".".join(item for item in (path, name, str(at) if at else "") if item)] = tensor
    return found


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules", _PART, _PARTS) and not isinstance(value, nn.Module):
            yield name, value


def _read_when_called(layout: nn.Module, views: tuple[nn.Module, ...]) -> None:
    """A weight of the model's that the layout keeps under a name of its own is looked up whenever it is read."""
    known = {
        id(tensor): (at, tuple(path.split(".")) if path else (), table, name)
        for at, part in reversed(list(enumerate(views)))
        for path, module in part.named_modules()
        for table, named in (("_parameters", module._parameters), ("_buffers", module._buffers))
        for name, tensor in named.items()
        if tensor is not None
    }
    for _, module in list(_own_modules(layout, views)):
        places = []
        for table in _TABLES:
            kept = module.__dict__ if table == "__dict__" else module.__dict__[table]
            for name in [
                name for name, value in kept.items() if isinstance(value, torch.Tensor) and id(value) in known
            ]:
                places.append((name, known[id(kept.pop(name))]))
        if places:
            module.__dict__[_PARTS] = views
            cls: Any = type(module)
            module.__class__ = _reading_class(cls, tuple(places))


@functools.cache
def _reading_class(cls: Any, places: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": cls.__module__}
    for name, place in places:
        members[name] = _reader(*place)
    return type(cls.__name__, (cls,), members)


def _reader(at: int, path: tuple[str, ...], table: str, name: str) -> property:
    def read(self: nn.Module) -> Any:
        module = self.__dict__[_PARTS][at]
        for segment in path:
            module = module._modules[segment]
        return getattr(module, table)[name]

    return property(read)


def _check_laid(
    cls: type[nn.Module], layout: nn.Module, views: tuple[nn.Module, ...], parts: tuple[nn.Module, ...], problem: str
) -> None:
    """Weights of the layout's own must be made of the modules': a loader that would fill them later does not come."""
    if getattr(cls, "conversion_mapping", None):
        raise LayerContractError(
            problem,
            (
                f"the weights of {cls.__name__} ({', '.join(sorted(_own(layout, views)))}) are filled while a checkpoint "
                "is loaded (conversion_mapping); this model is loaded already",
            ),
        )
    from kernelhub.layers.replay import poisoned_memory

    # Another seed, too: a weight that is drawn at random is not made of the modules'.
    with poisoned_memory(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = _own(cls(*map(view, parts)), views)
    first = _own(layout, views)
    unset = sorted(name for name, tensor in first.items() if name not in again or not _same(tensor, again[name]))
    if unset:
        raise LayerContractError(
            problem, (f"{cls.__name__} does not set its weights from the modules: {', '.join(unset)}",)
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


# The modules as they were


def _state(parts: tuple[nn.Module, ...]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    found = []
    for part in parts:
        for path, module in part.named_modules():
            name = f"{type(part).__name__}.{path}" if path else type(part).__name__
            tables = (module.__dict__, module._parameters, module._buffers, module._modules)
            found += [(name, table, dict(table)) for table in tables]
    return found


def _take_back(before: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[str]:
    """The modules that are not as before, by name; they are as before afterwards."""
    changed = []
    for name, table, held in before:
        if len(table) != len(held) or any(table.get(key, held) is not value for key, value in held.items()):
            table.clear()
            table.update(held)
            changed.append(name)
    return list(dict.fromkeys(changed))
