"""Cross entropy over large vocabularies, computed in float32 without a float32 copy of the logits.

Both functions take any leading shape, any strides, and float16, bfloat16, float32 or float64; labels are the numbers of
classes. What the compiled ops take, where the build has any, they compute; else PyTorch, some rows at a time. They give
first derivatives; a second one is an error. `torch.func`, forward-mode AD, tensor subclasses (DTensor and the like) and,
but for the compiled ops and the projection, `torch.compile` get PyTorch's own formula, of all rows at once.

With N labels that are not ignored and `nll`, `smooth` the negative log-probabilities of the label and, on average, of all
classes, the loss of a row is `(1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * logsumexp(logits) ** 2`;
"mean" divides their sum by N. Ignored rows have loss 0 and gradient 0, whatever their logits are. With N = 0 the mean is
NaN, as PyTorch's is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import compiled, parts, projection
from .once import differentiable_once

__all__ = ["cross_entropy", "linear_cross_entropy"]

_REDUCTIONS = ("mean", "sum", "none")
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_transforms_active = torch._C._are_functorch_transforms_active
_first_derivatives_only = differentiable_once(
    "the losses of kernelhub/loss have no second derivative: compute this one with torch.nn.functional.cross_entropy "
    "on the logits (or unkernelize the model)"
)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """The cross entropy of logits, (..., classes), and labels, (...), in float32 (float64 for float64 logits).

    -> a scalar, or the losses, (...), for `reduction="none"`. As `F.cross_entropy(logits.float(), labels)`, but that
    nothing is as large as the logits except their gradient. Raises `ValueError` for labels of another shape or dtype,
    `IndexError` for a label that is no class (on a CPU; a GPU stops as it does for PyTorch, but Triton gives NaN).
    """
    labels = _checked("cross_entropy", logits, labels, label_smoothing, reduction)
    options = ignore_index, label_smoothing, z_loss
    return _reduced(_losses(logits, labels, *options), labels, ignore_index, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy(F.linear(hidden, weight, bias), labels)` with the logits of some rows at a time in memory.

    hidden: (..., features), weight: (classes, features), bias: (classes,) or None, labels: (...) -> as `cross_entropy`.
    The gradients are computed with the loss, while the logits are there, so that the backward only scales them; for
    `reduction="none"` and in float16, where the scale decides what underflows, it computes the logits once more. Of
    the logits, as many rows are there at a time as features (`projection.rows_together`): as much as the weight takes.
    """
    _check_projection(hidden, weight, bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    labels = _checked("linear_cross_entropy", hidden, labels, label_smoothing, reduction)
    options = ignore_index, label_smoothing, z_loss
    if not _in_parts(hidden, weight, bias, labels):
        return _reduced(_losses(F.linear(hidden, weight, bias), labels, *options), labels, ignore_index, reduction)
    shape = labels.shape
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    operands = (hidden, weight, bias)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)):
        losses = projection.losses(*operands, labels, *options)
    elif reduction == "none" or hidden.dtype is torch.float16:
        losses = _ProjectedLosses.apply(*operands, labels, *options)
    else:
        return _ProjectedLoss.apply(*operands, labels, reduction, *options)
    return _reduced(losses.reshape(shape), labels, ignore_index, reduction)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
        ctx.options, sums = options, None
        if compiled.takes(logits, labels):
            losses, sums = compiled.losses(logits, labels, *options)
        else:
            losses = parts.losses(logits, labels, *options)
        ctx.save_for_backward(logits, labels, sums)
        return losses

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, sums = ctx.saved_tensors
        if sums is not None:
            logits_grad = compiled.backward(grad, logits, labels, sums, *ctx.options)
        else:
            logits_grad = parts.backward(grad, logits, labels, *ctx.options)
        return logits_grad, None, None, None, None


class _ProjectedLoss(torch.autograd.Function):
    """One number, whose gradients are there with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        reduction: str,
        ignore_index: int,
        *options: float,
    ) -> Tensor:
        scale = torch.ones((), dtype=parts.wide_dtype(hidden), device=hidden.device)
        if reduction == "mean":
            scale = scale / (labels != ignore_index).sum()
        losses, *gradients = projection.gradients(
            hidden, weight, bias, labels, scale.expand(labels.shape), ignore_index, *options, *ctx.needs_input_grad[:3]
        )
        # The operands too, which the backward has no use for: gradients of these gradients are refused by what they are of.
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        return _reduced(losses, labels, ignore_index, reduction)

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _scaled(ctx.saved_tensors[3:], grad)
        found = [x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
        return (*found, None, None, None, None, None)


class _ProjectedLosses(torch.autograd.Function):
    """A number for each row, whose gradients wait until their scales are known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        return projection.losses(hidden, weight, bias, labels, *options)

    @staticmethod
    @_first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        _, *gradients = projection.gradients(*ctx.saved_tensors, grad, *ctx.options, *needed)
        found = [x if wanted else None for x, wanted in zip(gradients, needed, strict=True)]
        return (*found, None, None, None, None)


