"""An op library whose calls a test sees, each with the op and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.sanitize import PROJECTS
from kernelprojects import load_compiled
from torch import Tensor

Arguments = tuple[Any, ...]
Op = Callable[..., Any]

DTYPES = (torch.bfloat16, torch.float32)
CASES = [(project, dtype) for project in PROJECTS for dtype in DTYPES[: 1 if project == "decoder" else 2]]


class Watched:
    """`watch(name, op, arguments)` calls the op in the caller's place and returns its results."""

    def __init__(self, ops: Any, watch: Callable[[str, Op, Arguments], Any]) -> None:
        self.ops, self.watch, self.called = ops, watch, set()

    def __getattr__(self, name: str) -> Op:
        op = getattr(self.ops, name)

        def call(*arguments: Any) -> Any:
            self.called.add(name)
            return self.watch(name, op, arguments)

        return call


def watch_all(
    project: str, dtype: torch.dtype, config: pytest.Config, watch: Callable[[str, Op, Arguments], Any]
) -> None:
    """Calls all ops of a project as compute-sanitizer has them called, which is on every path that a shape can take."""
    if project == "decoder" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    ops = Watched(load_compiled(project, config).compiled.ops, watch)
    PROJECTS[project](ops, dtype)
    assert ops.called


def tensors_of(results: Any) -> list[Tensor]:
    """The tensors of what an op was given or returns: one, some, or nothing."""
    return [x for x in ([results] if isinstance(results, Tensor) else results or ()) if isinstance(x, Tensor)]


def described(name: str, arguments: Arguments) -> str:
    """For messages: the op, and its arguments with shapes for tensors."""
    shown = (f"{tuple(x.shape)} by {x.stride()}" if isinstance(x, Tensor) else repr(x) for x in arguments)
    return f"{name}({', '.join(shown)})"
