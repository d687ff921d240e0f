"""An RMS norm and the gated MLP after it, of the kernels `norm` and `activation`, which a build of this one brings along."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelhub import get_kernel_dep

norm = get_kernel_dep("kernelhub/norm")
activation = get_kernel_dep("kernelhub/activation")

__all__ = ["FORMULAS", "PRODUCTS", "activation", "add_gated_mlp", "norm", "rms_norm_gated_mlp"]

# By the names that layers are marked with, and by those of the classes that transformers has.
FORMULAS = {
    "RMSNorm": norm.rms_norm,
    "RMSNormCastLast": norm.rms_norm_cast_last,
    "RMSNormZeroCentered": norm.rms_norm_zero_centered,
    "RMSNormWeightDtype": norm.rms_norm_weight_dtype,
}
PRODUCTS = {
    "SiLUActivation": activation.silu_and_mul,
    "SiLU": activation.silu_and_mul,
    "GELUActivation": activation.gelu_and_mul,
    "GELUTanh": activation.gelu_tanh_and_mul,
    "NewGELUActivation": activation.gelu_tanh_and_mul,
}

# In float32, without gradients, a CPU computes rows in blocks: what lies between the projections stays small, so that the
# allocator keeps its memory and the caches hold some of it. Medians in ms for whole and in blocks of 512, hidden 512 and
# 2048 in between, 2 threads of an EPYC, torch 2.13: 4096 rows 260, 222. With 1024 rows blocks only cost: 53, 55; in
# bfloat16 too, where each product packs its weights anew: 78, 93.
_ROWS = 512
_FROM_ROWS = 2048
_transforms_active = torch._C._are_functorch_transforms_active


def rms_norm_gated_mlp(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: nn.Linear,
    up: nn.Linear,
    down: nn.Linear,
    formula: str = "RMSNorm",
    product: str = "SiLUActivation",
) -> Tensor:
    """`down(f(gate(n)) * up(n))` with `n = rms_norm(x, weight, eps)`: (..., hidden) -> (..., hidden).

    `formula` names the norm, `product` the class of f.
    """
    normalize, multiply = FORMULAS[formula], PRODUCTS[product]
    gate, up, down = gate._parameters, up._parameters, down._parameters
    if x.numel() < _FROM_ROWS * x.shape[-1] or not _free(x, gate, down):
        n = normalize(x, weight, eps)
        inner = multiply(F.linear(n, gate["weight"], gate["bias"]), F.linear(n, up["weight"], up["bias"]))
        return F.linear(inner, down["weight"], down["bias"])
    down_weight, down_bias = down["weight"], down["bias"]
    rows = x.reshape(-1, x.shape[-1])
    made = rows.new_empty(rows.shape[0], down_weight.shape[0])
    for block, out in zip(rows.split(_ROWS), made.split(_ROWS), strict=True):
        n = normalize(block, weight, eps)
        inner = multiply(F.linear(n, gate["weight"], gate["bias"]), F.linear(n, up["weight"], up["bias"]))
        if down_bias is None:
            torch.mm(inner, down_weight.t(), out=out)
        else:
            torch.addmm(down_bias, inner, down_weight.t(), out=out)
    return made.view(*x.shape[:-1], -1)


def add_gated_mlp(
    x: Tensor, residual: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, product: str = "SiLUActivation"
) -> Tensor:
    """`residual + down(f(gate(x)) * up(x))`; without gradients, in float32 on a CPU, added where the product lies."""
    gate, up, down = gate._parameters, up._parameters, down._parameters
    inner = PRODUCTS[product](F.linear(x, gate["weight"], gate["bias"]), F.linear(x, up["weight"], up["bias"]))
    made = F.linear(inner, down["weight"], down["bias"])
    return made.add_(residual) if made.dtype is residual.dtype and _free(x, gate, down) else residual + made


def _free(x: Tensor, gate: dict[str, Any], down: dict[str, Any]) -> bool:
    """Whether products may go where they are wanted: float32 on a CPU, and nothing records or transforms what is done."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _transforms_active()
        and type(x) is Tensor
        and x.dtype is torch.float32
        and gate["weight"].dtype is down["weight"].dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
