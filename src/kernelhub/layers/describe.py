"""What a layer is, as values that are the same in every process: its code, its settings, the kinds of its weights.

Code is its bytecode with the constants, names and helpers that it uses: a comment changes nothing, a changed helper does. Of
packages that have a version, that stands for all that is not the layer's own class or file.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.layers.swap import MARKER, USES

# What nn.Module keeps on every instance, what hooks of accelerate and we ourselves put there: no settings of the layer.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_NOT_SETTINGS = _OWN | {"forward", "_old_forward", "_hf_hook", MARKER, USES}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_BUILTIN_ROOTS = frozenset({"torch", "builtins", "typing", *sys.stdlib_module_names})

# Objects in a description: more would be a whole program, and no layer's settings.
_MOST = 5_000


class Opaque(Exception):
    """Something whose state cannot be told, so that nothing can be said of a layer that has it."""


def digest(value: Any) -> str:
    """A short name for a description."""
    return sha256_hex(canonical_json(value))


def settings(module: nn.Module) -> list[Any]:
    """The settings of a layer and its children (eps, activation, sizes): what is no tensor and no module, by name.

    Raises `Opaque` for what has no description.
    """
    found: list[Any] = []
    for path, child in module.named_modules():
        walk = _Walk()
        for name, value in _sorted(child.__dict__):
            if name not in _NOT_SETTINGS and not isinstance(value, (torch.Tensor, nn.Module)):
                found.append([f"{path}.{name}", walk.value(value)])
        hooks = [list(child.__dict__.get(name, {}).values()) for name in _HOOKS] if path else []
        if any(hooks):  # those of the layer itself run around whatever its forward is
            found.append([f"{path} hooks", walk.value(hooks)])
    return found


def code(module: nn.Module) -> list[Any]:
    """The code of a layer's class and of its children's. Raises `Opaque` where there is too much of it."""
    return [_Walk(cls.__module__).cls(cls) for cls in dict.fromkeys(type(child) for child in module.modules())]


def weights(module: nn.Module) -> list[Any]:
    """The kinds of a layer's weights and buffers, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [[name, kind(item)] for name, item in named]


def kind(tensor: torch.Tensor) -> list[Any]:
    """A tensor without its values, and without the number of its device."""
    strides = list(tensor.stride()) if tensor.layout is torch.strided else []
    return [str(tensor.dtype), list(tensor.shape), strides, tensor.device.type, tensor.requires_grad]