def _losses(logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
    """The losses, (...), by whichever way fits."""
    ours = _plain(logits, labels) and logits.dtype in _FLOATING and logits.shape[-1] > 0 and not _pytorchs()
    if ours and torch.compiler.is_compiling() and not compiled.takes(logits, labels):
        ours = False  # the compiler makes one pass of the formula, and would unroll a loop over parts
    if not ours:
        return parts.formula(logits, labels, *options)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Losses.apply(logits, labels, *options)
    if compiled.takes(logits, labels):
        return compiled.losses(logits, labels, *options)[0]
    return parts.losses(logits, labels, *options)


def _reduced(losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def _scaled(gradients: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Each times the gradient of the loss; in place where no second backward will ask for them."""
    if torch.compiler.is_compiling():
        return [(parts.wide(x) * grad).to(x.dtype) for x in gradients]
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradients = tuple(x.clone() for x in gradients)
    if grad.is_cpu and grad.item() == 1.0:
        return list(gradients)
    for x in gradients:
        if x.is_cuda:
            compiled.scale_(x, grad)
            continue
        for some in x.view(-1).split(_TOGETHER):
            some.copy_(parts.wide(some) * grad)  # multiplied in 16 bits, grad would be rounded first
    return list(gradients)


_TOGETHER = 1 << 22


def _in_parts(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> bool:
    """Whether the projection is ours: plain tensors of one dtype on one device, with something in them."""
    operands = [hidden, weight] if bias is None else [hidden, weight, bias]
    return (
        _plain(*operands, labels)
        and all(x.dtype is hidden.dtype for x in operands)
        and hidden.dtype in _FLOATING
        and weight.numel() > 0
        and not _pytorchs()
    )


def _plain(*tensors: Tensor) -> bool:
    """Not subclasses, which know their own ways."""
    return all(type(x) in compiled.PLAIN for x in tensors)


def _pytorchs() -> bool:
    """Whether `torch.func`, forward-mode AD or a trace is at work, for which a function of autograd's has no rules."""
    return _transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def _autocast(*operands: Tensor | None) -> list[Tensor | None]:
    """The operands of a projection in the dtype that autocast would give them."""
    kind = operands[0].device.type
    if not (_has_autocast(kind) and torch.is_autocast_enabled(kind)):
        return list(operands)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x is not None and x.dtype is not torch.float64 else x for x in operands]


def _has_autocast(kind: str) -> bool:
    """Whether PyTorch knows autocast for that type of device: not for meta, of which it is an error to ask the rest."""
    return torch.amp.is_autocast_available(kind)


# torch 2.11's compiler cannot trace into it. `torch.compiler.assume_constant_result` does just this, and imports dynamo: 1 s.
_has_autocast._dynamo_marked_constant = True


def _checked(name: str, rows: Tensor, labels: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """The labels, as int64."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: the reduction is {reduction!r}; expected {', '.join(_REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: the label_smoothing is {label_smoothing}; expected 0 to 1")
    if rows.dim() == 0 or labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name}: the labels have shape {tuple(labels.shape)}, the input {tuple(rows.shape)}; "
            "expected the input's without its last dimension"
        )
    _check_devices(name, rows, labels)
    if labels.dtype is torch.int64:
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(f"{name}: the labels have dtype {labels.dtype}; expected numbers of classes, as int64")
    return labels.long()


def _check_devices(name: str, *tensors: Tensor | None) -> None:
    found = sorted({str(x.device) for x in tensors if x is not None})
    if len(found) > 1:
        raise RuntimeError(f"{name}: expected all tensors on one device; they are on {' and '.join(found)}")


def _check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    name = "linear_cross_entropy"
    _check_devices(name, hidden, weight, bias)
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: the input has shape {tuple(hidden.shape)}, the weight {tuple(weight.shape)}; "
            "expected (..., features) and (classes, features)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: the bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape[:1])}")
