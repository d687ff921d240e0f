"""Normalisation over the last dimension, rounded where the models' own code rounds.

Every function takes any leading shape, any strides, and float16, bfloat16, float32 or float64; in memory a result's
dimensions lie as the input's, but for `layer_norm`'s, which are contiguous as PyTorch's are. The statistics are
computed in float32 (float64 inputs: in float64). What the compiled ops take, where the build has any, they compute; their
gradients have none of their own. All else is plain PyTorch, as are its gradients, vmap and forward-mode AD. Operands on
several devices and weights of another length are RuntimeErrors; a weight of more dimensions than one is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import compiled
from .compiled import CAST_FIRST, CAST_LAST, CUDA, DIRECT, SIGMOID, SILU, SILU_FIRST, ZERO_CENTERED, takes, takes_too
from .order import in_order, other_order

__all__ = [
    "add_rms_norm",
    "layer_norm",
    "layer_norm_cast_last",
    "rms_norm",
    "rms_norm_cast_last",
    "rms_norm_gate_first",
    "rms_norm_gated",
    "rms_norm_gated_cast_last",
    "rms_norm_weight_dtype",
    "rms_norm_zero_centered",
]

# Elements from which memory decides on a CPU, without gradients. Below the first, `F.rms_norm` is fastest: one call into
# C++. From there the usual formula pays for its float32 temporaries, the more so where the allocator gives them back to
# the system and pages them in anew. Medians in us for the usual formula, `F.rms_norm` and the way here, 2 threads of an
# EPYC, torch 2.13: 64 x 2048 float32 105, 93, 74; bfloat16 512 x 2048 480, 487, 455. From the second on, one temporary
# less is worth another pass: 2048 x 2048 float32 15,000, 15,200, 2,900; bfloat16 19,700, 17,800, 2,100.
_LARGE = 1 << 16
_HUGE = 1 << 22
_WIDE = (torch.float32, torch.float64)
_KINDS = {"silu": SILU, "swish": SILU, "sigmoid": SIGMOID}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`weight * (x / sqrt(mean(x**2) + eps))`, the quotient rounded to x's dtype before the product (Llama, Qwen2, ...).

    x: (..., hidden), weight: (hidden,) -> (..., hidden) in the dtype that x's and the weight's promote to.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.rms_norm(x, weight, eps, CAST_FIRST)) is not None
    ):
        return y
    if (order := other_order(x)) is not None:
        return in_order(order, True, lambda x: rms_norm(x, weight, eps), x)
    if takes(x, weight):
        return compiled.rms_norm(x, weight, eps, CAST_FIRST)
    row = _row("rms_norm", weight)
    dtype = x.dtype
    if _large(x):
        return _times(_normalized(x, eps).to(dtype), weight, weight)
    if dtype is weight.dtype and dtype in _WIDE:  # there is nothing to round in between
        return F.rms_norm(x, row, weight, eps)
    return weight * _narrow(F.rms_norm(x, row, None, eps), dtype)  # under autocast it may come back in float32


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual, weight, eps)` and the sum, which the next layer adds to.

    x, residual: (..., hidden), weight: (hidden,) -> two tensors (..., hidden), in the dtypes of `rms_norm` and of the sum.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (both := DIRECT.add_rms_norm(x, residual, weight, eps, CAST_FIRST)) is not None
    ):
        return both
    if (order := other_order(x, residual)) is not None:
        return in_order(order, True, lambda x, residual: add_rms_norm(x, residual, weight, eps), x, residual)
    if takes(x, weight) and takes_too(x, residual):
        return compiled.add_rms_norm(x, residual, weight, eps, CAST_FIRST)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_cast_last(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As `rms_norm`, but the product too is taken in float32, and its result rounded to x's dtype (OLMo 2, gpt-oss).

    x: (..., hidden), weight: (hidden,) -> (..., hidden) in x's dtype.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.rms_norm(x, weight, eps, CAST_LAST)) is not None
    ):
        return y
    if (order := other_order(x)) is not None:
        return in_order(order, True, lambda x: rms_norm_cast_last(x, weight, eps), x)
    if takes(x, weight):
        return compiled.rms_norm(x, weight, eps, CAST_LAST)
    row = _row("rms_norm_cast_last", weight)
    if _large(x):
        return _times(_normalized(x, eps), weight, weight).to(x.dtype)
    return _narrow(F.rms_norm(_wide(x), row, _wide(weight), eps), x.dtype)


def rms_norm_zero_centered(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm_cast_last` with the factor `1 + weight`, for weights stored around zero (Gemma, Qwen3-Next).

    x: (..., hidden), weight: (hidden,) -> (..., hidden) in x's dtype.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.rms_norm(x, weight, eps, ZERO_CENTERED)) is not None
    ):
        return y
    if (order := other_order(x)) is not None:
        return in_order(order, True, lambda x: rms_norm_zero_centered(x, weight, eps), x)
    if takes(x, weight):
        return compiled.rms_norm(x, weight, eps, ZERO_CENTERED)
    row = _row("rms_norm_zero_centered", weight)
    scale = 1.0 + _wide(weight)
    if _large(x):
        return _times(_normalized(x, eps), scale, weight).to(x.dtype)
    return _narrow(F.rms_norm(_wide(x), row, scale, eps), x.dtype)


def rms_norm_weight_dtype(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As `rms_norm`, but the quotient is rounded to the *weight's* dtype where that has 16 bits (T5 and its kin).

    x: (..., hidden), weight: (hidden,) -> (..., hidden), in the weight's dtype where that has 16 bits, else float32
    or wider.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.rms_norm(x, weight, eps, CAST_FIRST)) is not None
    ):
        return y
    if (order := other_order(x)) is not None:
        return in_order(order, True, lambda x: rms_norm_weight_dtype(x, weight, eps), x)
    if takes(x, weight):  # of one dtype
        return compiled.rms_norm(x, weight, eps, CAST_FIRST)
    row = _row("rms_norm_weight_dtype", weight)
    dtype = _wide(x).dtype if weight.dtype in _WIDE else weight.dtype
    if _large(x):
        return _times(_normalized(x, eps).to(dtype), weight, weight)
    return weight * _narrow(F.rms_norm(_wide(x), row, None, eps), dtype)


def rms_norm_gated(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float = 1e-6, activation: str = "silu"
) -> Tensor:
    """`rms_norm(x, weight) * activation(gate)`, the gate in float32, the product rounded to x's dtype (Qwen3-Next).

    x, gate: (..., hidden), weight: (hidden,) -> (..., hidden) in x's dtype. `activation`: silu, swish or sigmoid.
    """
    if (order := other_order(x, gate)) is not None:
        return in_order(order, True, lambda x, gate: rms_norm_gated(x, weight, gate, eps, activation), x, gate)
    if activation in _KINDS and takes(x, weight) and takes_too(x, gate):
        return compiled.rms_norm_gated(x, gate, weight, eps, CAST_FIRST, _KINDS[activation])
    return (rms_norm(x, weight, eps) * _gate("rms_norm_gated", gate, activation)).to(x.dtype)


def rms_norm_gated_cast_last(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float = 1e-6, activation: str = "sigmoid"
) -> Tensor:
    """As `rms_norm_gated`, but rounded to x's dtype only at the end (Kimi Linear).

    x, gate: (..., hidden), weight: (hidden,) -> (..., hidden) in x's dtype. `activation`: silu, swish or sigmoid.
    """
    if (order := other_order(x, gate)) is not None:
        return in_order(
            order, True, lambda x, gate: rms_norm_gated_cast_last(x, weight, gate, eps, activation), x, gate
        )
    if activation in _KINDS and takes(x, weight) and takes_too(x, gate):
        return compiled.rms_norm_gated(x, gate, weight, eps, CAST_LAST, _KINDS[activation])
    normalized = F.rms_norm(_wide(x), _row("rms_norm_gated_cast_last", weight), _wide(weight), eps)
    return (normalized * _gate("rms_norm_gated_cast_last", gate, activation)).to(x.dtype)


def rms_norm_gate_first(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float = 1e-6) -> Tensor:
    """`rms_norm(x * silu(gate), weight)`: gated in float32, then normalised (Mamba 2, Bamba).

    x, gate: (..., hidden), weight: (hidden,) -> (..., hidden) in the dtype that x's and the weight's promote to.
    """
    if gate is None:
        return rms_norm(x, weight, eps)
    if (order := other_order(x, gate)) is not None:
        return in_order(order, True, lambda x, gate: rms_norm_gate_first(x, weight, gate, eps), x, gate)
    if takes(x, weight) and takes_too(x, gate):
        return compiled.rms_norm_gated(x, gate, weight, eps, CAST_FIRST, SILU_FIRST)
    row = _row("rms_norm_gate_first", weight)
    gated = _wide(x) * _silu(gate)
    if _large(x):
        return _times(_normalized(gated, eps).to(x.dtype), weight, weight)
    return weight * F.rms_norm(gated, row, None, eps).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    normalized_shape: Sequence[int] | None = None,
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimensions, those of `normalized_shape`.

    x: (..., *normalized_shape), weight and bias: normalized_shape or None -> x's shape, in x's dtype. Without a
    `normalized_shape`, the weight's shape, and without a weight the last dimension. Where autocast widens PyTorch's own
    to float32 (16 bits, but not on a CPU), that is called.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and not (CUDA and torch.is_autocast_enabled("cuda"))
        and (y := DIRECT.layer_norm(x, weight, bias, eps, normalized_shape)) is not None
    ):
        return y
    if normalized_shape is None and weight is None:
        normalized_shape = x.shape[-1:]
    if compiled.takes_layer(x, weight, bias, normalized_shape) and not _widened(x):
        return compiled.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape if normalized_shape is None else normalized_shape, weight, bias, eps)


def layer_norm_cast_last(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation without a bias, all of it in float32, rounded to x's dtype at the end (Cohere).

    x: (..., hidden), weight: (hidden,) -> (..., hidden) in x's dtype.
    """
    if (
        not is_dynamo_compiling()
        and DIRECT is not None
        and (y := DIRECT.layer_norm(x, weight, None, eps, None)) is not None
    ):
        return y
    if (order := other_order(x)) is not None:
        return in_order(order, True, lambda x: layer_norm_cast_last(x, weight, eps), x)
    if compiled.takes_layer(x, weight, None, None):
        return compiled.layer_norm(x, weight, None, eps)
    row = _row("layer_norm_cast_last", weight)
    return _narrow(F.layer_norm(_wide(x), row, _wide(weight), None, eps), x.dtype)


