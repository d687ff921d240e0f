"""The functions as layers: each `forward` has the parameters of what it takes the place of in transformers."""

from __future__ import annotations

from types import MethodType
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
    not the plain projection that is read here or the loss is another one, the forward of the model's class runs. Where
    only the last token's logits are asked for, as `generate` does of a prompt, and `model` runs a kernel that says how to
    compute no more than they need, that is asked first; all that is returned is as it was.
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
        if labels is None and type(logits_to_keep) is int and logits_to_keep == 1:
            found = _of_last_token(self, inputs, kwargs)
            if found is not None:
                return found
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
        ).float()  # which the original's is whatever the model's dtype
        found = CausalLMOutputWithPast(
            loss=loss if items is None else loss / _divisor(items, loss),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


def _of_last_token(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """What the model gives with the logits of the last token; None where its decoder is to compute all, and in decoding."""
    of = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
    if not isinstance(of, Tensor) or of.dim() < 2 or of.shape[1] == 1:
        return None
    last_token = _last_token(model.model)
    if last_token is None:
        return None
    options = dict(options)
    return_dict = options.pop("return_dict", None)
    if not (model.config.return_dict if return_dict is None else return_dict):
        return None
    outputs = last_token(model.model, **inputs, **options)
    if outputs is None:
        return None
    from transformers.modeling_outputs import CausalLMOutputWithPast  # here, where such a model is

    logits = model.lm_head(outputs.last_hidden_state[:, -1:])
    return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


def _last_token(decoder: nn.Module) -> Any:
    """How the decoder's kernel computes what the last token comes out as, if it says so and calling it would do no more.

    It is called past the module, with the arguments of its forward, and returns None where it cannot (`CausalDecoder`).
    """
    forward = decoder.__dict__.get("forward")
    if type(forward) is not MethodType or forward.__self__ is not decoder:
        return None
    if _is_listened_to(decoder) or decoder._compiled_call_impl is not None:
        return None
    function = forward.__func__
    # Not of one that somebody wrapped: it has what it wraps has.
    return None if hasattr(function, "__wrapped__") else getattr(function, "last_token", None)


def _is_listened_to(module: nn.Module) -> bool:
    """Whether it has hooks, or all modules have."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._has_any_global_hook()
    )


def _keeps_all(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _is_plain(head: nn.Module) -> bool:
    """Whether `head(x)` is nothing but `F.linear(x, head.weight, head.bias)`: no adapter, hook, or sharded weight."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in compiled.PLAIN
        and "forward" not in head.__dict__
        and not _is_listened_to(head)
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
