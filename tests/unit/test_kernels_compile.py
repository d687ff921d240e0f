"""The public functions of the kernels with compiled ops under `torch.compile` and `torch.export`, on a CPU and on a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from kernelfunctions import FUNCTIONS
from kernelprojects import load_compiled
from torch import nn
from torch._dynamo.testing import CompileCounter

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
        ],
    ),
]
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("name", FUNCTIONS)]


@pytest.fixture
def module(name: str, device: str, request: pytest.FixtureRequest) -> ModuleType:
    torch._dynamo.reset()
    return load_compiled(FUNCTIONS[name].project, request.config, device)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.detach().abs().max()))


@pytest.mark.parametrize("enabled", [True, False])
def test_is_one_graph_for_any_number_of_rows(module: ModuleType, name: str, device: str, enabled: bool) -> None:
    function, counter = FUNCTIONS[name].of(module), CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 9, 64):
        arguments = FUNCTIONS[name].arguments(rows, device)
        for leaf in arguments[: FUNCTIONS[name].leaves]:
            leaf.requires_grad_(enabled)
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_gradients_are_those_of_eager(module: ModuleType, name: str, device: str) -> None:
    of = FUNCTIONS[name]
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(of.of(module), fullgraph=True, backend=backend, dynamic=True)
    for rows in (50, 23):
        arguments = of.arguments(rows, device)
        close(of.step(module, compiled)(*arguments), of.step(module)(*arguments))


def test_exports_with_the_op_in_it(module: ModuleType, name: str, device: str) -> None:
    of = FUNCTIONS[name]
    function = of.of(module)

    class Model(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = tuple({} if dim is None else {dim: rows} for dim in of.rows)
    with torch.no_grad():
        program = torch.export.export(Model(), of.arguments(5, device), dynamic_shapes=(shapes,), strict=True)
        assert f"torch.ops.{module.compiled.ops.name}." in str(program.graph)
        for count in (9, 64):
            arguments = of.arguments(count, device)
            torch.testing.assert_close(program.module()(*arguments), function(*arguments), rtol=0, atol=0)
