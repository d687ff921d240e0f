"""The ops of `compiled.py` as Triton kernels, registered when this module is imported, which needs Triton.

Nothing is tuned: 1024 elements to a program, whatever the shape.
"""

# Without postponed annotations: PyTorch reads the ops' schemas from them.
# ruff: noqa: ARG005  (what the ops are given and what decides on the shapes is not the same)

from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from ._ops import add_op_namespace_prefix, ops
from .triton_here import launch, register

__all__ = ["probe"]

_TOGETHER = 1024


def _new(x: Tensor, columns: Any = None) -> Tensor:
    shape = x.shape if columns is None else (*x.shape[:-1], columns)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _rows(x: Tensor) -> tuple[Tensor, Any]:
    """x as rows whose elements lie side by side, and the elements from one row to the next; a copy where there is no other way."""
    n = x.shape[-1]
    if x.is_contiguous():
        return x, n
    flat = x.reshape(-1, n)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _operands(*tensors: Tensor) -> tuple[Any, Any, list[tuple[Tensor, Any]]]:
    """Rows, columns, and each operand with its stride; where all are contiguous, one row of all elements."""
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return 1, first.numel(), [(x, 0) for x in tensors]
    n = first.shape[-1]  # what is not contiguous has a dimension
    return first.numel() // n, n, [_rows(x) for x in tensors]


def _start(kernel: Any, rows: Any, n: Any, x: Tensor, *arguments: Any, **options: Any) -> None:
    # One row is of any length; the columns of several are those of a layer, the same from call to call.
    block = _TOGETHER if isinstance(rows, int) and rows == 1 else min(1 << (int(n) - 1).bit_length(), _TOGETHER)
    tall = _TOGETHER // block
    programs = ((rows + tall - 1) // tall) * ((n + block - 1) // block)
    launch(kernel, programs, x, *arguments, BLOCK_R=tall, BLOCK_N=block, num_warps=4, **options)


def apply(x: Tensor, function: int) -> Tensor:
    y = _new(x)
    if x.numel() > 0:
        rows, n, [(a, stride)] = _operands(x)
        _start(
            kernels.forward, rows, n, x, a, a, y, rows, n, stride, stride, FUNCTION=function, TIMES=False, HALVES=False
        )
    return y


def apply_backward(grad: Tensor, x: Tensor, function: int) -> Tensor:
    x_grad = _new(x)
    if x.numel() > 0:
        rows, n, [(g, g_stride), (a, stride)] = _operands(grad, x)
        _start(
            kernels.backward, rows, n, x, g, a, a, x_grad, a, a, rows, n, g_stride, stride, stride, n,
            FUNCTION=function, TIMES=False, HALVES=False, RESULT=False,
        )  # fmt: skip
    return x_grad


def multiply(a: Tensor, b: Tensor, function: int) -> Tensor:
    y = _new(a)
    if a.numel() > 0:
        rows, n, [(first, stride), (second, other)] = _operands(a, b)
        _start(
            kernels.forward,
            rows,
            n,
            a,
            first,
            second,
            y,
            rows,
            n,
            stride,
            other,
            FUNCTION=function,
            TIMES=True,
            HALVES=False,
        )
    return y


def multiply_backward(grad: Tensor, a: Tensor, b: Tensor, function: int) -> tuple[Tensor, Tensor]:
    a_grad, b_grad = _new(a), _new(a)
    _gradients(grad, a, b, function, a_grad, b_grad, None)
    return a_grad, b_grad


def multiply_backward_result(grad: Tensor, a: Tensor, b: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
    a_grad, b_grad, y = _new(a), _new(a), _new(a)
    _gradients(grad, a, b, function, a_grad, b_grad, y)
    return a_grad, b_grad, y


def _gradients(
    grad: Tensor, a: Tensor, b: Tensor, function: int, a_grad: Tensor, b_grad: Tensor, y: Tensor | None
) -> None:
    if a.numel() > 0:
        rows, n, [(g, g_stride), (first, stride), (second, other)] = _operands(grad, a, b)
        again = first if y is None else y
        _start(
            kernels.backward, rows, n, a, g, first, second, a_grad, b_grad, again, rows, n, g_stride, stride, other, n,
            FUNCTION=function, TIMES=True, HALVES=False, RESULT=y is not None,
        )  # fmt: skip


def halves(x: Tensor, function: int) -> Tensor:
    n = x.shape[-1] // 2
    y = _new(x, n)
    if x.numel() > 0:
        flat, stride = _rows(x)
        flat = flat.view(-1, 2 * n)
        rows = flat.shape[0]
        _start(
            kernels.forward, rows, n, x, flat, flat, y, rows, n, stride, stride, FUNCTION=function, TIMES=True, HALVES=True
        )  # fmt: skip
    return y


def halves_backward(grad: Tensor, x: Tensor, function: int) -> Tensor:
    x_grad = _new(x)
    _halves_gradient(grad, x, function, x_grad, None)
    return x_grad


def halves_backward_result(grad: Tensor, x: Tensor, function: int) -> tuple[Tensor, Tensor]:
    x_grad, y = _new(x), _new(x, x.shape[-1] // 2)
    _halves_gradient(grad, x, function, x_grad, y)
    return x_grad, y


def _halves_gradient(grad: Tensor, x: Tensor, function: int, x_grad: Tensor, y: Tensor | None) -> None:
    if x.numel() > 0:
        n = x.shape[-1] // 2
        flat, stride = _rows(x)
        flat = flat.view(-1, 2 * n)
        rows = flat.shape[0]
        g, g_stride = _rows(grad)
        to = x_grad.view(-1, 2 * n)
        _start(
            kernels.backward, rows, n, x, g, flat, flat, to, flat, flat if y is None else y, rows, n,
            g_stride, stride, stride, 2 * n, FUNCTION=function, TIMES=True, HALVES=True, RESULT=y is not None,
        )  # fmt: skip


def probe(device: torch.device) -> None:
    """Compile and run the smallest activation."""
    apply(torch.ones(16, dtype=torch.bfloat16, device=device), 0)
    torch.get_device_module(device).synchronize(device)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# What the ops return, for `torch.compile` and export: contiguous tensors.
_SHAPES = {
    apply: lambda x, function: _like(x),
    apply_backward: lambda grad, x, function: _like(x),
    multiply: lambda a, b, function: _like(a),
    multiply_backward: lambda grad, a, b, function: (_like(a), _like(a)),
    multiply_backward_result: lambda grad, a, b, function: (_like(a), _like(a), _like(a)),
    halves: lambda x, function: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    halves_backward: lambda grad, x, function: _like(x),
    halves_backward_result: lambda grad, x, function: (_like(x), x.new_empty((*x.shape[:-1], x.shape[-1] // 2))),
}

for _function, _shapes in _SHAPES.items():
    _name = f"triton_{_function.__name__}"
    if not hasattr(ops, _name):  # it is there where this build was imported before, from another place
        torch.library.triton_op(add_op_namespace_prefix(_name), _function, mutates_args=()).register_fake(_shapes)
    register(_function.__name__, getattr(ops, _name).default, _function)
