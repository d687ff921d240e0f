"""The activations as Triton kernels: BLOCK_R rows of BLOCK_N columns to a program, each element read and written once."""

# ruff: noqa: SIM300  (what is decided when a kernel is compiled is written as Triton reads it)

from __future__ import annotations

import triton
import triton.language as tl

# As in compiled.py.
_SILU, _GELU, _GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _exp(x, T: tl.constexpr):
    """e**x. The GPU's own 2**x is good for 16 bits; in float32 the rounding of x * log2(e) would show for a large x."""
    if T == tl.float32:
        x = tl.where(x < -104.0, -104.0, x)
        x = tl.where(x > 89.0, 89.0, x)
        whole = tl.floor(x * 1.4426950408889634)
        part = tl.fma(x, tl.full(x.shape, 1.44269502162933349609375, tl.float32), -whole) + x * 1.925963033500e-8
        return tl.exp2(part) * tl.exp2(whole)
    else:
        return tl.exp(x)


@triton.jit
def _over(a, b, T: tl.constexpr):
    if T == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _rounded(x, T: tl.constexpr):
    return x.to(T).to(tl.float32)


@triton.jit
def _doubled_argument(x):
    """tanh's argument u in the approximation of GELU, doubled: x / 2 * (1 + tanh(u)) is x * sigmoid(2 * u), which does
    not cancel where tanh(u) is close to -1."""
    return 1.5957691216057308 * (0.044715 * x * x * x + x)


@triton.jit
def _value(x, FUNCTION: tl.constexpr, T: tl.constexpr):
    """f(x), rounded in between where models' own code rounds, which only that of the quick GELU does."""
    if FUNCTION == _SILU:
        return _over(x, 1.0 + _exp(-x, T), T)
    elif FUNCTION == _GELU:
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == _GELU_TANH:
        return _over(x, 1.0 + _exp(-_doubled_argument(x), T), T)
    else:
        ones = tl.full(x.shape, 1.0, tl.float32)
        return x * _rounded(_over(ones, 1.0 + _exp(-_rounded(x * 1.702, T), T), T), T)


@triton.jit
def _slope(x, FUNCTION: tl.constexpr, T: tl.constexpr):
    if FUNCTION == _GELU:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * (0.3989422804014327 * _exp(-0.5 * x * x, T)) + below
    else:
        # x * sigmoid(z): sigmoid and its derivative are made of e**-|z|, which does not overflow.
        z = x
        inner = tl.full(x.shape, 1.0, tl.float32)
        if FUNCTION == _GELU_TANH:
            z = _doubled_argument(x)
            inner = 1.5957691216057308 * (0.134145 * x * x + 1.0)
        elif FUNCTION != _SILU:
            z = x * 1.702
            inner = inner * 1.702
        e = _exp(-tl.abs(z), T)
        part = _over(tl.full(x.shape, 1.0, tl.float32), 1.0 + e, T)
        return x * (e * part * part) * inner + tl.where(z < 0.0, e * part, part)  # zero times what is finite


@triton.jit
def _places(rows, n, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's rows and columns, and which of them there are."""
    across = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    row = (program // across) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, column, (row < rows) & (column < n)


@triton.jit(do_not_specialize=["rows"])
def forward(
    a_ptr, b_ptr, y_ptr, rows, n, a_stride, b_stride,
    FUNCTION: tl.constexpr, TIMES: tl.constexpr, HALVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = f(a), or, with TIMES, f(a) * b; with HALVES, b lies behind a in each row."""
    if HALVES:
        b_ptr = a_ptr + n
    T: tl.constexpr = y_ptr.dtype.element_ty
    row, column, inside = _places(rows, n, BLOCK_R, BLOCK_N)
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = _value(a, FUNCTION, T)
    if TIMES:
        b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
        y = _rounded(y, T) * b
    tl.store(y_ptr + row * n + column, y.to(T), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad_ptr, a_ptr, b_ptr, a_grad_ptr, b_grad_ptr, y_ptr, rows, n, grad_stride, a_stride, b_stride, to_stride,
    FUNCTION: tl.constexpr, TIMES: tl.constexpr, HALVES: tl.constexpr, RESULT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of a and b, one behind the other with HALVES; with RESULT, f(a) * b again, too."""
    if HALVES:
        b_ptr = a_ptr + n
        b_grad_ptr = a_grad_ptr + n
    T: tl.constexpr = a_grad_ptr.dtype.element_ty
    row, column, inside = _places(rows, n, BLOCK_R, BLOCK_N)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    to = row * to_stride + column
    if TIMES:
        b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
        f = _rounded(_value(a, FUNCTION, T), T)
        tl.store(b_grad_ptr + to, (grad * f).to(T), mask=inside)
        if RESULT:
            tl.store(y_ptr + row * n + column, (f * b).to(T), mask=inside)
        grad = grad * b
    tl.store(a_grad_ptr + to, (grad * _slope(a, FUNCTION, T)).to(T), mask=inside)
