"""The compiled ops: when they take a call, and their gradients.

Where a build has none (every noarch one), Triton's take their place on a GPU; where there is no Triton, or the case is not
theirs, PyTorch's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import direct, triton_here
from ._ops import add_op_namespace_prefix, ops
from .once import differentiable_once

__all__ = [
    "CAST_FIRST",
    "CAST_LAST",
    "CUDA",
    "DIRECT",
    "HERE",
    "SIGMOID",
    "SILU",
    "SILU_FIRST",
    "ZERO_CENTERED",
    "add_rms_norm",
    "first_derivatives_only",
    "layer_norm",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_gated",
    "takes",
    "takes_layer",
    "takes_too",
]

HERE = hasattr(ops, "rms_norm")
# A build has ops for the CPU or for CUDA.
CUDA = HERE and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("rms_norm"), "CUDA")
# Where there are any, functions around the dispatcher: each gives the op's result, or None where it does not take the call.
DIRECT = direct.functions() if HERE else None

# As in norm_cpu/rows.h and norm_cuda/launch.h.
CAST_FIRST, CAST_LAST, ZERO_CENTERED = 0, 1, 2
SILU, SIGMOID, SILU_FIRST = 1, 2, 3

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, nn.Parameter))
_transforms_active = torch._C._are_functorch_transforms_active
first_derivatives_only = differentiable_once(
    "the compiled ops of kernelhub/norm have no second derivative; where gradients of gradients are wanted "
    "(create_graph=True), run the model's own forward: kernelhub.unkernelize(model)"
)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the ops take x, (..., hidden), and a weight, (hidden,).

    Not while `torch.func` or forward-mode AD is at work, for which they have no rules: a tensor there says neither that
    it is batched nor that it is differentiated. Nor in a trace of `torch.jit`, which has no place for an `autograd.Function`
    and may be loaded elsewhere, nor for subclasses (DTensor and the like), which know their own ways.
    """
    if not HERE:
        return triton_here.takes(x, weight) and weight.dim() == 1 and x.dim() > 0 and x.shape[-1] == weight.shape[0]
    dtype = x.dtype
    return (
        dtype in _DTYPES
        and weight.dtype is dtype
        and (x.is_cuda and weight.is_cuda if CUDA else x.is_cpu and weight.is_cpu)
        and type(weight) in _PLAIN
        and type(x) in _PLAIN
        and weight.dim() == 1
        and not _transforms_active()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )


def takes_too(x: Tensor, other: Tensor | None) -> bool:
    """Whether a further operand is one that the ops take beside x: of x's dtype and shape."""
    if not HERE:
        return other is not None and other.shape == x.shape and triton_here.takes(x, other)
    return (
        other is not None
        and other.dtype is x.dtype
        and (other.is_cuda if CUDA else other.is_cpu)
        and type(other) in _PLAIN
        and other.shape == x.shape
    )


