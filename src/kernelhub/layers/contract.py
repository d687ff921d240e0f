"""What a layer kernel must be to stand in for a module's forward."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from kernelhub.errors import LayerContractError

_MEMBERS = frozenset({"forward", "can_torch_compile", "has_backward"})
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Comparison:
    """A kernel beside a forward: what makes it unfit (`problems`), and what a reader should know (`notes`)."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(kernel: type[nn.Module], forward: Any, module: type[nn.Module], name: str) -> tuple[str, ...]:
    """The notes on a kernel that may stand in for the forward of `module`.

    Raises `LayerContractError` [TypeError] with every reason why it may not. `name` is what to call the kernel.
    """
    classes: tuple[Any, Any] = kernel, module
    found = compare(classes[0], forward, classes[1])
    if found.problems:
        raise LayerContractError(
            f"{name} cannot stand in for {module.__module__}.{module.__qualname__}.forward", found.problems
        )
    return found.notes


@functools.lru_cache(maxsize=1024)
def compare(kernel: Any, forward: Any, module: Any) -> Comparison:
    """The kernel class and its forward, beside the class that it is to stand in for."""
    if not issubclass(kernel, nn.Module):
        return Comparison((f"{kernel.__qualname__} is not an nn.Module",))
    problems = _class_problems(kernel)
    if kernel.forward is nn.Module.forward:
        return Comparison((*problems, "it has no forward"))
    if not isinstance(forward, FunctionType):
        return Comparison((*problems, "its forward is not a plain function"))
    theirs, ours = _parameters(module), list(inspect.signature(forward).parameters.values())[1:]
    notes: list[str] = []
    _compare_signatures(theirs, ours, problems, notes)
    return Comparison(tuple(problems), tuple(notes))


def _class_problems(kernel: type[nn.Module]) -> list[str]:
    """Members beyond a forward would be lost: only `forward` is put on the module."""
    problems = []
    if kernel.__init__ is not nn.Module.__init__:
        problems.append("it has a constructor, which would never be called")
    own = {
        name
        for cls in kernel.__mro__
        if cls not in nn.Module.__mro__
        for name, value in vars(cls).items()
        if not _belongs_to_every_class(name, value)
    }
    if extra := sorted(own - _MEMBERS):
        problems.append(f"it has members that the module would not get: {', '.join(extra)}")
    return problems


def _belongs_to_every_class(name: str, value: object) -> bool:
    """Names that Python itself puts into a class; a special method of the kernel's own is a member like any other."""
    special = name.startswith("__") and name.endswith("__")
    return special and (name.startswith("__annotate") or name == "__init__" or not isinstance(value, FunctionType))


def _parameters(module: type[nn.Module]) -> list[inspect.Parameter]:
    """The parameters of a class's forward, without `self`."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    static = isinstance(inspect.getattr_static(module, "forward"), staticmethod)
    return parameters if static else parameters[1:]


def _compare_signatures(
    theirs: list[inspect.Parameter], ours: list[inspect.Parameter], problems: list[str], notes: list[str]
) -> None:
    shown = f"forward{_shown(theirs)} is the original's, forward{_shown(ours)} the kernel's"
    if len(_named(theirs)) != len(_named(ours)) or len(_positional(theirs)) != len(_positional(ours)):
        problems.append(f"it takes other parameters: {shown}")
        return
    for original, own in zip(_positional(theirs), _positional(ours), strict=True):
        if original.kind is not own.kind:
            problems.append(f"{own.name!r} is {own.kind.description}, {original.name!r} {original.kind.description}")
        _compare_defaults(original, own, problems, notes)
    names = [item.name for item in _positional(theirs)], [item.name for item in _positional(ours)]
    if names[0] != names[1]:
        notes.append(f"its positional parameters are named ({', '.join(names[1])}), not ({', '.join(names[0])})")
    keyword = {item.name: item for item in theirs if item.kind is inspect.Parameter.KEYWORD_ONLY}
    for own in (item for item in ours if item.kind is inspect.Parameter.KEYWORD_ONLY):
        if own.name not in keyword:
            problems.append(f"it takes the keyword {own.name!r}, which the original does not: {shown}")
        else:
            _compare_defaults(keyword[own.name], own, problems, notes)
    for kind, spelt in ((inspect.Parameter.VAR_POSITIONAL, "*args"), (inspect.Parameter.VAR_KEYWORD, "**kwargs")):
        if any(item.kind is kind for item in theirs) != any(item.kind is kind for item in ours):
            problems.append(f"only one of the two takes {spelt}: {shown}")


def _compare_defaults(
    original: inspect.Parameter, own: inspect.Parameter, problems: list[str], notes: list[str]
) -> None:
    if original.default is inspect.Parameter.empty:
        return
    if own.default is inspect.Parameter.empty:
        problems.append(f"{own.name!r} has no default, the original's is {original.default!r}")
    elif own.default is not original.default and repr(own.default) != repr(original.default):
        notes.append(f"the default of {own.name!r} is {own.default!r}, the original's {original.default!r}")


def _positional(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [item for item in parameters if item.kind in _POSITIONAL]


def _named(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [item for item in parameters if item.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)]


def _shown(parameters: list[inspect.Parameter]) -> str:
    bare = [item.replace(annotation=inspect.Parameter.empty) for item in parameters]
    return str(inspect.Signature(bare))
