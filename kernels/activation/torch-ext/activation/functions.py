"""Activations: one pass over memory where the usual formulas take several.

Every function takes any shape, any strides, and float16, bfloat16, float32 or float64, and returns the input's dtype
(`gelu_new` and `relu_squared` what autocast makes of powers).
What the compiled ops take, where the build has any, they compute; their gradients have none of their own. All else is
plain PyTorch, as are its gradients, vmap and forward-mode AD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import compiled
from .compiled import DIRECT, takes

__all__ = [
    "gelu",
    "gelu_and_mul",
    "gelu_and_mul_backward",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_backward",
    "mish",
    "relu_squared",
    "silu",
    "silu_and_mul",
    "silu_and_mul_backward",
    "tanh",
]

_NARROW = (torch.float16, torch.bfloat16)


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return F.silu(x)


def mish(x: Tensor) -> Tensor:
    """`x * tanh(softplus(x))`."""
    return F.mish(x)


def tanh(x: Tensor) -> Tensor:
    """`tanh(x)`."""
    return torch.tanh(x)


def relu_squared(x: Tensor) -> Tensor:
    """`max(x, 0)**2`; where autocast widens powers, in float32."""
    y = F.relu(x)
    return y.square() if _recorded() or _widens_powers(x) else y.pow_(2)


def gelu(x: Tensor) -> Tensor:
    """`x * Phi(x)`, with the normal distribution's exact Phi."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`."""
    if not is_dynamo_compiling() and DIRECT is not None and (y := DIRECT.apply(x, compiled.GELU_TANH)) is not None:
        return y
    if takes(x):
        return compiled.apply(x, compiled.GELU_TANH)
    return F.gelu(x, approximate="tanh")


def gelu_new(x: Tensor) -> Tensor:
    """The formula of `gelu_tanh`, which models write out in seven passes; here one, rounded once.

    They take a power, so that where autocast widens those the result has float32.
    """
    return gelu_tanh(x.float() if _widens_powers(x) else x)


