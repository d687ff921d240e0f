"""Calls of compiled CUDA kernels that go around PyTorch's dispatcher: the op's results, on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch.profiler import profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 4096), (64, 4096), (4096,), (2, 3, 65), (1, 7), (5, 4097), (1, 14336), (3, 70001), (2048, 8192))


@pytest.fixture(scope="session")
def norm(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("norm", request.config)


@pytest.fixture(scope="session")
def activation(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("activation", request.config)


Call = Callable[..., Any]


def calls(
    norm: ModuleType, activation: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> list[tuple[Call, Call, list]]:
    """The direct call, the op's, and their tensors."""
    n, a = norm.compiled, activation.compiled
    torch.manual_seed(0)
    x, y, w, b = (torch.randn(s, device="cuda").to(dtype) for s in (shape, shape, shape[-1:], shape[-1:]))
    return [
        *((lambda *t, f=f: n.DIRECT.rms_norm(*t, 1e-6, f), lambda *t, f=f: n.ops.rms_norm(*t, 1e-6, f), [x, w]) for f in range(3)),
        (lambda *t: n.DIRECT.add_rms_norm(*t, 1e-6, 0), lambda *t: n.ops.add_rms_norm(*t, 1e-6, 0), [x, y, w]),
        (lambda *t: n.DIRECT.layer_norm(*t, 1e-5, None), lambda *t: n.ops.layer_norm(*t, 1e-5), [x, w, b]),
        (lambda *t: n.DIRECT.layer_norm(*t, None, None, 1e-5, None), lambda *t: n.ops.layer_norm(*t, None, None, 1e-5), [x]),
        (lambda *t: a.DIRECT.apply(*t, 2), lambda *t: a.ops.apply(*t, 2), [x]),
        (lambda *t: a.DIRECT.multiply(*t, 0), lambda *t: a.ops.multiply(*t, 0), [x, y]),
    ]  # fmt: skip


def same(got: Any, expected: Any) -> bool:
    if isinstance(got, Tensor):
        return torch.equal(got, expected) and got.stride() == expected.stride()
    return all(map(same, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_ops_results_bit_for_bit(norm: ModuleType, activation: ModuleType, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for direct, op, tensors in calls(norm, activation, shape, dtype):
            assert same(direct(*tensors), op(*tensors)), shape
            # An address that is no multiple of 16.
            moved = [torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view(x.shape).copy_(x) for x in tensors]
            assert same(direct(*moved), op(*moved)), shape


def test_runs_on_the_current_stream_and_is_captured_with_it(norm: ModuleType, activation: ModuleType) -> None:
    for direct, op, tensors in calls(norm, activation, (64, 4096), torch.bfloat16):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late = [x.clone() for x in tensors]  # on the current stream only after the sleep
            assert same(direct(*late), op(*tensors))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = direct(*tensors)
        tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        assert same(got, op(*tensors))


def test_takes_only_what_lies_on_one_gpu_and_nobody_watches(norm: ModuleType, activation: ModuleType) -> None:
    for direct, _, tensors in calls(norm, activation, (3, 96), torch.float32):
        for at in range(len(tensors)):
            assert direct(*tensors[:at], tensors[at].cpu(), *tensors[at + 1 :]) is None
            assert direct(*tensors[:at], torch._neg_view(tensors[at]), *tensors[at + 1 :]) is None
            assert direct(*tensors[:at], nn.Parameter(tensors[at]), *tensors[at + 1 :]) is None
        with profile():
            assert direct(*tensors) is None
        with torch.no_grad():
            assert direct(*map(nn.Parameter, tensors)) is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(norm: ModuleType, activation: ModuleType) -> None:
    for direct, op, tensors in calls(norm, activation, (64, 4096), torch.bfloat16):
        others = [x.to("cuda:1") for x in tensors]
        assert same(direct(*others), op(*others))
        if len(tensors) > 1:
            assert direct(tensors[0], *others[1:]) is None
