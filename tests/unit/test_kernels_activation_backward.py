"""The gradients of kernelhub/activation's products with their results again, for backwards of layers that keep no result."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from kernelprojects import load_compiled, load_noarch
from torch import Tensor

NAMES = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}


@pytest.fixture(scope="session")
def pytorch() -> ModuleType:
    return load_noarch("activation", "_activation_backward")


@pytest.fixture(params=["pytorch", *LEVELS])
def activation(request: pytest.FixtureRequest, pytorch: ModuleType) -> Iterator[ModuleType]:
    """Without compiled ops, and with them on each level of instructions."""
    if request.param == "pytorch":
        yield pytorch
        return
    module, wanted = load_compiled("activation", request.config, "cpu"), LEVELS[request.param]
    try:
        if module.compiled.ops.use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield module
    finally:
        module.compiled.ops.use_level(2)


def values(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def alike(activation: ModuleType, got: Tensor, expected: Tensor) -> bool:
    """Bit for bit where an op computes both; PyTorch's own code has another erf in its tails and where rows lie apart."""
    if activation.compiled.HERE and got.dtype != torch.float64:
        return torch.equal(got, expected)
    eps = torch.finfo(got.dtype).eps
    return torch.allclose(got, expected, rtol=4 * eps, atol=64 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_gradients_and_the_result(activation: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Of two operands and of two halves; a tail, strides, and no elements."""
    forward, backward = getattr(activation, name), getattr(activation.functions, f"{name}_backward")
    for shape, step in (((7, 1001), 1), ((6, 64), 2), ((3, 0), 1)):
        whole = [values(dtype, *shape, seed=seed)[::step] for seed in range(3)]
        a, b = (x.clone().requires_grad_() for x in whole[:2])
        y = forward(a, b)
        expected = torch.autograd.grad(y, (a, b), whole[2])
        for result in (True, False):
            found = backward(whole[2], *whole[:2], result=result)
            assert [alike(activation, *pair) for pair in zip(found, expected, strict=False)] == [True, True]
            assert alike(activation, found[2], y) if result else found[2] is None
            assert all(one is None or (one.is_contiguous() and not one.requires_grad) for one in found)
        x = torch.cat(whole[:2], -1)[::1].requires_grad_()
        wide = torch.stack([x, x], 1).detach()[:, 0]  # rows that lie apart
        for one in (x.detach(), wide):
            x_grad, nothing, again = backward(whole[2], one, result=True)
            assert alike(activation, x_grad, torch.autograd.grad(forward(x), x, whole[2])[0])
            assert nothing is None
            assert alike(activation, again, y)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_traced(activation: ModuleType, name: str) -> None:
    backward = getattr(activation.functions, f"{name}_backward")
    operands = [values(torch.float32, 5, 32, seed=seed) for seed in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(backward, fullgraph=True, backend="aot_eager")
    found = compiled(*operands, result=True)
    assert [torch.equal(*pair) for pair in zip(found, backward(*operands, result=True), strict=True)] == [True] * 3


def test_operands_that_do_not_fit_are_errors(activation: ModuleType) -> None:
    x, grad = values(torch.float32, 5, 32, seed=0), values(torch.float32, 5, 16, seed=1)
    backward = activation.functions.silu_and_mul_backward
    with pytest.raises((RuntimeError, ValueError), match=r"expected an even last dimension"):
        backward(grad, x[:, :31], result=True)
    stacked, turned = x.view(5, 2, 16), grad.view(5, 2, 8).transpose(0, 1)
    with pytest.raises(RuntimeError, match="must match"):
        backward(turned, stacked, result=True)
    if activation.compiled.HERE:
        ops = activation.compiled.ops
        with pytest.raises(RuntimeError, match="halves_backward_result: the gradient is not one of the result"):
            ops.halves_backward_result(x, x, 0)
        with pytest.raises(RuntimeError, match="halves_backward_result: the gradient is not one of the result"):
            ops.halves_backward_result(turned, stacked, 0)
        with pytest.raises(RuntimeError, match="multiply_backward_result: the gradient has another shape"):
            ops.multiply_backward_result(grad, x, x, 0)
        with pytest.raises(RuntimeError, match="expected 0 to 3"):
            ops.multiply_backward_result(x, x, x, 4)
