"""What the forward of somebody else's class computes, as a digest of its source: whether it is one that was compared.

A class is known by its name, and what a class of that name computes is another matter: releases of transformers differ (a
decoder layer has returned a tuple, a Gemma has multiplied its embeddings in the model's forward), and other packages put
forwards of their own on its classes. A kernel that stands in for another forward than the one it was written for gives
wrong results without an error, so a class is named only with a forward whose digest is in the table.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ["digest", "digest_of", "home"]

# What a function is called, says of itself, or is annotated with; and what Python's parsers name in different ways.
_LEFT_OUT = frozenset({"name", "annotation", "returns", "type_comment", "type_params", "ctx", "kind", "simple"})
_PACKAGES = ("torch", "transformers")


def digest(target: Any) -> str | None:
    """The digest of a function, or of a class's forward and the methods that it calls. None where it cannot be told.

    That is where there is no source, and where another package than transformers and torch has wrapped a function.
    """
    function = getattr(target, "forward", None) if isinstance(target, type) else target
    if not isinstance(function, FunctionType):
        return None
    found, methods = _digest(target, function)
    if any(inspect.getattr_static(target, name, None) is not held for name, held in methods):
        found, _ = _digest.__wrapped__(target, function)
    return found


def digest_of(functions: Iterable[ast.FunctionDef]) -> str:
    """The digest of functions: of their parameters, decorators and statements, whatever the Python that parsed them."""
    shapes = sorted((function.name, _shape(function)) for function in functions)
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def home(function: FunctionType) -> str:
    """The module that a function is written in. Not `__module__`, which who wraps a function takes over from it."""
    return str(function.__globals__.get("__name__", ""))


@functools.lru_cache(maxsize=1024)
def _digest(target: Any, function: FunctionType) -> tuple[str | None, tuple[tuple[str, Any], ...]]:
    """The digest, and the methods that were looked at: somebody may put others there, as he may the forward, `function`."""
    methods: dict[str, Any] = {}
    try:
        found = {"forward" if isinstance(target, type) else function.__name__: _parsed(function)}
        waiting = list(found.values()) if isinstance(target, type) else []
        while waiting:
            for name in _own_names(waiting.pop()):
                held = inspect.getattr_static(target, name, None)
                method = held.__func__ if isinstance(held, staticmethod) else held
                if name in found or not isinstance(method, FunctionType) or hasattr(nn.Module, name):
                    continue
                methods[name] = held
                found[name] = _parsed(method)
                waiting.append(found[name])
        return digest_of(found.values()), tuple(methods.items())
    except (OSError, TypeError, SyntaxError):
        return None, tuple(methods.items())


def _parsed(function: FunctionType) -> ast.FunctionDef:
    one: Any = function
    while True:
        if home(one).partition(".")[0] not in _PACKAGES:
            raise TypeError("somebody else's function")
        if not hasattr(one, "__wrapped__"):
            break
        one = one.__wrapped__
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
    if not isinstance(found, ast.FunctionDef) or found.name != one.__code__.co_name:
        raise TypeError("the source is not what runs")
    return found


def _own_names(function: ast.FunctionDef) -> list[str]:
    """`name` of each `self.name`."""
    own = function.args.args[0].arg if function.args.args else None
    return [
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    ]


def _shape(node: object) -> object:
    if isinstance(node, list):
        return [_shape(item) for item in node if not _is_text(item)]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _LEFT_OUT)
    # Empty fields: which of them a node has is another thing in each release of Python.
    return (type(node).__name__, *((name, _shape(value)) for name, value in fields if value not in (None, [])))


def _is_text(node: object) -> bool:
    """A docstring, or any other statement that is but a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