def takes_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] | None) -> bool:
    """As `takes`, for a layer norm over dimensions of that shape, with or without a weight and a bias.

    Without a shape it is over the weight's one dimension, which the op compares to the input's last.
    """
    if shape is None:
        if weight is None:
            return False
    elif len(shape) != 1 or x.dim() == 0 or x.size(-1) != shape[0]:
        return False
    if not HERE:
        return triton_here.takes(x, weight, bias) and all(
            row is None or row.shape == x.shape[-1:] for row in (weight, bias)
        )
    dtype = x.dtype
    return (  # each row written out: a function for both would cost as much again
        dtype in _DTYPES
        and (x.is_cuda if CUDA else x.is_cpu)
        and type(x) in _PLAIN
        and (
            weight is None
            or (
                weight.dtype is dtype
                and (weight.is_cuda if CUDA else weight.is_cpu)
                and type(weight) in _PLAIN
                and weight.dim() == 1
            )
        )
        and (
            bias is None
            or (
                bias.dtype is dtype
                and (bias.is_cuda if CUDA else bias.is_cpu)
                and type(bias) in _PLAIN
                and bias.dim() == 1
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
    _rms_norm = ops.rms_norm.default
    rms_norm_backward = ops.rms_norm_backward.default
    _add_rms_norm = ops.add_rms_norm.default
    _rms_norm_gated = ops.rms_norm_gated.default
    _rms_norm_gated_backward = ops.rms_norm_gated_backward.default
    _layer_norm = ops.layer_norm.default
    _layer_norm_backward = ops.layer_norm_backward.default
    _rms_norm_now = _direct(_rms_norm)
    _add_rms_norm_now = _direct(_add_rms_norm)
    _rms_norm_gated_now = _direct(_rms_norm_gated)
    _layer_norm_now = _direct(_layer_norm)
else:
    _rms_norm = _rms_norm_now = triton_here.op("rms_norm")
    rms_norm_backward = triton_here.op("rms_norm_backward")
    _add_rms_norm = _add_rms_norm_now = triton_here.op("add_rms_norm")
    _rms_norm_gated = _rms_norm_gated_now = triton_here.op("rms_norm_gated")
    _rms_norm_gated_backward = triton_here.op("rms_norm_gated_backward")
    _layer_norm = _layer_norm_now = triton_here.op("layer_norm")
    _layer_norm_backward = triton_here.op("layer_norm_backward")


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


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    """x: (..., hidden), weight: (hidden,) -> (..., hidden)."""
    # The op by itself has no gradient. It is called where none can be asked for, because it costs half as much.
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        apply = _RmsNorm.apply if is_dynamo_compiling() else _rms_norm_plainly
        return apply(x, weight, eps, form)
    return _rms_norm(x, weight, eps, form) if is_dynamo_compiling() else _rms_norm_now(x, weight, eps, form)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """x, residual: (..., hidden), weight: (hidden,) -> the norm of their sum, and the sum: (..., hidden) each."""
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        apply = _AddRmsNorm.apply if is_dynamo_compiling() else _add_rms_norm_plainly
        return apply(x, residual, weight, eps, form)
    return (
        _add_rms_norm(x, residual, weight, eps, form)
        if is_dynamo_compiling()
        else _add_rms_norm_now(x, residual, weight, eps, form)
    )


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, form: int, kind: int) -> Tensor:
    """x, gate: (..., hidden), weight: (hidden,) -> (..., hidden)."""
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad):
        apply = _RmsNormGated.apply if is_dynamo_compiling() else _rms_norm_gated_plainly
        return apply(x, gate, weight, eps, form, kind)
    return (
        _rms_norm_gated(x, gate, weight, eps, form, kind)
        if is_dynamo_compiling()
        else _rms_norm_gated_now(x, gate, weight, eps, form, kind)
    )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x: (..., hidden), weight, bias: (hidden,) or None -> (..., hidden)."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        apply = _LayerNorm.apply if is_dynamo_compiling() else _layer_norm_plainly
        return apply(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps) if is_dynamo_compiling() else _layer_norm_now(x, weight, bias, eps)


_rms_norm_inside = _inside("rms_norm", _rms_norm)
_add_rms_norm_inside = _inside("add_rms_norm", _add_rms_norm)
_layer_norm_inside = _inside("layer_norm", _layer_norm)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = eps, form
        return _rms_norm_inside(x, weight, eps, form)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        x_grad, weight_grad = rms_norm_backward(grad, None, x, weight, *ctx.options, needs_weight)
        return x_grad, weight_grad if needs_weight else None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
        y, total = _add_rms_norm_inside(x, residual, weight, eps, form)
        ctx.save_for_backward(total, weight)
        ctx.options = eps, form
        return y, total

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor, total_grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[2]
        x_grad, weight_grad = rms_norm_backward(grad, total_grad, total, weight, *ctx.options, needs_weight)
        return x_grad, x_grad, weight_grad if needs_weight else None, None, None


class _RmsNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, form: int, kind: int) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.options = eps, kind
        return _rms_norm_gated(x, gate, weight, eps, form, kind)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_rms_norm_gated_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _layer_norm_inside(x, weight, bias, eps)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_grad, weight_grad, bias_grad = _layer_norm_backward(grad, x, weight, ctx.eps, needs_weight, needs_bias)
        return x_grad, weight_grad if needs_weight else None, bias_grad if needs_bias else None, None


def _plainly(function: Any) -> Callable[..., Any]:
    """`function.apply` without what it does for `torch.func`, which the ops are not called under: 3 of 14 us on a GPU's host.

    Not for Dynamo, which knows `apply`.
    """
    return super(torch.autograd.Function, function).apply


_rms_norm_plainly = _plainly(_RmsNorm)
_add_rms_norm_plainly = _plainly(_AddRmsNorm)
_rms_norm_gated_plainly = _plainly(_RmsNormGated)
_layer_norm_plainly = _plainly(_LayerNorm)


def _register_shapes() -> None:
    """What the ops return, for `torch.compile` and export: contiguous tensors, as the C++ makes them."""

    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    def row(x: Tensor, wanted: bool) -> Tensor:
        return x.new_empty((x.shape[-1] if wanted else 0,))

    def register(name: str) -> Any:
        return torch.library.register_fake(add_op_namespace_prefix(name))

    @register("rms_norm")
    def _(x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("rms_norm_backward")
    def _(
        _grad: Tensor, _sum_grad: Tensor | None, x: Tensor, _weight: Tensor, _eps: float, _form: int, needs_weight: bool
    ) -> tuple[Tensor, Tensor]:
        return like(x), row(x, needs_weight)

    @register("add_rms_norm")
    def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return like(x), like(x)

    @register("rms_norm_gated")
    def _(x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("rms_norm_gated_backward")
    def _(_grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return like(x), like(x), row(x, True)

    @register("layer_norm")
    def _(x: Tensor, *_: Any) -> Tensor:
        return like(x)

    @register("layer_norm_backward")
    def _(
        _grad: Tensor, x: Tensor, _weight: Tensor | None, _eps: float, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return like(x), row(x, needs_weight), row(x, needs_bias)


if HERE:
    _register_shapes()
