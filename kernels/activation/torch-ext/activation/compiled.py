"""The compiled ops: when they take a call, and their gradients.

Where a build has none (every noarch one), Triton's take their place on a GPU; where there is no Triton, or the case is not
theirs, PyTorch's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import direct, triton_here
from ._ops import add_op_namespace_prefix, ops
from .once import differentiable_once
from .order import in_order, other_order

__all__ = [
    "DIRECT",
    "GELU",
    "GELU_QUICK",
    "GELU_TANH",
    "HERE",
    "SILU",
    "apply",
    "halves",
    "halves_backward",
    "multiply",
    "multiply_backward",
    "takes",
]

HERE = hasattr(ops, "apply")
# A build has ops for the CPU or for CUDA.
_CUDA = HERE and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("apply"), "CUDA")
# Where there are any, functions around the dispatcher: each gives the op's result, or None where it does not take the call.
DIRECT = direct.functions() if HERE else None

# As in activation_cpu/elements.h and activation_cuda/launch.h.
SILU, GELU, GELU_TANH, GELU_QUICK = range(4)

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, nn.Parameter))
_transforms_active = torch._C._are_functorch_transforms_active
_first_derivatives_only = differentiable_once(
    "the compiled ops of kernelhub/activation have no second derivative; where gradients of gradients are wanted "
    "(create_graph=True), run the model's own forward: kernelhub.unkernelize(model)"
)


def takes(x: Tensor, other: Tensor | None = None) -> bool:
    """Whether the ops take x, and another operand of its shape.

    Not while `torch.func` or forward-mode AD is at work, for which they have no rules: a tensor there says neither that
    it is batched nor that it is differentiated. Nor in a trace of `torch.jit`, which has no place for an `autograd.Function`
    and may be loaded elsewhere, nor for subclasses (DTensor and the like), which know their own ways.
    """
    if not HERE:
        return (other is None or other.shape == x.shape) and triton_here.takes(x, other)
    dtype = x.dtype
    return (
        dtype in _DTYPES
        and (x.is_cuda if _CUDA else x.is_cpu)
        and type(x) in _PLAIN
        and (
            other is None
            or (
                other.dtype is dtype
                and (other.is_cuda if _CUDA else other.is_cpu)
                and type(other) in _PLAIN
                and other.shape == x.shape
            )
        )
        and not _transforms_active()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )


def _direct(overload: Any) -> Any:
    """The C++ function under an op, without the Python frame around it: 0.3 of 2.5 us. Dynamo traces the op itself."""
    return getattr(overload, "_op", overload)


if HERE:
    _apply = ops.apply.default
    _apply_backward = ops.apply_backward.default
    _multiply = ops.multiply.default
    _multiply_backward = ops.multiply_backward.default
    _multiply_backward_result = ops.multiply_backward_result.default
    _halves = ops.halves.default
    _halves_backward = ops.halves_backward.default
    _halves_backward_result = ops.halves_backward_result.default
    _apply_now = _direct(_apply)
    _multiply_now = _direct(_multiply)
    _halves_now = _direct(_halves)
else:
    _apply = _apply_now = triton_here.op("apply")
    _apply_backward = triton_here.op("apply_backward")
    _multiply = _multiply_now = triton_here.op("multiply")
    _multiply_backward = triton_here.op("multiply_backward")
    _halves = _halves_now = triton_here.op("halves")
    _halves_backward = triton_here.op("halves_backward")
    _multiply_backward_result = triton_here.op("multiply_backward_result")
    _halves_backward_result = triton_here.op("halves_backward_result")


def _inside(name: str, op: Any) -> Callable[..., Any]:
    """An op as the forward of an autograd function calls it: directly, where that is possible."""
    short = getattr(DIRECT, name, None)
    if short is None:
        return op

    def call(*arguments: Any) -> Any:
        if not is_dynamo_compiling() and (found := short(*arguments)) is not None:
            return found
        return op(*arguments)

    return call


def apply(x: Tensor, function: int) -> Tensor:
    """f(x), of x's shape."""
    if (order := other_order(x)) is not None:
        found: Tensor = in_order(order, False, lambda x: apply(x, function), x)
        return found
    # The op by itself has no gradient. It is called where none can be asked for, because it costs half as much.
    if torch.is_grad_enabled() and x.requires_grad:
        run = _Apply.apply if is_dynamo_compiling() else _apply_plainly
        return run(x, function)
    return _apply(x, function) if is_dynamo_compiling() else _apply_now(x, function)


