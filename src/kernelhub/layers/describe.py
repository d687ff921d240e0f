"""What a layer is, as values that are the same in every process: its code, its settings, the kinds of its weights.

Code is its bytecode with the constants, names and helpers that it uses: a comment changes nothing, a changed helper does. Of
installed packages that have a version, that stands for all that is not the layer's own class or file, but for what somebody
else has put there.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
import sysconfig
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.layers.markers import MARKS
from kernelhub.layers.swap import MARKER, USES

# What nn.Module keeps on every instance, what hooks of accelerate and we ourselves put there: no settings of the layer.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_NOT_SETTINGS = _OWN | {"forward", "_old_forward", "_hf_hook", MARKER, MARKS, USES}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_CODE = (FunctionType, MethodType, BuiltinFunctionType, functools.partial, type, ModuleType, property)
_TABLES = (dict, OrderedDict, defaultdict, Counter, MappingProxyType)
_LISTS = (list, tuple, deque, set, frozenset)

# Members of a class that say nothing of what its instances compute.
_NO_CODE = frozenset({
    "__module__", "__doc__", "__firstlineno__", "__init__", "__qualname__", "__dict__", "__weakref__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl", "__static_attributes__",
    "__parameters__", "__orig_bases__", "__dataclass_fields__", "__dataclass_params__", "__type_params__",
})  # fmt: skip

# Where callables of torch, Triton and functools keep the function that they are made of.
_MADE_OF = ("__wrapped__", "_init_fn", "fn")

# Objects in a description: more would be a whole program, and no layer's settings.
_MOST = 5_000
# Objects in a value that code refers to: more are a table that grows, and not constants.
_MOST_PLAIN = 500


class Opaque(Exception):
    """Something whose state cannot be told, so that nothing can be said of a layer that has it."""


def digest(value: Any) -> str:
    """A short name for a description."""
    return sha256_hex(canonical_json(value))


def settings(module: nn.Module) -> list[Any]:
    """The settings of a layer and its children (eps, activation, sizes): all that they hold beside weights and children.

    Raises `Opaque` for what has no description.
    """
    found: list[Any] = []
    for path, child in module.named_modules():
        walk = _Walk()
        for name, value in _sorted(child.__dict__):
            if name not in _NOT_SETTINGS:
                found.append([f"{path}.{name}", walk.value(value)])
        hooks = [list(child.__dict__.get(name, {}).values()) for name in _HOOKS] if path else []
        if any(hooks):  # those of the layer itself run around whatever its forward is
            found.append([f"{path} hooks", walk.value(hooks)])
    return found


def code(module: nn.Module) -> list[Any]:
    """The code of a layer's class and of its children's. Raises `Opaque` where there is too much of it."""
    return [_Walk(cls.__module__).cls(cls) for cls in dict.fromkeys(type(child) for child in module.modules())]


def weights(module: nn.Module) -> list[Any]:
    """The kinds of a layer's weights and buffers, by name, and whether they lie where vectors can be loaded from."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [[name, kind(item), aligned(item)] for name, item in named]


def value(found: Any) -> Any:
    """Any value. Raises `Opaque` for what has no description."""
    return _Walk().value(found)


