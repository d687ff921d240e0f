"""The rotary embeddings of transformers' models, which are functions: how `mark` makes them kernel-aware.

Each modeling module defines an `apply_rotary_pos_emb` of its own, and its attention finds it as a global. transformers'
decorators make most of them kernel-aware, where a package called `kernels` is installed. `mark_rotary` does it for the
others, and everywhere: the global becomes a module that is called as the function was and calls it, until a kernel stands
in for it. Who has imported the function before keeps what he has. As with what decorators make, there is one for the
process; a model that runs it with a kernel shares that with the other models of the same modeling module.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from types import FunctionType
from typing import Any

from torch import nn

from kernelhub.errors import InvalidReference
from kernelhub.integrations.forwards import home
from kernelhub.layers.markers import FUNCS, use_kernel_forward_from_hub

__all__ = ["mark_rotary"]

LAYER = "rotary_pos_emb"
FUNCTION = "apply_rotary_pos_emb"
PARAMETERS = ("q", "k", "cos", "sin", "unsqueeze_dim")
_MODELS = "transformers.models."
# Those whose formula is none that the kernel knows. A test asks each function of transformers for its formula.
_NAMES = """
ernie4_5 ernie4_5_moe glm glm4 helium moonshine moonshine_streaming pe_audio pe_audio_video pe_video
"""
OTHER_FORMULAS = frozenset(f"{_MODELS}{name}.modeling_{name}" for name in _NAMES.split())

_changing = threading.Lock()


def mark_rotary(module: nn.Module) -> str | None:
    """Name the rotary embedding that the module's forward calls; an empty string says that it is named now.

    Else why it is not named, and None where the module calls no such function.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or FUNCTION not in code.co_names or not str(scope.get("__name__")).startswith(_MODELS):
        return None
    if LAYER in module.__dict__.get(FUNCS, {}):
        return ""
    function = scope.get(FUNCTION)
    if isinstance(function, FunctionType):
        reason = _unfit(function)
        if reason:
            return reason
        function = aware(home(function))
        scope[FUNCTION] = function
    if not isinstance(function, nn.Module):
        return f"it is a {type(function).__name__}, and not the function that transformers has"
    # Not a submodule, as `use_kernelized_func` has it.
    module.__dict__.setdefault(FUNCS, {})[LAYER] = function
    return ""


def aware(name: str) -> nn.Module:
    """The rotary embedding of the modeling module `name`, kernel-aware from now on.

    Raises `InvalidReference` [ValueError] where the module has none. It is also what pickles of such functions call.
    """
    if not isinstance(name, str) or not name.startswith(_MODELS):
        raise InvalidReference(f"{name!r} is no modeling module of transformers")
    scope = vars(importlib.import_module(name))
    with _changing:
        found = scope.get(FUNCTION)
        if isinstance(found, nn.Module):
            return found
        if not isinstance(found, FunctionType) or home(found) != name or _unfit(found):
            raise InvalidReference(
                f"{name} has no {FUNCTION} that a kernel could stand in for",
                hint="The model was saved with another version of transformers, which had one.",
            )
        function: nn.Module = use_kernel_forward_from_hub(LAYER)(found)
        # In another process the global may still be the function: copies and pickles ask for what it becomes.
        type(function).__reduce__ = _reduce  # type: ignore[assignment, method-assign]
        scope[FUNCTION] = function
        return function


def _reduce(function: nn.Module) -> Any:
    return aware, (function.__dict__["__module__"],)


def _unfit(function: FunctionType) -> str:
    """Why the kernel cannot stand in for a function; empty where it can."""
    if function.__module__ != home(function) or not home(function).startswith(_MODELS):
        return f"it is a function of {home(function)}, and not the one that transformers has"
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != PARAMETERS:
        return f"it takes ({', '.join(parameters)}), and the kernel ({', '.join(PARAMETERS)})"
    return "the kernel does not know its formula" if function.__module__ in OTHER_FORMULAS else ""
