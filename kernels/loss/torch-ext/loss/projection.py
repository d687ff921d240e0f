"""The projection to logits with its loss, some rows at a time, as one op: what is in memory is the same when compiled."""

# ruff: noqa: ARG001  (what the op is given and what decides on the shapes is not the same)

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled, parts
from ._ops import add_op_namespace_prefix, ops

__all__ = ["gradients", "losses", "rows_together"]

# Logits that are few, whatever the weight is like: in float32 64 MiB.
_FEW = 1 << 24
# Classes whose part of the weight's gradient is added at a time, where that takes a copy.
_CLASSES = 8192
# Whether a product of 16-bit matrices can be added to a float32 sum: on CUDA, from torch 2.8.
_MIXED = torch.version.hip is None and "dtype_out" in torch.ops.aten.addmm.overloads()


def rows_together(features: int, classes: int) -> int:
    """The most rows whose logits are in memory at a time.

    As many as there are features: their logits then take as much as the weight, of which training keeps several copies
    anyway, and the products stay large (each passes over the weight three times). Fewer would hardly lower the peak of
    training in 16 bits: once the logits are freed, the weight's gradient in its own dtype, as large as they were, joins
    the float32 sum that it is rounded from. More where that would be next to none.
    """
    return max(features, _FEW // classes, 1)


def losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """hidden: (rows, features), weight: (classes, features), labels: (rows,) -> the losses, (rows,). No gradients."""
    return _op(hidden, weight, bias, labels, None, ignore_index, label_smoothing, z_loss, False, False, False)[0]


def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses, and the gradients of sum(scale * losses), empty where they are not needed. scale: (rows,)."""
    needs = needs_hidden, needs_weight, needs_bias
    return _op(hidden, weight, bias, labels, scale, ignore_index, label_smoothing, z_loss, *needs)


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (count, features), classes = hidden.shape, weight.shape[0]
    rows = _rows(count, rows_together(features, classes))
    # A sum over several parts is taken in float32: each addition in 16 bits would round.
    several = count > rows and hidden.element_size() == 2 and needs_weight
    found = _empty(hidden, weight, labels, needs_hidden, needs_weight and not several, needs_bias)
    all_losses, hidden_grad, weight_grad, bias_grad = found
    if count == 0:
        return all_losses, hidden_grad, weight_grad.zero_(), bias_grad.zero_()
    weight_sum = weight.new_empty(weight.shape, dtype=torch.float32) if several else weight_grad
    bias_sum = bias_grad.new_zeros(bias_grad.shape, dtype=parts.wide_dtype(bias_grad))
    options = ignore_index, label_smoothing, z_loss
    memory = hidden.new_empty((rows, classes))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            x, y, logits = hidden[part], labels[part], memory[: min(rows, count - start)]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            if scale is None:
                all_losses[part] = _losses(logits, y, *options)
                continue
            all_losses[part] = _gradient_(logits, y, scale[part], *options)
            if needs_hidden:
                torch.mm(logits, weight, out=hidden_grad[part])
            if needs_weight:
                _add_product(weight_sum, logits, x, beta=0 if start == 0 else 1)
            if needs_bias:
                bias_sum += logits.sum(0, dtype=bias_sum.dtype)
        del memory, logits  # before there is a second copy of the weight's gradient
        bias_grad.copy_(bias_sum)
        return all_losses, hidden_grad, weight_sum.to(weight.dtype), bias_grad


def _rows(count: int, most: int) -> int:
    """The rows of a part, where `count` are in as few parts of at most `most` as can be: about the same in each.

    But multiples of 64, which products are fastest at, where that is no more than `most`.
    """
    each = -(-count // max(1, -(-count // most)))
    return min(-(-each // 64) * 64, most, count)


def _losses(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    if compiled.takes(logits, labels):
        return compiled.losses(logits, labels, ignore_index, label_smoothing, z_loss)[0]
    return parts.losses(logits, labels, ignore_index, label_smoothing, z_loss)


def _gradient_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    way = compiled.gradient_ if compiled.takes(logits, labels) else parts.gradient_
    return way(logits, labels, scale, ignore_index, label_smoothing, z_loss)


def _add_product(total: Tensor, logits: Tensor, x: Tensor, beta: int) -> None:
    """`total = beta * total + logits.T @ x`; where only the total is in float32, without rounding the product to 16 bits.

    With a beta of 0 what is in the total, NaNs too, does not matter.
    """
    if total.dtype is x.dtype:
        total.addmm_(logits.t(), x, beta=beta)
    elif x.is_cuda and _MIXED:  # in place: the product is nowhere but in the sum
        torch.addmm(total, logits.t(), x, out_dtype=total.dtype, beta=beta, out=total)
    else:
        wide = x.to(total.dtype)
        for start in range(0, len(total), _CLASSES):  # what is copied is copied of some classes at a time
            some = slice(start, start + _CLASSES)
            total[some].addmm_(logits[:, some].t().to(total.dtype), wide, beta=beta)


def _empty(
    hidden: Tensor, weight: Tensor, labels: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        labels.new_empty(labels.shape, dtype=parts.wide_dtype(hidden)),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(hidden, weight, labels, needs_hidden, needs_weight, needs_bias)


# Its name carries the build's digest: where it is there already, this module was imported before, from another place.
if not hasattr(ops, "linear_cross_entropy"):
    _namespace, _, _name = add_op_namespace_prefix("linear_cross_entropy").partition("::")
    _library = torch.library.Library(_namespace, "FRAGMENT")
    _library.define(
        f"{_name}(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? scale, int ignore_index, "
        "float label_smoothing, float z_loss, bool needs_hidden, bool needs_weight, bool needs_bias) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_namespace}::{_name}", _shapes, lib=_library)

_op = ops.linear_cross_entropy.default