def gelu_fast(x: Tensor) -> Tensor:
    """`gelu_tanh` with sqrt(2 / pi) cut after ten digits, which only float64 can tell from the whole number."""
    if x.dtype != torch.float64:
        return gelu_tanh(x)
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_quick(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 * x)`."""
    if not is_dynamo_compiling() and DIRECT is not None and (y := DIRECT.apply(x, compiled.GELU_QUICK)) is not None:
        return y
    if takes(x):
        return compiled.apply(x, compiled.GELU_QUICK)
    # By the mode: a tensor that vmap batches inside a gradient says of itself that it requires none.
    if _recorded() or torch.compiler.is_compiling():
        return x * torch.sigmoid(1.702 * x)
    return (x * 1.702).sigmoid_().mul_(x)


def silu_and_mul(x: Tensor, other: Tensor | None = None) -> Tensor:
    """`silu(a) * b` for the halves a and b of the last dimension: (..., 2 * hidden) -> (..., hidden).

    With `other`, of x's shape: `silu(x) * other`.
    """
    if other is None:
        if _takes_halves(x):
            return compiled.halves(x, compiled.SILU)
    elif (
        not is_dynamo_compiling() and DIRECT is not None and (y := DIRECT.multiply(x, other, compiled.SILU)) is not None
    ):
        return y
    elif takes(x, other):
        return compiled.multiply(x, other, compiled.SILU)
    gate, up = _pair("silu_and_mul", x, other)
    return _times(F.silu(gate), up)


def gelu_and_mul(x: Tensor, other: Tensor | None = None) -> Tensor:
    """`gelu(a) * b` for the halves a and b of the last dimension: (..., 2 * hidden) -> (..., hidden).

    With `other`, of x's shape: `gelu(x) * other`.
    """
    if other is None:
        if _takes_halves(x):
            return compiled.halves(x, compiled.GELU)
    elif (
        not is_dynamo_compiling() and DIRECT is not None and (y := DIRECT.multiply(x, other, compiled.GELU)) is not None
    ):
        return y
    elif takes(x, other):
        return compiled.multiply(x, other, compiled.GELU)
    gate, up = _pair("gelu_and_mul", x, other)
    return _times(F.gelu(gate), up)


def gelu_tanh_and_mul(x: Tensor, other: Tensor | None = None) -> Tensor:
    """`gelu_tanh(a) * b` for the halves a and b of the last dimension: (..., 2 * hidden) -> (..., hidden).

    With `other`, of x's shape: `gelu_tanh(x) * other`.
    """
    if other is None:
        if _takes_halves(x):
            return compiled.halves(x, compiled.GELU_TANH)
    elif (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.multiply(x, other, compiled.GELU_TANH)) is not None
    ):
        return y
    elif takes(x, other):
        return compiled.multiply(x, other, compiled.GELU_TANH)
    gate, up = _pair("gelu_tanh_and_mul", x, other)
    return _times(F.gelu(gate, approximate="tanh"), up)


Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def silu_and_mul_backward(grad: Tensor, x: Tensor, other: Tensor | None = None, *, result: bool = False) -> Gradients:
    """The gradients of `silu_and_mul(x, other)` by x and by other, where there is one; with `result`, the result again.

    For backwards of layers that did not keep the result: all of it is one pass where the ops compute it. It has no gradient.
    """
    return _backward(compiled.SILU, F.silu, torch.ops.aten.silu_backward, grad, x, other, result)


def gelu_and_mul_backward(grad: Tensor, x: Tensor, other: Tensor | None = None, *, result: bool = False) -> Gradients:
    """As `silu_and_mul_backward`, of `gelu_and_mul`."""
    return _backward(compiled.GELU, F.gelu, torch.ops.aten.gelu_backward, grad, x, other, result)


def gelu_tanh_and_mul_backward(
    grad: Tensor, x: Tensor, other: Tensor | None = None, *, result: bool = False
) -> Gradients:
    """As `silu_and_mul_backward`, of `gelu_tanh_and_mul`."""
    return _backward(compiled.GELU_TANH, _gelu_tanh, _gelu_tanh_backward, grad, x, other, result)


def _widens_powers(x: Tensor) -> bool:
    """Whether autocast makes the powers of x float32: of 16 bits, everywhere but on a CPU."""
    if x.is_cpu or x.dtype not in _NARROW or x.is_meta:  # there is no autocast for meta tensors
        return False
    return torch.is_autocast_enabled(x.device.type)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _backward(
    number: int,
    function: Callable[[Tensor], Tensor],
    function_backward: Callable[[Tensor, Tensor], Tensor],
    grad: Tensor,
    x: Tensor,
    other: Tensor | None,
    result: bool,
) -> Gradients:
    if other is None:
        if _takes_halves(x) and takes(grad) and _is_of_their_product(grad, x):
            x_grad, y = compiled.halves_backward(grad, x, number, result)
            return x_grad, None, y
    elif takes(x, other) and takes(x, grad):
        return compiled.multiply_backward(grad, x, other, number, result)
    gate, up = _pair("the backward of a product", x, other)
    with torch.no_grad():
        factor = function(gate)
        up_grad = grad * factor
        y = factor.mul_(up) if result else None
        gate_grad = function_backward(grad * up, gate)
    return (torch.cat([gate_grad, up_grad], -1), None, y) if other is None else (gate_grad, up_grad, y)


def _takes_halves(x: Tensor) -> bool:
    return x.dim() > 0 and x.shape[-1] % 2 == 0 and takes(x)


def _is_of_their_product(grad: Tensor, x: Tensor) -> bool:
    """Whether it may be a gradient of the product of x's halves, beside x. Triton's kernels look at no shape."""
    return grad.dtype is x.dtype and grad.device == x.device and grad.shape == (*x.shape[:-1], x.shape[-1] // 2)


def _pair(name: str, x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    return _halves(name, x) if other is None else (x, other)


def _times(y: Tensor, other: Tensor) -> Tensor:
    """`y * other`; y is nobody else's, so its memory is used again, but for a graph, which would copy it first."""
    alike = y.dtype == other.dtype and y.shape == other.shape and y.device == other.device
    return y.mul_(other) if alike and not _recorded() else y * other


def _recorded() -> bool:
    """Whether what is computed on the way may be kept: by a graph of autograd's, or in a trace, which is for both."""
    return torch.is_grad_enabled() or torch.jit.is_tracing()


def _halves(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{name}: the input has shape {tuple(x.shape)}; expected an even last dimension")
    gate, up = x.chunk(2, dim=-1)
    return gate, up