def aligned(tensor: torch.Tensor) -> bool:
    """Whether the tensor begins at a multiple of 16 bytes."""
    return tensor.layout is torch.strided and tensor.data_ptr() % 16 == 0


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
            return ["enum", _name_of(type(value)), value.name, repr(value.value)]
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
        if isinstance(value, BuiltinFunctionType):
            of = value.__self__
            return ["builtin", str(value.__module__), value.__qualname__, self._global(of) if _is_value(of) else None]
        if type(value).__name__ in ("OpOverload", "OpOverloadPacket"):
            return ["builtin", str(value)]
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self.value(value.__func__)]
        if isinstance(value, property):
            return ["property", self.value(value.fget)]
        if type(value).__module__.startswith("torch.jit") and hasattr(value, "code"):
            return ["script", str(value.code)]
        if isinstance(value, nn.Module):
            return self.layer(value)
        return self._container(value)

    def layer(self, module: nn.Module) -> Any:
        """A module that a layer holds beside its children, or that code refers to."""
        held = [[name, self.value(item)] for name, item in _sorted(module.__dict__) if name not in _NOT_SETTINGS]
        tensors = [[name, item if item is None else kind(item)] for name, item in _own_tensors(module)]
        inside = [[name, self.value(child)] for name, child in module._modules.items()]
        return ["layer", self.value(type(module)), held, tensors, inside]

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
        if callable(value):
            made_of = next((item for name in _MADE_OF if (item := getattr(value, name, None)) is not None), None)
            if made_of is not None:
                return ["made of", _name_of(type(value)), self.value(made_of)]
        if _is_array(value):
            return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        cls = self.value(type(value))
        state = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    state[name] = getattr(value, name)
        shown = any("__repr__" in vars(base) for base in type(value).__mro__[:-1])
        if not state and shown and " at 0x" not in (text := repr(value)):
            return ["object", cls, text]  # patterns, paths, times: they say what they are
        if not state and not hasattr(value, "__dict__"):
            raise Opaque(f"{_name_of(type(value))} does not show what it holds")
        return ["object", cls, [[name, self.value(item)] for name, item in _sorted(state)]]

    def cls(self, cls: type) -> Any:
        """A class: its name, and its members; of packages that have a version, only those that are not theirs."""
        found: list[Any] = []
        for base in cls.__mro__[:-1]:
            known = _versioned(base.__module__) if base.__module__ != self._home else None
            items = [(name, item) for name, item in vars(base).items() if name not in _NO_CODE]
            if known:
                items = [(name, item) for name, item in items if _is_foreign(item, base.__module__)]
                items = [(name, item) for name, item in items if _is_reached(name, cls)]
                if _root(base.__module__) == "torch" and not items:
                    continue
            found.append([known, _name_of(base), [[name, self._global(item)] for name, item in items]])
        return ["class", _name_of(cls), found]

    def function(self, function: FunctionType) -> Any:
        """A function: its code and defaults, what it closes over, and the helpers that it names."""
        if function.__module__ != self._home and (known := _label(function)):
            return ["function", known, function.__qualname__]
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        globals_ = list(self._globals(function))
        made = [self.code(function.__code__), self.value(function.__defaults__), self.value(function.__kwdefaults__)]
        return ["function", function.__qualname__, *made, cells, globals_]

    def _globals(self, function: FunctionType) -> Iterator[list[Any]]:
        names, known = sorted(_names(function.__code__)), function.__globals__
        seen: set[int] = set()
        for name in names:
            if name not in known:
                continue
            yield [name, self._global(known[name])]
            if isinstance(known[name], ModuleType):
                yield from self._inside(name, known[name], names, seen)
        for module in _imported(function):
            yield from self._inside(module.__name__, module, names, seen)

    def _inside(self, path: str, module: ModuleType, names: Iterable[str], seen: set[int]) -> Iterator[list[Any]]:
        """What code takes from a module: of one that has a version, only what is not its own."""
        if id(module) in seen:
            return
        seen.add(id(module))
        table, known = vars(module), _versioned(module.__name__)
        for name in names:
            if name not in table:
                continue
            item = table[name]
            if isinstance(item, ModuleType):
                yield from self._inside(f"{path}.{name}", item, names, seen)
            elif not known or _is_foreign(item, module.__name__):
                yield [f"{path}.{name}", self._global(item)]

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
        """What code refers to: code and constants as they are; of what may change while it runs (logs), its kind."""
        if isinstance(value, (*_CODE, tuple, nn.Module)) or callable(value) or _is_plain(value):
            return self.value(value)
        if isinstance(value, (staticmethod, classmethod, functools.cached_property)):
            return [type(value).__name__, self.value(value.func if hasattr(value, "func") else value.__func__)]
        return ["some", _name_of(type(value))]