class _Walk:
    """One description: what is met again is named by when it was met first. `home` is the module whose code is told."""

    def __init__(self, home: str = "") -> None:
        self._home = home
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no identity is given twice

    def value(self, value: Any) -> Any:
        """A JSON value that stands for any value."""
        if isinstance(value, _CONSTANTS) and type(value) in _CONSTANTS:
            return [type(value).__name__, repr(value)]
        if isinstance(value, _TORCH_VALUES):
            return str(value)
        if isinstance(value, torch.device):
            return ["device", value.type]
        if isinstance(value, torch.Tensor):
            return ["tensor", kind(value)]
        if isinstance(value, enum.Enum):
            return ["enum", _name_of(type(value)), value.name]
        if isinstance(value, tuple):  # equal ones may be one object or two, as they come from source or from bytecode
            return [_name_of(type(value)), [self.value(item) for item in value]]
        if id(value) in self._met:
            return ["again", self._met[id(value)]]
        if len(self._met) >= _MOST:
            raise Opaque(f"it refers to more than {_MOST:,} objects")
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return self._made_of(value)

    def _made_of(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return ["module", _versioned(value.__name__) or value.__name__]
        if isinstance(value, type):
            return self.cls(value)
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, MethodType):
            return ["method", self.value(value.__self__), self.value(value.__func__)]
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, BuiltinFunctionType) or type(value).__name__ in ("OpOverload", "OpOverloadPacket"):
            return ["builtin", str(getattr(value, "__qualname__", value))]
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self.value(value.__func__)]
        if isinstance(value, property):
            return ["property", self.value(value.fget)]
        if isinstance(value, nn.Module):
            return ["layer", _name_of(type(value))]
        return self._container(value)

    def _container(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return [_name_of(type(value)), [[self.value(key), self.value(item)] for key, item in _sorted(value)]]
        if isinstance(value, (set, frozenset)):
            # Each by itself: what was met before is named by a number, and sets have no order.
            return [_name_of(type(value)), sorted((_Walk(self._home).value(item) for item in value), key=repr)]
        if isinstance(value, list):
            return [_name_of(type(value)), [self.value(item) for item in value]]
        return self._object(value)

    def _object(self, value: Any) -> Any:
        state = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    state[name] = getattr(value, name)
        if not state and type(value).__repr__ is not object.__repr__ and " at 0x" not in (text := repr(value)):
            return ["object", _name_of(type(value)), text]  # patterns, paths, times: they say what they are
        if not state and not hasattr(value, "__dict__"):
            raise Opaque(f"{_name_of(type(value))} does not show what it holds")
        return ["object", _name_of(type(value)), [[name, self.value(item)] for name, item in _sorted(state)]]

    def cls(self, cls: type) -> Any:
        """A class: its name, and the functions that are not torch's."""
        found: list[Any] = []
        for base in cls.__mro__:
            if _root(base.__module__) in _BUILTIN_ROOTS:
                continue
            if base.__module__ != self._home and (known := _versioned(base.__module__)):
                found.append([known, _name_of(base)])
                continue
            members = [
                [name, self.value(item)]
                for name, item in vars(base).items()
                if isinstance(item, (FunctionType, staticmethod, classmethod, property, *_CONSTANTS))
                and name not in ("__module__", "__doc__", "__firstlineno__", "__init__", "__qualname__")
            ]
            found.append([_name_of(base), members])
        return ["class", _name_of(cls), found]

    def function(self, function: FunctionType) -> Any:
        """A function: its code and defaults, what it closes over, and the helpers that it names."""
        known = _versioned(function.__module__ or "") if function.__module__ != self._home else None
        if known:
            return ["function", known, function.__qualname__]
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        globals_ = list(self._globals(sorted(_names(function.__code__)), function.__globals__))
        made = [self.code(function.__code__), self.value(function.__defaults__), self.value(function.__kwdefaults__)]
        return ["function", function.__qualname__, *made, cells, globals_]

    def _globals(self, names: list[str], known: Mapping[str, Any]) -> Iterator[list[Any]]:
        for name in names:
            if name not in known:
                continue
            yield [name, self._global(known[name])]
            if isinstance(known[name], ModuleType) and not _versioned(known[name].__name__):
                inside = vars(known[name])  # of a module of the user's own, what is taken from it counts
                yield from ([f"{name}.{one}", self._global(inside[one])] for one in names if one in inside)

    def code(self, found: CodeType) -> Any:
        constants = [self.code(item) if isinstance(item, CodeType) else self.value(item) for item in found.co_consts]
        names = [list(found.co_names), list(found.co_varnames), list(found.co_freevars)]
        return [found.co_code.hex(), constants, names, found.co_flags]

    def _cell(self, cell: Any) -> Any:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return ["empty"]
        return self._global(content)

    def _global(self, value: Any) -> Any:
        """What code refers to: other code and constants as they are; of what may change while it runs, its kind."""
        if isinstance(value, (FunctionType, MethodType, type, ModuleType, enum.Enum, tuple, torch.device)):
            return self.value(value)
        if isinstance(value, (*_CONSTANTS, *_TORCH_VALUES, functools.partial, BuiltinFunctionType)):
            return self.value(value)
        return ["some", _name_of(type(value))]


def _names(found: CodeType) -> set[str]:
    inner = (item for item in found.co_consts if isinstance(item, CodeType))
    return {*found.co_names, *(name for item in inner for name in _names(item))}


def _sorted(table: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The items by key: tables are also filled from sets, whose order is another in each process."""
    items = list(table.items())
    return sorted(items, key=lambda item: item[0]) if all(isinstance(key, str) for key, _ in items) else items


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _root(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _versioned(name: str) -> str | None:
    """`"transformers 5.22.0"`: the package that a module is of, where it says its version; None elsewhere."""
    root = _root(name)
    if root in _BUILTIN_ROOTS:
        return root
    version = getattr(sys.modules.get(root), "__version__", None)
    return f"{root} {version}" if isinstance(version, str) else None