def multiply(a: Tensor, b: Tensor, function: int) -> Tensor:
    """f(a) * b, of a's shape."""
    if (order := other_order(a)) is not None:
        found: Tensor = in_order(order, False, lambda a, b: multiply(a, b, function), a, b)
        return found
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        apply = _Multiply.apply if is_dynamo_compiling() else _multiply_plainly
        return apply(a, b, function)
    return _multiply(a, b, function) if is_dynamo_compiling() else _multiply_now(a, b, function)


def halves(x: Tensor, function: int) -> Tensor:
    """f(a) * b for the halves a and b of the last dimension: (..., 2 * hidden) -> (..., hidden)."""
    if (order := other_order(x)) is not None:
        found: Tensor = in_order(order, True, lambda x: halves(x, function), x)
        return found
    if torch.is_grad_enabled() and x.requires_grad:
        apply = _Halves.apply if is_dynamo_compiling() else _halves_plainly
        return apply(x, function)
    return _halves(x, function) if is_dynamo_compiling() else _halves_now(x, function)


def multiply_backward(
    grad: Tensor, a: Tensor, b: Tensor, function: int, result: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of f(a) * b by a and b, and with `result` f(a) * b again. None of the three has a gradient."""
    if result:
        return _multiply_backward_result(grad, a, b, function)
    return (*_multiply_backward(grad, a, b, function), None)


def halves_backward(grad: Tensor, x: Tensor, function: int, result: bool) -> tuple[Tensor, Tensor | None]:
    """As `multiply_backward`, for the halves of x: the gradient by x, and the result."""
    if result:
        return _halves_backward_result(grad, x, function)
    return _halves_backward(grad, x, function), None


_apply_inside = _inside("apply", _apply)
_multiply_inside = _inside("multiply", _multiply)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return _apply_inside(x, function)

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply_backward(grad, *ctx.saved_tensors, ctx.function), None


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, function: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.function = function
        return _multiply_inside(a, b, function)

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_multiply_backward(grad, *ctx.saved_tensors, ctx.function), None)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return _halves(x, function)

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _halves_backward(grad, *ctx.saved_tensors, ctx.function), None


def _plainly(function: Any) -> Callable[..., Any]:
    """`function.apply` without what it does for `torch.func`, which the ops are not called under: 3 of 14 us on a GPU's host.

    Not for Dynamo, which knows `apply`.
    """
    return super(torch.autograd.Function, function).apply


_apply_plainly = _plainly(_Apply)
_multiply_plainly = _plainly(_Multiply)
_halves_plainly = _plainly(_Halves)


def _register_shapes() -> None:
    """What the ops return, for `torch.compile` and export: contiguous tensors, as the C++ makes them."""

    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    def register(name: str) -> Any:
        return torch.library.register_fake(add_op_namespace_prefix(name))

    @register("apply")
    def _(x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("apply_backward")
    def _(_grad: Tensor, x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("multiply")
    def _(a: Tensor, *_: Any) -> Tensor:
        return like(a)

    @register("multiply_backward")
    def _(_grad: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return like(a), like(a)

    @register("multiply_backward_result")
    def _(_grad: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return like(a), like(a), like(a)

    @register("halves")
    def _(x: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @register("halves_backward")
    def _(_grad: Tensor, x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("halves_backward_result")
    def _(_grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return like(x), x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


if HERE:
    _register_shapes()