def _widened(x: Tensor) -> bool:
    """Whether autocast makes PyTorch's layer norm return float32: for 16 bits, everywhere but on a CPU."""
    if x.is_cpu or x.dtype in _WIDE:
        return False
    return torch.is_autocast_enabled(x.device.type)


def _large(x: Tensor) -> bool:
    """Whether working in place pays. It would be right under autograd too, but slower there.

    Never while compiling, exporting or tracing: a branch on the size would be a guard on it, or lost, and the compiler fuses anyway.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.numel() >= _LARGE and x.device.type == "cpu"


def _normalized(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps)` in float32 or wider, bit for bit as the usual formula, in memory of its own."""
    wide = _wide(x)
    if x.numel() < _HUGE:
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return wide * scale if wide is x else wide.mul_(scale)
    y = wide.square() if wide is x else wide.pow_(2)
    scale = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y.copy_(x).mul_(scale)


def _times(y: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """`y * factor`, in y's memory where that is well defined: y is nobody else's, the factor comes from the weight.

    A parameter is never batched, but a plain tensor may be one example of `vmap` over weights, for which y has no room.
    The device is asked for because `mul_` takes a factor without data (on `meta`) for nothing to do.
    """
    if type(weight) is nn.Parameter and weight.device == y.device and _fits(factor.dtype, y.dtype):
        return y.mul_(factor)
    return y * factor


def _fits(dtype: torch.dtype, memory: torch.dtype) -> bool:
    return torch.promote_types(dtype, memory) == memory


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: float32, or float64 where x is."""
    return x if x.dtype in _WIDE else x.float()


def _narrow(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in the dtype. Asked first, because a `.to` that has nothing to do costs a third of a microsecond."""
    return y if y.dtype is dtype else y.to(dtype)


def _row(name: str, weight: Tensor) -> torch.Size:
    """The shape of what is normalised. Two dimensions would be normalised together, which no such weight means."""
    shape = weight.shape
    if len(shape) != 1:
        raise ValueError(f"{name}: the weight has shape {tuple(shape)}; expected one dimension, the input's last")
    return shape


def _silu(gate: Tensor) -> Tensor:
    wide = _wide(gate)
    return F.silu(wide, inplace=wide is not gate and _large(gate))


def _gate(name: str, gate: Tensor | None, activation: str) -> Tensor:
    """The gate's factor, in float32 or wider."""
    if gate is None:
        raise TypeError(f"{name}: there is no gate; expected a tensor of the input's shape")
    if activation in ("silu", "swish"):
        return _silu(gate)
    if activation == "sigmoid":
        return torch.sigmoid(_wide(gate))
    raise ValueError(f"{name}: the activation is {activation!r}; expected silu, swish or sigmoid")