def _is_plain(value: Any) -> bool:
    """Whether a value is data, and not much: constants, code, tables and lists of them, objects that hold nothing else."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (*_CONSTANTS, *_TORCH_VALUES, *_CODE, torch.device, torch.Tensor, enum.Enum, nn.Module)):
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        if len(seen) + len(waiting) > _MOST_PLAIN:
            return False
        if type(item) in _TABLES:
            waiting += [*item.keys(), *item.values()]
        elif type(item) in _LISTS:
            waiting += item
        elif type(item) is SimpleNamespace or (hasattr(item, "__dict__") and not _versioned(type(item).__module__)):
            waiting += vars(item).values()
        elif not _is_array(item):
            return False
    return True


def _is_value(of: Any) -> bool:
    """Whether a builtin method is one of a value, and not a function of a module or a class."""
    return of is not None and not isinstance(of, (ModuleType, type)) and not type(of).__module__.startswith("torch._C")


def _is_array(value: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_foreign(item: Any, module: str) -> bool:
    """Whether a function or class in a module (or in a class of it) comes from another package: somebody put it there."""
    if isinstance(item, (staticmethod, classmethod)):
        item = item.__func__
    if not isinstance(item, (FunctionType, type)):
        return False
    root = _root(module)
    where = item.__globals__.get("__name__") if isinstance(item, FunctionType) else item.__module__
    return root not in (_root(str(where)), _root(str(item.__module__))) or _versioned(str(where)) is None


def _is_reached(name: str, cls: type) -> bool:
    """Whether a member of that name can be one that an instance runs: Python calls it, or a method of the class names it.

    transformers puts a helper of its own on `nn.Module` once it has initialised a model, which no other layer calls.
    """
    if name.startswith("__"):
        return True
    members = (item for base in cls.__mro__[:-1] for item in vars(base).values())
    return any(isinstance(item, FunctionType) and name in _names(item.__code__) for item in members)


def _label(function: FunctionType) -> str | None:
    """The package that stands for a function: that of its module, where its code is of one that has a version too."""
    where = function.__globals__.get("__name__")
    return _versioned(str(function.__module__)) if _versioned(str(where)) else None


def _imported(function: FunctionType) -> list[ModuleType]:
    """The modules that a function imports when it runs, as far as they are imported by now."""
    found = {}
    package = str(function.__globals__.get("__package__") or function.__module__ or "").split(".")
    for code in _inner(function.__code__):
        if dis.opmap["IMPORT_NAME"] not in code.co_code[::2]:
            continue
        for item in dis.get_instructions(code):
            if item.opname == "IMPORT_NAME":
                above = [".".join(package[:end]) for end in range(len(package), 0, -1)]
                for name in (item.argval, *(f"{one}.{item.argval}".rstrip(".") for one in above)):
                    if name in sys.modules:
                        found[name] = sys.modules[name]
    return [found[name] for name in sorted(found)]


def _inner(found: CodeType) -> Iterator[CodeType]:
    yield found
    for item in found.co_consts:
        if isinstance(item, CodeType):
            yield from _inner(item)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


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
    """`"transformers 5.22.0"`: the installed package that a module is of, where it says its version; None elsewhere.

    A folder that is worked on may have a version too: only what is installed is taken by it.
    """
    root = _root(name)
    module = sys.modules.get(root)
    file = getattr(module, "__file__", None)
    if root in sys.stdlib_module_names:  # names that a module of the user's may have too: `test`, `profile`
        return root if module is None or file is None or _standard(file) else None
    if root == "torch":
        return root
    version = getattr(module, "__version__", None)
    installed = isinstance(file, str) and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return f"{root} {version}" if isinstance(version, str) and installed else None


def _standard(file: str) -> bool:
    """Whether a file is Python's own."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    found = Path(file).resolve()
    return any(place and found.is_relative_to(Path(place).resolve()) for place in places)
