"""The op for GPUs of compute capability 9.0: both first products of a gated MLP, and what becomes of them, in one pass.

What it saves is the pass that reads gate and up again: 92 us of 834 at 8192 rows, 2048 x 8192, bfloat16, on an H200. The
results are the same bits as of the products apart, up to the order in which they are summed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import plain
from ._ops import add_op_namespace_prefix, ops
from .plain import Weights

__all__ = ["HERE", "gated_product", "gated_product_parts", "may_take", "takes"]

HERE = hasattr(ops, "gated_product")

# As in decoder_cuda/launch.h, by the names of the classes that transformers has.
_FUNCTIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 2, "NewGELUActivation": 2}
_DTYPES = frozenset((torch.bfloat16, torch.float16))
# Two blocks work on 256 rows together, so that fewer would leave tensor cores idle.
_FEWEST_ROWS = 256
_MOST_ROWS = 2**31 - 256  # which the op refuses more than


def may_take(x: Tensor) -> bool:
    """Whether it is worth while to look for the weights."""
    return HERE and x.is_cuda and x.dtype in _DTYPES


def takes(x: Tensor, weights: Weights, product: str) -> bool:
    """Whether the op takes x, (..., hidden), and is faster.

    Not in exported programs, where the number of rows may be left open. Compiled ones are made anew for fewer rows.
    """
    if not may_take(x) or product not in _FUNCTIONS or _exporting():
        return False
    gate, hidden = weights.gate, x.shape[-1]
    return (
        hidden % 8 == 0
        and 0 < _FEWEST_ROWS * hidden <= x.numel() <= _MOST_ROWS * hidden
        and gate.shape[0] % (8 if weights.up is not None else 16) == 0  # a packed weight's halves are multiples of 8
        and weights.gate_bias is None
        and weights.up_bias is None
        and _capable(x.get_device())
        and plain.takes(x, weights)
    )


def gated_product(x: Tensor, weights: Weights, product: str) -> Tensor:
    """`f(gate(x)) * up(x)`: (..., hidden) -> (..., features). No gradients."""
    return ops.gated_product(x, *_both(weights), _FUNCTIONS[product])


def gated_product_parts(x: Tensor, weights: Weights, product: str) -> tuple[Tensor, Tensor, Tensor]:
    """`f(gate(x)) * up(x)`, `gate(x)` and `up(x)`. No gradients."""
    return ops.gated_product_parts(x, *_both(weights), _FUNCTIONS[product])


def _both(weights: Weights) -> tuple[Tensor, Tensor]:
    if weights.up is not None:
        return weights.gate, weights.up
    gate, up = weights.gate.chunk(2)
    return gate, up


def _exporting() -> bool:
    # Not by `torch.compiler.is_exporting()`, which up to torch 2.13 is true of everything that is compiled.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


@torch.compiler.assume_constant_result  # not of the cached function itself, through which torch.compile would look
def _capable(device: int) -> bool:
    return _capability(device) == (9, 0)


_capability = cache(torch.cuda.get_device_capability)


def _register_shapes() -> None:
    """What the ops return, for programs that are traced."""

    def result(x: Tensor, gate: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], gate.shape[0]))

    @torch.library.register_fake(add_op_namespace_prefix("gated_product"))
    def _(x: Tensor, gate: Tensor, up: Tensor, function: int) -> Tensor:  # noqa: ARG001
        return result(x, gate)

    @torch.library.register_fake(add_op_namespace_prefix("gated_product_parts"))
    def _(x: Tensor, gate: Tensor, up: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
        return result(x, gate), result(x, gate), result(x, gate)


if HERE:
    _register_shapes()
