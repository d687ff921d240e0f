"""Marking layers as kernel-aware. A mark only names the layer: it changes nothing about how the layer runs.

The marks are read by other libraries too: the class attributes `kernel_layer_name` and `kernel_condition`, and
`_kernel_funcs` in an instance's `__dict__`, `{layer name: function module}`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from kernelhub.errors import InvalidReference

Condition = Callable[[nn.Module], bool]
_Class = TypeVar("_Class", bound=type)

FUNCS = "_kernel_funcs"
MARKS = "_kernelhub_marks"  # on an instance: which marks `unkernelize` takes off it

# A mark on an instance: the attribute that holds it, and the name that it has there where that is a table.
Mark = tuple[str, str | None]


class FunctionModule(nn.Module):
    """A function that is kernel-aware: called as before, and with a `forward` that a kernel can stand in for.

    There is one for the whole process, as there is one of the function. Copies and pickles refer to it by name.
    """

    def __reduce__(self) -> str:
        return str(self.__dict__["__qualname__"])

    def extra_repr(self) -> str:
        return str(self.__dict__["__qualname__"])


def always(module: nn.Module) -> bool:  # noqa: ARG001 - a condition gets it
    """The condition of a layer that was marked without one."""
    return True


def use_kernel_forward_from_hub(layer_name: str, condition: Condition | None = None) -> Callable[[Any], Any]:
    """Mark an `nn.Module` class, or a function, as the layer `layer_name`.

    `condition(module)` says for each instance whether a kernel may stand in for it. A decorated function becomes a
    module that is called in the same way.

    Example: `@use_kernel_forward_from_hub("RMSNorm")` on `class RMSNorm(nn.Module)`.
    """
    if not isinstance(layer_name, str) or not layer_name:
        raise InvalidReference(f"a layer is marked with its name, got {layer_name!r}", hint='Such as "RMSNorm".')

    def mark(target: Any) -> Any:
        if isinstance(target, type):
            replace_kernel_forward_from_hub(target, layer_name, condition)
            return target
        return _function_module(target, layer_name, condition)

    return mark


def replace_kernel_forward_from_hub(cls: type[nn.Module], layer_name: str, condition: Condition | None = None) -> None:
    """Mark a class of someone else's as the layer `layer_name`; see `use_kernel_forward_from_hub`."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidReference(f"only nn.Module classes and functions can be layers, got {cls!r}")
    cls.kernel_layer_name = layer_name  # type: ignore[attr-defined]
    cls.kernel_condition = staticmethod(condition or always)  # type: ignore[attr-defined]


def use_kernel_func_from_hub(name: str) -> Callable[[Any], Any]:
    """Mark a function as the layer `name`: the older spelling of `use_kernel_forward_from_hub`."""
    return use_kernel_forward_from_hub(name)


def use_kernelized_func(*functions: Any) -> Callable[[_Class], _Class]:
    """Say on a class which kernel-aware functions its instances call, so that `kernelize` can see them."""
    named: dict[str, nn.Module] = {}
    for function in functions:
        name = getattr(type(function), "kernel_layer_name", None)
        if not isinstance(function, nn.Module) or name is None:
            raise InvalidReference(
                f"{getattr(function, '__name__', function)!r} is not kernel-aware",
                hint="Decorate the function with @use_kernel_forward_from_hub first.",
            )
        named[name] = function

    def attach(cls: _Class) -> _Class:
        construct = cls.__init__  # type: ignore[misc]

        @functools.wraps(construct)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            # Not a submodule: the model's modules, parameters and state dict stay what they were.
            self.__dict__.setdefault(FUNCS, {}).update(named)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return attach


def _function_module(function: Any, layer_name: str, condition: Condition | None) -> nn.Module:
    if not callable(function) or isinstance(function, nn.Module):
        raise InvalidReference(f"only nn.Module classes and functions can be layers, got {function!r}")
    cls = type(
        getattr(function, "__name__", "function"),
        (FunctionModule,),
        {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "forward": staticmethod(function),
            "can_torch_compile": False,
            "has_backward": True,
        },
    )
    replace_kernel_forward_from_hub(cls, layer_name, condition)
    module: nn.Module = cls()
    functools.update_wrapper(module, function)
    return module


def mark_as_calling(cls: type[nn.Module]) -> None:
    """Say of a marked class that the layer which it is marked as reads no weights, and calls each child as a module.

    It is no longer said once the class, or one that comes from it, is marked as another layer.
    """
    cls.kernel_calls_children = cls.kernel_layer_name  # type: ignore[attr-defined]


def calls_children(module: nn.Module) -> bool:
    """Whether `mark_as_calling` was said of the module's class. What is on the children (hooks, adapters) runs then."""
    said = getattr(type(module), "kernel_calls_children", None)
    return said is not None and said == getattr(type(module), "kernel_layer_name", None)


def marks_on(module: nn.Module, attributes: Iterable[str]) -> set[Mark]:
    """The marks that an instance has: those attributes, and the functions that it is said to call."""
    held = module.__dict__
    found: set[Mark] = {(name, None) for name in attributes if name in held}
    return found | {(FUNCS, name) for name in held.get(FUNCS, ())}


def lend(module: nn.Module, marks: set[Mark]) -> None:
    """Have `unkernelize` take these marks off the instance: whoever kernelizes put them there, and not the user."""
    if marks:
        module.__dict__[MARKS] = tuple(sorted({*module.__dict__.get(MARKS, ()), *marks}, key=str))


def keep(module: nn.Module) -> None:
    """Have the instance keep its marks."""
    module.__dict__.pop(MARKS, None)


def take_back(module: nn.Module) -> None:
    """Take the marks off an instance that were only lent to it."""
    unmark(module, module.__dict__.pop(MARKS, ()))


def unmark(module: nn.Module, marks: Iterable[Mark]) -> None:
    """Take marks off an instance."""
    held = module.__dict__
    for attribute, name in marks:
        if name is None:
            held.pop(attribute, None)
        elif attribute in held:
            held[attribute].pop(name, None)
            if not held[attribute]:
                del held[attribute]
