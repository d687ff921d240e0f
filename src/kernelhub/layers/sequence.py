"""Does a module hand the result of one child to the next, and to nothing else? Read from its forward, without running it.

A fused kernel computes several children at once. Where the first stood, the whole result comes out, and the others give
back what they are given. That is right only where nobody but the next child sees what lies in between.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_REPEATED = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, *_NESTED)


@functools.lru_cache(maxsize=256)
def broken_chain(parent: Any, names: tuple[str, ...]) -> str:
    """Why `parent`'s forward does not hand each of the children `names` nothing but the result of the one before.

    Empty where it does. What cannot be told (no source, a loop, another name for a child) is a reason too.
    """
    forward = parent.forward
    try:
        function = _function(forward)
        around = _around(parent, names)
        return around or _others(parent, function, names) or _chain(function, names)
    except (OSError, TypeError, SyntaxError):
        return f"the source of {parent.__qualname__}.forward cannot be read"


def follows(parent: nn.Module, names: Sequence[str]) -> bool:
    """Whether the children stand one after another in an `nn.Sequential`, which hands each result to the next."""
    kind: Any = type(parent)
    if kind.forward is not nn.Sequential.forward or kind.__call__ is not nn.Module.__call__:
        return False
    order = list(parent._modules)
    at = order.index(names[0])
    return order[at : at + len(names)] == list(names)


def _function(forward: Any) -> ast.FunctionDef:
    found = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    if not isinstance(found, ast.FunctionDef) or not found.args.args:
        raise TypeError("not a method")
    code = inspect.unwrap(forward).__code__
    read = {node.attr for node in ast.walk(found) if isinstance(node, ast.Attribute)}
    if found.name != code.co_name or not _attributes(code) <= read:
        raise TypeError("the source is not what runs")  # a file that was changed, or another one of that name
    return found


def _attributes(code: CodeType) -> set[str]:
    """The attributes that code reads and writes, also in functions inside it."""
    names = {item.argval for item in dis.get_instructions(code) if item.opname in _ATTRIBUTES}
    return names.union(*(_attributes(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


_ATTRIBUTES = {
    "LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD",
}  # fmt: skip


# What reaches children without their names.
_ANY_CHILD = frozenset({
    "_modules", "__dict__", "__getattr__", "apply", "children", "get_submodule", "modules", "named_children", "named_modules",
})  # fmt: skip


def _around(parent: type[nn.Module], names: tuple[str, ...]) -> str:
    """What wraps the parent's forward, or calls it, must not touch the children."""
    function, wrappers = parent.forward, []
    while hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    calls = (base.__dict__.get("__call__") for base in parent.__mro__ if base is not nn.Module)
    for one in (*wrappers, *calls):
        code = getattr(one, "__code__", None)
        if code is not None and _attributes(code) & {*names, *_ANY_CHILD - {"__dict__"}}:
            return f"what runs around {parent.__qualname__}.forward uses its {' or '.join(names)} too"
    return ""


def _others(parent: type[nn.Module], forward: ast.FunctionDef, names: tuple[str, ...]) -> str:
    """A method of the parent's own that its forward calls, or one that this calls, must not touch the children."""
    waiting, seen = [("forward", forward)], {"forward"}
    while waiting:
        name, function = waiting.pop()
        where, own = f"{parent.__qualname__}.{name}", function.args.args[0].arg
        if any(isinstance(node, ast.Name) and node.id == own for node in _bare(function, own)):
            return f"{where} hands itself to other code, which may use its {' and '.join(names)}"
        if _names(function, "super"):
            return f"{where} calls what it overrides, which may use its {' and '.join(names)}"
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (
                node.attr in _ANY_CHILD or (name != "forward" and node.attr in names)
            ):
                return f"{where} uses its {' or '.join(names)} too"
            method = _attribute(node, own)
            if method is None or method in names or method in seen:
                continue
            seen.add(method)
            found = inspect.getattr_static(parent, method, None)
            if found is not inspect.getattr_static(nn.Module, method, None):
                found = getattr(found, "fget", None) or getattr(found, "func", None) or found
                if isinstance(found, FunctionType):
                    waiting.append((method, _function(found)))
    return ""


