"""Losses and their gradients in PyTorch, some rows at a time: the float32 copies of the others' logits are never there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "formula", "gradient_", "losses", "wide", "wide_dtype"]

# Logits of which there are float32 copies at a time: 4 MiB on a CPU, which stay in its cache, and 64 MiB elsewhere, which
# are enough to keep a GPU busy (a part of 8192 rows of 128256 classes is then 130 rows).
_ON_CPU = 1 << 20
_ELSEWHERE = 1 << 24


def formula(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    """The losses, (...), in PyTorch's own operations on all logits, (..., classes), at once."""
    x, y = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    x = wide(x)
    found = F.cross_entropy(x, y, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        found = found + torch.where(y != ignore_index, z_loss * torch.logsumexp(x, -1).square(), 0.0)
    return found.reshape(labels.shape)


def losses(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> Tensor:
    """The losses, (...), in float32 or wider."""
    found = logits.new_empty(labels.shape, dtype=wide_dtype(logits))
    for x, y, loss in _parts(logits, labels, found):
        loss.copy_(formula(x, y, ignore_index, label_smoothing, z_loss))
    return found


def backward(
    grad: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The gradient of sum(grad * losses): (..., classes), in the logits' dtype."""
    found = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for x, y, scale, out in _parts(logits, labels, grad, found):
        _gradient(x, y, scale, ignore_index, label_smoothing, z_loss, out)
    return found


def gradient_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The losses of (rows, classes); the logits become the gradient of sum(scale * losses)."""
    found = logits.new_empty(labels.shape, dtype=wide_dtype(logits))
    for x, y, weight, loss in _parts(logits, labels, scale, found):
        loss.copy_(formula(x, y, ignore_index, label_smoothing, z_loss))
        _gradient(x, y, weight, ignore_index, label_smoothing, z_loss, x)
    return found


def wide(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: float32, or float64 where x is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed in for x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _gradient(
    x: Tensor, y: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, out: Tensor
) -> None:
    """Into `out`, which may be x: of each row, scale * (softmax(x) - (1 - smoothing) at the label - smoothing / classes)."""
    kept = y != ignore_index
    scale = torch.where(kept, scale.to(wide_dtype(x)), 0.0)[:, None]
    p = torch.softmax(x, -1, dtype=wide_dtype(x))
    if z_loss:
        p *= 1.0 + 2.0 * z_loss * torch.logsumexp(wide(x), -1, keepdim=True)
    p.scatter_add_(1, torch.where(kept, y, 0)[:, None], torch.full_like(scale, label_smoothing - 1.0))
    if label_smoothing:
        p -= label_smoothing / x.shape[-1]
    out.copy_(p.mul_(scale)).masked_fill_(~kept[:, None], 0.0)  # 0 also where an ignored row has a NaN


def _parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits, (..., classes), as (some rows, classes), and what others, (...) or (..., classes), have there.

    Views: where no single one is over all the leading dimensions, of one index after another of the first.
    """
    leading = logits.dim() - 1
    try:
        flat = [x.view(-1, *x.shape[leading:]) for x in (logits, *others)]
    except RuntimeError:
        for together in zip(logits, *others, strict=True):
            yield from _parts(*together)
        return
    if logits.numel() == 0:
        return
    most = _ON_CPU if logits.device.type == "cpu" else _ELSEWHERE
    rows = max(1, most // logits.shape[-1])
    yield from zip(*(x.split(rows) for x in flat), strict=True)
