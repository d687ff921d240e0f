"""An RMS norm and the gated MLP after it, of the kernels `norm` and `activation`, which a build of this one brings along."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from kernelhub import get_kernel_dep

from . import compiled, hopper
from .gated import PRODUCTS, activation, gated_mlp
from .plain import Weights, takes

norm = get_kernel_dep("kernelhub/norm")

__all__ = [
    "FORMS",
    "FORMULAS",
    "PRODUCTS",
    "activation",
    "add_gated_mlp",
    "down",
    "gated_mlp_as_one",
    "may_be_one",
    "norm",
    "rms_norm_and_input",
    "rms_norm_gated_mlp",
]

# By the names that layers are marked with.
FORMULAS = {
    "RMSNorm": norm.rms_norm,
    "RMSNormCastLast": norm.rms_norm_cast_last,
    "RMSNormZeroCentered": norm.rms_norm_zero_centered,
    "RMSNormWeightDtype": norm.rms_norm_weight_dtype,
}
# As the ops of the norms know them, where x and the weight have one dtype.
FORMS = {
    "RMSNorm": norm.compiled.CAST_FIRST,
    "RMSNormCastLast": norm.compiled.CAST_LAST,
    "RMSNormZeroCentered": norm.compiled.ZERO_CENTERED,
    "RMSNormWeightDtype": norm.compiled.CAST_FIRST,
}

# In float32, without gradients, a CPU computes rows in blocks: what lies between the projections stays small, so that the
# allocator keeps its memory and the caches hold some of it. Medians in ms for whole and in blocks of 512, hidden 512 and
# 2048 in between, 2 threads of an EPYC, torch 2.13: 4096 rows 260, 222. With 1024 rows blocks only cost: 53, 55; in
# bfloat16 too, where each product packs its weights anew: 78, 93.
_ROWS = 512
_FROM_ROWS = 2048


def rms_norm_gated_mlp(
    x: Tensor, weight: Tensor, eps: float, weights: Weights, formula: str = "RMSNorm", product: str = "SiLUActivation"
) -> Tensor:
    """`down(f(gate(n)) * up(n))` with `n = rms_norm(x, weight, eps)`: (..., hidden) -> (..., hidden).

    `formula` names the norm, `product` the class of f.
    """
    if compiled.takes(x, weights, product, weight):
        return compiled.gated_mlp(x, weights, product, None, weight, eps, FORMS[formula])
    normalize = FORMULAS[formula]
    if x.numel() < _FROM_ROWS * x.shape[-1] or not _free(x, weights):
        n = normalize(x, weight, eps)
        if torch.is_grad_enabled() and takes(n, weights):
            return gated_mlp(n, weights, product)
        return down(_inner(n, weights, product), weights)
    rows = x.reshape(-1, x.shape[-1])
    made = rows.new_empty(rows.shape[0], weights.down.shape[0])
    for block, out in zip(rows.split(_ROWS), made.split(_ROWS), strict=True):
        inner = _inner(normalize(block, weight, eps), weights, product)
        if weights.down_bias is None:
            torch.mm(inner, weights.down.t(), out=out)
        else:
            torch.addmm(weights.down_bias, inner, weights.down.t(), out=out)
    return made.view(*x.shape[:-1], -1)


def add_gated_mlp(
    x: Tensor, residual: Tensor, weights: Weights, product: str = "SiLUActivation", ours: bool = False
) -> Tensor:
    """`residual + down(f(gate(x)) * up(x))`. Without gradients it is added where the product lies.

    On a GPU that is by the op for it, else in the residual's own memory, where it is `ours` to write to: the last product
    begins with it.
    """
    known, same = takes(x, weights), residual.dtype is x.dtype
    if known and torch.is_grad_enabled():  # then no op by itself: it has no gradient
        return gated_mlp(x, weights, product, residual) if same else residual + gated_mlp(x, weights, product)
    if known and same and hopper.takes_added_mlp(x, weights, residual, product):
        return hopper.added_mlp(x, weights, residual, product)
    inner = _inner(x, weights, product)
    if known and same and weights.down_bias is None and hopper.takes_add(inner, weights.down, residual):
        return hopper.add_product(inner, weights.down, residual)
    if not known or not same or is_compiling():
        return residual + down(inner, weights)
    if ours and x.is_cuda and weights.down_bias is None and residual.is_contiguous():
        residual.view(-1, residual.shape[-1]).addmm_(inner.flatten(0, -2), weights.down.t())
        return residual
    return down(inner, weights).add_(residual)


def may_be_one(x: Tensor) -> bool:
    """Whether there may be an op for a gated MLP of x without gradients, so that it is worth while to look for the weights."""
    return not torch.is_grad_enabled() and (compiled.may_take(x) or hopper.may_take(x))


def gated_mlp_as_one(x: Tensor, weights: Weights, product: str) -> Tensor | None:
    """`down(f(gate(x)) * up(x))` by an op for all or the first part of it, without gradients; None where there is none."""
    if compiled.takes(x, weights, product):
        return compiled.gated_mlp(x, weights, product)
    if hopper.takes(x, weights, product):
        return down(hopper.gated_product(x, weights, product), weights)
    return None


def down(inner: Tensor, weights: Weights) -> Tensor:
    """The last product of a gated MLP."""
    return F.linear(inner, weights.down, weights.down_bias)


def _inner(x: Tensor, weights: Weights, product: str) -> Tensor:
    """The first part of a gated MLP; of what `takes` knows, without gradients."""
    if hopper.takes(x, weights, product):
        return hopper.gated_product(x, weights, product)
    gate = F.linear(x, weights.gate, weights.gate_bias)
    if weights.up is None:
        return PRODUCTS[product](gate)
    return PRODUCTS[product](gate, F.linear(x, weights.up, weights.up_bias))


def _free(x: Tensor, weights: Weights) -> bool:
    """Whether products may go where they are wanted: float32 on a CPU, and nothing records or transforms what is done."""
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not is_compiling()
        and takes(x, weights)
    )


def rms_norm_and_input(x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """The norm of x, and x for whoever adds to it; the norm's backward adds that gradient to its own, which saves a pass.

    For what the norm's ops take, where gradients are asked for.
    """
    return _RmsNormAndInput.apply(x, weight, eps, form)


class _RmsNormAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.options = eps, form
        return norm.compiled.rms_norm(x, weight, eps, form), x.view_as(x)

    @staticmethod
    @norm.compiled.first_derivatives_only
    def backward(ctx: Any, grad: Tensor, input_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        backward = norm.compiled.rms_norm_backward
        x_grad, weight_grad = backward(grad, input_grad, x, weight, *ctx.options, needs_weight)
        return x_grad, weight_grad if needs_weight else None, None, None
