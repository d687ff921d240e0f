"""The order in which the kernels' results lie in memory, beside PyTorch's own elementwise operations."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from hypothesis import given
from hypothesis import strategies as st
from kernelprojects import ROOT
from torch import Tensor


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("order", ROOT / "norm" / "torch-ext" / "norm" / "order.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


order = load()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of up to five dimensions, in any order, cut, with steps between elements, and expanded."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    x = torch.arange(float(torch.tensor(sizes).prod())).view(sizes).permute(draw(st.permutations(range(len(sizes)))))
    for dim, size in enumerate(x.shape):
        change = draw(st.sampled_from(["none", "none", "cut", "step", "expand"]))
        if change == "cut":
            x = x.narrow(dim, 0, max(1, size - 1))
        elif change == "step":
            x = x[(slice(None),) * dim + (slice(None, None, 2),)]
        elif change == "expand":
            x = x.narrow(dim, 0, 1).expand([3 if other == dim else -1 for other in range(x.dim())])
    return x


def steps(x: Tensor) -> list[int]:
    """The strides of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@given(tensors(), st.booleans())
def test_results_lie_as_pytorchs(x: Tensor, by_rows: bool) -> None:
    def compute(y: Tensor) -> Tensor:
        return y.clone(memory_format=torch.contiguous_format)

    found = order.other_order(x)
    got = compute(x) if found is None else order.in_order(found, by_rows, compute, x)
    assert torch.equal(got, x)
    assert steps(got) == steps(torch.sin(x))


@given(tensors())
def test_what_lies_as_it_is_counted_is_let_be(x: Tensor) -> None:
    assert order.other_order(x.contiguous()) is None
