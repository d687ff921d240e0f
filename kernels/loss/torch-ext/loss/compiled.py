"""The compiled ops: when they take a call.

Where a build has none (every noarch one), Triton's take their place on a GPU; where there is no Triton, or the case is not
theirs, `parts` does it in PyTorch.
"""

# ruff: noqa: ARG001  (what the ops are given and what decides on the shapes is not the same)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import triton_here
from ._ops import add_op_namespace_prefix, ops

__all__ = ["HERE", "PLAIN", "backward", "gradient_", "losses", "scale_", "takes"]

HERE = hasattr(ops, "cross_entropy")
# A build has ops for the CPU or for CUDA.
_CUDA = HERE and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("cross_entropy"), "CUDA")

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
PLAIN = frozenset((Tensor, nn.Parameter))


def takes(logits: Tensor, labels: Tensor) -> bool:
    """Whether the ops take logits, (..., classes), and labels, (...)."""
    if not HERE:
        return (
            labels.dtype is torch.int64
            and labels.device == logits.device
            and type(labels) in PLAIN
            and logits.shape[-1] > 0
            and triton_here.takes(logits)
        )
    return (
        logits.dtype in _DTYPES
        and labels.dtype is torch.int64
        and (logits.is_cuda and labels.is_cuda if _CUDA else logits.is_cpu and labels.is_cpu)
        and type(logits) in PLAIN
        and type(labels) in PLAIN
        and logits.shape[-1] > 0
    )


if _CUDA:
    _scale = ops.scale_.default
if HERE:
    _cross_entropy = ops.cross_entropy.default
    _cross_entropy_backward = ops.cross_entropy_backward.default
    _cross_entropy_gradient = ops.cross_entropy_gradient_.default
else:
    _cross_entropy = triton_here.op("cross_entropy")
    _cross_entropy_backward = triton_here.op("cross_entropy_backward")
    _cross_entropy_gradient = triton_here.op("cross_entropy_gradient_")


def losses(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The losses, (...), in float32, and what `backward` wants to have kept."""
    return _checked(_cross_entropy, logits, labels, *options)


def backward(grad: Tensor, logits: Tensor, labels: Tensor, sums: Tensor, *options: Any) -> Tensor:
    """The gradient of sum(grad * losses): (..., classes)."""
    return _cross_entropy_backward(grad, logits, labels, sums, *options)


def gradient_(logits: Tensor, labels: Tensor, scale: Tensor, *options: Any) -> Tensor:
    """The losses; the logits become the gradient of sum(scale * losses)."""
    return _checked(_cross_entropy_gradient, logits, labels, scale, *options)


def scale_(x: Tensor, by: Tensor) -> None:
    """x *= by, where by, (), is wider than a 16-bit x and not rounded to it. Both are on one GPU, x is contiguous."""
    if _CUDA and x.dtype in _DTYPES and by.dtype is torch.float32:
        _scale(x, by)  # nothing is read or written where `by` is 1, as for most losses
    else:
        x.mul_(by.reshape(1))  # a tensor of no dimension would be rounded to x's dtype first


def _checked(op: Any, *arguments: Any) -> Any:
    """An op knows only RuntimeErrors; a label out of bounds is an IndexError, as in PyTorch."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "out of bounds" in str(error):
            raise IndexError(str(error).partition("\n")[0]) from None
        raise


def _register_shapes() -> None:
    """What the ops return, for `torch.compile` and export."""

    def register(name: str) -> Any:
        return torch.library.register_fake(add_op_namespace_prefix(name))

    def like(labels: Tensor) -> Tensor:
        return labels.new_empty(labels.shape, dtype=torch.float32)

    def together(name: str, logits: Tensor, *others: Tensor) -> None:
        # Tensors without data come here, and any tensors beside them.
        devices = [str(item.device) for item in (logits, *others)]
        torch._check(len(set(devices)) == 1, lambda: f"{name}: expected all tensors on one device, got {devices}")

    @register("cross_entropy")
    def _(
        logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        together("cross_entropy", logits, labels)
        return like(labels), labels.new_empty((2 * labels.numel(),), dtype=torch.float32)

    @register("cross_entropy_backward")
    def _(
        grad: Tensor,
        logits: Tensor,
        labels: Tensor,
        sums: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        together("cross_entropy_backward", logits, labels, grad, sums)
        return logits.new_empty(logits.shape)

    @register("cross_entropy_gradient_")
    def _(
        logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
    ) -> Tensor:
        together("cross_entropy_gradient_", logits, labels, scale)
        return like(labels)

    if _CUDA:

        @register("scale_")
        def _(x: Tensor, by: Tensor) -> None:
            together("scale_", x, by)


if HERE:
    _register_shapes()
