"""The functions as layers: each `forward` has the parameters of what it takes the place of in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functions

__all__ = ["ForCausalLMLoss"]


class ForCausalLMLoss(nn.Module):
    """The loss of transformers' causal language models: that of the next token, over all but the last."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002 - what models pass on to it and it has no use for
    ) -> Tensor:
        if logits.dtype is torch.float64:
            logits = logits.float()  # as the original does
        if logits.shape[-1] != vocab_size:
            logits = logits.reshape(-1, vocab_size)
        targets = _targets(labels, shift_labels, ignore_index).to(logits.device).reshape(logits.shape[:-1])
        if num_items_in_batch is None:
            return functions.cross_entropy(logits, targets, ignore_index=ignore_index)
        total = functions.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return total / _divisor(num_items_in_batch, total)


def _targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """What each position is to predict: the label after it."""
    if shift_labels is not None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _divisor(num_items_in_batch: Tensor | int, loss: Tensor) -> Tensor | int:
    return num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
