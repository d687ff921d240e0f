"""The functions as layers: each `forward` has the parameters of what it takes the place of in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from . import compiled, functions

__all__ = ["ForCausalLMLoss", "FusedForCausalLM"]


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


class FusedForCausalLM(nn.Module):
    """A causal language model whose projection and loss are one: in training with labels it returns no logits.

    Reads `model`, `lm_head` and `config`. Without labels, in `eval()`, for some of the logits only, and where `lm_head` is
    not the plain projection that is read here or the loss is another one, the forward of the model's class runs.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if (
            labels is None
            or not self.training
            or not _keeps_all(logits_to_keep)
            or not _is_plain(self.lm_head)
            or not _is_of_causal_models(self.loss_function)
        ):
            return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast  # here, where such a model is

        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(**inputs, **kwargs)
        hidden, head = outputs.last_hidden_state, self.lm_head
        ignore_index, items = kwargs.get("ignore_index", -100), kwargs.get("num_items_in_batch")
        targets = _targets(labels, kwargs.get("shift_labels"), ignore_index).to(hidden.device)
        loss = functions.linear_cross_entropy(
            hidden,
            head.weight,
            targets.reshape(hidden.shape[:-1]),
            head.bias,
            ignore_index=ignore_index,
            reduction="mean" if items is None else "sum",
        )
        found = CausalLMOutputWithPast(
            loss=loss if items is None else loss / _divisor(items, loss),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


def _keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _is_plain(head: nn.Module) -> bool:
    """Whether `head(x)` is nothing but `F.linear(x, head.weight, head.bias)`: no adapter, hook, or sharded weight."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in compiled.PLAIN
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and "forward" not in head.__dict__
        and not everywhere._has_any_global_hook()
    )


def _is_of_causal_models(loss: Any) -> bool:
    """Whether it is transformers' `ForCausalLMLoss`, or the kernel-aware function in its place; somebody's own is to be called."""
    from transformers.loss.loss_utils import ForCausalLMLoss as theirs  # here, where such a model is

    return loss is theirs or getattr(type(loss), "kernel_layer_name", None) == ForCausalLMLoss.__name__


def _targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """What each position is to predict: the label after it."""
    if shift_labels is not None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _divisor(num_items_in_batch: Tensor | int, loss: Tensor) -> Tensor | int:
    return num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
