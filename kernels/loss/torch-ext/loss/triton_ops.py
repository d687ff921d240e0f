"""The ops of `compiled.py` as Triton kernels, registered when this module is imported, which needs Triton.

Nothing is tuned: the classes that a program has at a time are fixed by their number. A label that is no class gives NaN.
"""

# Without postponed annotations: PyTorch reads the ops' schemas from them.
# ruff: noqa: ARG005  (what the ops are given and what decides on the shapes is not the same)

from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from ._ops import add_op_namespace_prefix, ops
from .triton_here import launch, register

__all__ = ["probe"]


def _rows(x: Tensor) -> tuple[Tensor, Any]:
    """x as rows whose elements lie side by side, and the elements from one row to the next; a copy where there is no other way."""
    n = x.shape[-1]
    if x.is_contiguous():
        return x, n
    flat = x.reshape(-1, n)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _options(n: Any, most: int) -> dict[str, int]:
    """A block of classes, 16 to a thread. On H200, 8192 rows of 128256 bfloat16 take 588 us in blocks of 4096, 737 of 8192."""
    block = min(max(1 << (int(n) - 1).bit_length(), 512), most)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def _new(labels: Tensor) -> Tensor:
    return torch.empty(labels.shape, dtype=torch.float32, device=labels.device)


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    losses, rows, n = _new(labels), labels.numel(), logits.shape[-1]
    sums = torch.empty(2 * rows, dtype=torch.float32, device=labels.device)
    if rows > 0:
        x, stride = _rows(logits)
        launch(
            kernels.losses, rows, x, x, labels.contiguous(), losses, sums, x, n, stride, ignore_index, label_smoothing,
            z_loss, WITH_GRADIENT=False, SMOOTHS=label_smoothing != 0.0, **_options(n, 4096),
        )  # fmt: skip
    return losses, sums


def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    made = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, n = labels.numel(), logits.shape[-1]
    if rows > 0:
        x, stride = _rows(logits)
        options = _options(n, 2048)
        launch(
            kernels.gradients, rows * ((n + options["BLOCK"] - 1) // options["BLOCK"]), x, x, labels.contiguous(), sums,
            grad.contiguous(), made, n, stride, ignore_index, label_smoothing, z_loss, **options,
        )  # fmt: skip
    return made


def cross_entropy_gradient_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    if not logits.is_contiguous():
        raise RuntimeError("cross_entropy_gradient_: the logits, which are written to, are not contiguous")
    losses, rows, n = _new(labels), labels.numel(), logits.shape[-1]
    if rows > 0:
        launch(
            kernels.losses, rows, logits, logits, labels.contiguous(), losses, labels, scale.contiguous(), n, n, ignore_index,
            label_smoothing, z_loss, WITH_GRADIENT=True, SMOOTHS=label_smoothing != 0.0, **_options(n, 4096),
        )  # fmt: skip
    return losses


def probe(device: torch.device) -> None:
    """Compile and run the smallest loss."""
    logits = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
    cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device), -100, 0.0, 0.0)
    torch.get_device_module(device).synchronize(device)


def _like(labels: Tensor) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.float32)


# What the ops return, for `torch.compile` and export.
_SHAPES = {
    cross_entropy: lambda logits, labels, *_: (
        _like(labels),
        labels.new_empty((2 * labels.numel(),), dtype=torch.float32),
    ),
    cross_entropy_backward: lambda grad, logits, *_: logits.new_empty(logits.shape),
    cross_entropy_gradient_: lambda logits, labels, *_: _like(labels),
}

for _function, _shapes in _SHAPES.items():
    _name = f"triton_{_function.__name__}"
    if not hasattr(ops, _name):  # it is there where this build was imported before, from another place
        _mutated = ("logits",) if _function is cross_entropy_gradient_ else ()
        torch.library.triton_op(add_op_namespace_prefix(_name), _function, mutates_args=_mutated).register_fake(_shapes)
    register(_function.__name__, getattr(ops, _name).default, _function)
