"""The compiled op: a gated MLP of a few rows on a CPU, with the norm before it and the residual around it, without gradients.

Such products wait for the weights. PyTorch's read those of 2 to 8 rows at a quarter of the speed that memory has, since
they lay them out anew for each product.
"""

# ruff: noqa: ARG001  (what the op is given and what decides on the shape is not the same)

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import plain
from ._ops import add_op_namespace_prefix, ops
from .plain import PLAIN, Weights

__all__ = ["CAST_FIRST", "FUNCTIONS", "HERE", "gated_mlp", "may_take", "takes"]

HERE = hasattr(ops, "gated_mlp")

# As in decoder_cpu/products.h.
CAST_FIRST = 0
FUNCTIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 2, "NewGELUActivation": 2}


def _multiplies(dtype: str) -> bool:
    """Whether PyTorch has a product for that dtype which is more than a loop over it."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def _most_rows() -> dict[torch.dtype, tuple[int, int]]:
    """Up to how many rows the op is faster, for MLPs of fewer weights in each projection than `_LARGE`, and for others."""
    if not HERE or ops.use_level(2) == 0:  # without wide vectors, nothing is known to be faster
        return {}
    unlimited = (sys.maxsize, sys.maxsize)
    return {
        torch.float32: (16, 32),
        torch.bfloat16: (4, 4) if _multiplies("bf16") else unlimited,
        torch.float16: (4, 4) if _multiplies("fp16") else unlimited,
    }


_LARGE = 1 << 20
_MOST_ROWS = _most_rows()


def may_take(x: Tensor) -> bool:
    """Whether it is worth while to look for the weights.

    Not while compiling: how many rows there are would be a guard, and an error where they are to be dynamic.
    """
    return HERE and not torch.is_grad_enabled() and x.is_cpu and not is_compiling()


def takes(
    x: Tensor, weights: Weights, product: str | None, norm: Tensor | None = None, residual: Tensor | None = None
) -> bool:
    """Whether the op takes x, (..., hidden), and is faster. The norm's weight is (hidden,), the residual of x's shape."""
    most = _MOST_ROWS.get(x.dtype)
    if most is None or not may_take(x) or product not in FUNCTIONS:
        return False
    gate, gate_bias, up, up_bias, down, down_bias = weights
    return (
        x.numel() <= most[gate.numel() >= _LARGE] * x.shape[-1]
        and plain.takes(x, weights)
        and (norm is None or (norm.dtype is x.dtype and type(norm) in PLAIN and norm.is_contiguous()))
        and (residual is None or (residual.dtype is x.dtype and type(residual) in PLAIN and residual.shape == x.shape))
        and gate.is_contiguous()
        and (up is None or up.is_contiguous())
        and down.is_contiguous()
        and (gate_bias is None or gate_bias.is_contiguous())
        and (up_bias is None or up_bias.is_contiguous())
        and (down_bias is None or down_bias.is_contiguous())
    )


def _direct(overload: Any) -> Any:
    """The C++ function under an op, without the Python frame around it: 0.3 of 2.5 us."""
    return getattr(overload, "_op", overload)


if HERE:
    _gated_mlp = _direct(ops.gated_mlp.default)


def gated_mlp(
    x: Tensor,
    weights: Weights,
    product: str,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    form: int = CAST_FIRST,
) -> Tensor:
    """`down(f(gate(n)) * up(n))`, n being the RMS norm of x, or x without a norm: (..., hidden) -> (..., hidden).

    With a residual, `x + residual` stands for x, and is added to the result. `form` is one of kernelhub/norm's.
    """
    gate, gate_bias, up, up_bias, down, down_bias = weights
    return _gated_mlp(x, residual, norm, eps, form, gate, gate_bias, up, up_bias, down, down_bias, FUNCTIONS[product])


def _register_shapes() -> None:
    """What the op returns, for programs that are traced."""

    @torch.library.register_fake(add_op_namespace_prefix("gated_mlp"))
    def _(
        x: Tensor,
        residual: Tensor | None,
        norm: Tensor | None,
        eps: float,
        form: int,
        gate: Tensor,
        gate_bias: Tensor | None,
        up: Tensor | None,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        function: int,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], down.shape[0]))


if HERE:
    _register_shapes()