def _bare(forward: ast.FunctionDef, own: str) -> Iterator[ast.AST]:
    """The uses of `self` that are no `self.attribute`."""
    held = {id(node.value) for node in ast.walk(forward) if isinstance(node, ast.Attribute)}
    for node in ast.walk(forward):
        if isinstance(node, ast.Name) and node.id == own and id(node) not in held:
            yield node


def _attribute(node: ast.AST, own: str) -> str | None:
    """`name` of `self.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own:
        return node.attr
    return None


def _chain(forward: ast.FunctionDef, names: tuple[str, ...]) -> str:
    own = forward.args.args[0].arg
    calls = []
    for at, name in enumerate(names):
        uses = [node for node in ast.walk(forward) if _attribute(node, own) == name]
        found = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and node.func in uses]
        if len(uses) != 1 or len(found) != 1:
            return f"its forward uses self.{name} {len(uses)} times; expected one call"
        if at and (found[0].keywords or len(found[0].args) != 1 or isinstance(found[0].args[0], ast.Starred)):
            return f"its forward calls self.{name} with other arguments than the result before"
        calls.append(found[0])
    within = [node for node in ast.walk(forward) if isinstance(node, _REPEATED) and node is not forward]
    for name, call in zip(names, calls, strict=True):
        if any(call in ast.walk(node) for node in within):
            return f"its forward calls self.{name} in a loop or a function of its own"
    pairs = zip(names, names[1:], calls, calls[1:], strict=False)
    return next((why for *pair, one, two in pairs if (why := _handed_on(forward, pair, one, two))), "")


def _handed_on(forward: ast.FunctionDef, names: Sequence[str], one: ast.Call, two: ast.Call) -> str:
    """Why the result of the first call goes elsewhere than into the second."""
    first, second = names
    if two.args[0] is one:
        return ""
    value = two.args[0]
    elsewhere = f"its forward uses the result of self.{first} elsewhere than in self.{second}"
    if not isinstance(value, ast.Name):
        return elsewhere
    inner = (node for node in ast.walk(forward) if isinstance(node, _NESTED) and node is not forward)
    if any(_names(node, value.id) for node in inner):
        return elsewhere
    block, start, end = _block(forward, one, two)
    if block is None:
        return f"its forward does not call self.{second} after self.{first} in all cases"
    made = block[start]
    plain = isinstance(made, ast.Assign) and made.value is one and [_name(target) for target in made.targets]
    if plain != [value.id]:
        return elsewhere
    for statement in block[start + 1 : end]:
        if _names(statement, value.id):
            return elsewhere
    last = block[end]
    if len([node for node in _names(last, value.id) if isinstance(node.ctx, ast.Load)]) != 1:
        return elsewhere
    if _assigns(last, value.id):
        return ""
    for statement in block[end + 1 :]:
        loads = [node for node in _names(statement, value.id) if isinstance(node.ctx, ast.Load)]
        if loads:
            return elsewhere
        if _assigns(statement, value.id):
            return ""
    after = [node for node in _names(forward, value.id) if node.lineno > (last.end_lineno or last.lineno)]
    return elsewhere if any(isinstance(node.ctx, ast.Load) for node in after) else ""


def _block(forward: ast.FunctionDef, one: ast.Call, two: ast.Call) -> tuple[list[ast.stmt] | None, int, int]:
    """The list of statements that has both calls, each in a statement of its own, and where in it they stand."""
    for node in ast.walk(forward):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            at = [[call in ast.walk(statement) for statement in block] for call in (one, two)]
            if any(at[0]) and any(at[1]):
                start, end = at[0].index(True), at[1].index(True)
                simple = all(
                    isinstance(block[index], (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr))
                    for index in (start, end)
                )
                if start < end and simple:
                    return block, start, end
    return None, 0, 0


def _names(node: ast.AST, name: str) -> list[ast.Name]:
    return [item for item in ast.walk(node) if isinstance(item, ast.Name) and item.id == name]


def _assigns(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.Assign) and name in [_name(target) for target in statement.targets]


def _name(target: ast.expr) -> str | None:
    return target.id if isinstance(target, ast.Name) else None
