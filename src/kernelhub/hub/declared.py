"""The layers that a kernel declares, read from its Python source without running it.

They go into the manifest so that `info` can show them before anything is downloaded or trusted. What the source does
not say in plain words (a class made by a call, an import from elsewhere) is left out: loading a layer looks at the class
itself.

>>> source = b"class Norm(nn.Module):\\n  can_torch_compile = True\\n  def forward(self, x, *, eps=1e-6): ..."
>>> declared_layers({"layers.py": source})
{'Norm': LayerInfo(can_torch_compile=True, has_backward=True, forward='(self, x, *, eps=1e-06)')}
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from kernelhub.core.manifest import LayerInfo

_MODULE_BASES = frozenset({"Module", "nn.Module", "torch.nn.Module"})

Classes = Mapping[str, ast.ClassDef]


def declared_layers(files: Mapping[str, bytes]) -> dict[str, LayerInfo]:
    """The layers of a variant's files, by name: classes of `layers.py`, of `layers/*.py`, or in `class layers`."""
    found: dict[str, LayerInfo] = {}
    for path in sorted(files):
        parts = path.split("/")
        if path == "layers.py" or (len(parts) == 2 and parts[0] == "layers" and path.endswith(".py")):
            found |= _layers(_classes(_body(files[path])))
    outer = _classes(_body(files.get("__init__.py", b"")))
    if "layers" in outer:
        found |= _layers({**outer, **_classes(outer["layers"].body)}, _classes(outer["layers"].body))
    return dict(sorted(found.items()))


def _body(source: bytes) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # another Python's syntax, or no Python at all
        return []


def _classes(body: Iterable[ast.stmt]) -> dict[str, ast.ClassDef]:
    return {item.name: item for item in body if isinstance(item, ast.ClassDef)}


def _layers(scope: Classes, among: Classes | None = None) -> dict[str, LayerInfo]:
    """The modules with a `forward` among the classes; their base classes are looked up in `scope`."""
    found = {}
    for name, node in (scope if among is None else among).items():
        line = _line(node, scope)
        if name.startswith("_") or not any(_is_module(item) for item in line):
            continue
        forward = next((item for item in map(_forward, line) if item), None)
        if forward is not None:
            found[name] = LayerInfo(
                can_torch_compile=_flag(line, "can_torch_compile", default=False),
                has_backward=_flag(line, "has_backward", default=True),
                forward=_signature(forward.args),
            )
    return found


def _line(node: ast.ClassDef, scope: Classes) -> list[ast.ClassDef]:
    """The class and its base classes in scope, nearest first."""
    line, waiting = [], [node]
    while waiting:
        item = waiting.pop(0)
        if item not in line:
            line.append(item)
            waiting += [scope[base.id] for base in item.bases if isinstance(base, ast.Name) and base.id in scope]
    return line


def _is_module(node: ast.ClassDef) -> bool:
    return any(_dotted(base) in _MODULE_BASES for base in node.bases)


def _dotted(node: ast.expr) -> str | None:
    """`torch.nn.Module` for the expression that says so."""
    if isinstance(node, ast.Attribute):
        left = _dotted(node.value)
        return f"{left}.{node.attr}" if left else None
    return node.id if isinstance(node, ast.Name) else None


def _forward(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "forward"), None)


def _flag(line: Iterable[ast.ClassDef], name: str, *, default: bool) -> bool:
    """The value that the nearest class assigns to a flag; `default` where none does, or not a plain True or False."""
    for node in line:
        for item in reversed(node.body):
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                value = getattr(item, "value", None)
                return value.value is True if isinstance(value, ast.Constant) else default
    return default


def _signature(arguments: ast.arguments) -> str:
    """The parameters with their defaults and without annotations, which each Python would print in its own way."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*([None] * missing), *arguments.defaults]
    parts = [_parameter(item, default) for item, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_parameter(item, value) for item, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"
