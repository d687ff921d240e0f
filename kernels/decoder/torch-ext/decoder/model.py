"""A causal language model's decoder, without a mask where a call needs none."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .plain import home

__all__ = ["CausalDecoder", "begin", "is_plain", "is_short", "through"]


class CausalDecoder(nn.Module):
    """A decoder as Llama has it: embeddings, layers, norm. A call that needs no attention mask gets none.

    Without a mask, positions or a cache of the caller's, each token attends to itself and those before it, which is what
    PyTorch's attention computes without a mask (`is_causal`). The forward of transformers' classes finds out by reading
    the positions, for which a GPU is waited for; under torch.compile it cannot, and gives the attention a mask of all
    pairs, with which its fast kernels are out of reach (a layer of 4 x 2048 tokens on an H200: 592 us, without 199).

    The layers are called here, with None, and not through the class's forward with something that stands for None: that
    would pass through code of transformers' and through layers of anybody's, and a mask that one of them takes for
    another is a wrong result without an error. Where one of the conditions does not hold, the class's forward runs.

    Reads `config`, and calls `embed_tokens`, `rotary_emb`, `layers` and `norm`. Whoever needs of a call only what the last
    token comes out as finds on this forward how to get that (`last.py`).
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
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        caches = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        if not (
            attention_mask is None
            and position_ids is None
            and past_key_values is None
            and is_plain(self, kwargs)
            and is_short(self.config, input_ids, inputs_embeds)
            # The class's forward says that it does not do both.
            and not (caches and self.training and getattr(self, "gradient_checkpointing", False))
        ):
            return type(self).forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        from transformers.cache_utils import DynamicCache  # here, where such a model is
        from transformers.modeling_outputs import BaseModelOutputWithPast

        cache = DynamicCache(config=self.config) if caches else None
        hidden, positions, tables = begin(self, input_ids, inputs_embeds)
        kwargs.pop("return_dict", None)
        layers = islice(self.layers, self.config.num_hidden_layers)
        hidden = through(layers, hidden, positions, tables, cache, caches, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=cache)

    # What is on the children (hooks, adapters, weights that are not plain) is no reason against this kernel.
    forward.calls_children = True


def begin(
    model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What the first layer is given: (batch, tokens, hidden), the positions, those of whole inputs if None, and cos and sin of them."""
    hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if positions is None:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    return hidden, positions, model.rotary_emb(hidden, position_ids=positions)


def through(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    cache: Any,
    caches: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    """What comes out of the layers, one after another, without a mask: (batch, tokens, hidden)."""
    for layer in layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=caches,
            position_embeddings=tables,
            **kwargs,
        )
    return hidden


# Keywords that the model passes on to its layers, and that say nothing of the mask or of what is returned.
_PASSED_ON = frozenset({"ignore_index", "num_items_in_batch", "shift_labels"})
_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


def is_plain(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the model is a causal one with PyTorch's attention, and nothing but its last hidden state is asked for."""
    config: Any = model.config
    if config._attn_implementation != "sdpa" or getattr(config, "is_causal", None) is not None:
        return False
    if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False:
        return False
    # Hooks that record what layers return know by what the class's forward sets up whose turn it is.
    if "_output_capturing_hooks_installed" in model.__dict__:
        return False
    if any(kwargs.get(name, getattr(config, name, False)) for name in _RECORDED):
        return False
    for name in kwargs:
        if name not in _PASSED_ON and name not in _RECORDED and name != "return_dict":
            return False
    return not _is_exported() and _has_its_mask() and _calls_transformers_own(type(model))


def is_short(config: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> bool:
    """Whether there is one input, of tokens that all lie within the attention's window, if it has one."""
    if (input_ids is None) is (inputs_embeds is None):
        return False
    tokens, dimensions = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if not isinstance(tokens, Tensor) or tokens.dim() != dimensions:
        return False
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        return False
    # Some classes (Mistral's) take the window for every layer, whatever its kind is said to be.
    return window is None or bool(tokens.shape[1] < window)


def _is_exported() -> bool:
    """Whether the call becomes a program for other lengths and other masks, which transformers sees to.

    Within a frame of torch.compile's some releases of PyTorch say that of every call.
    """
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling())


# What the class's forward calls, and this one stands for.
_CALLED = ("create_causal_mask", "create_sliding_window_causal_mask", "DynamicCache", "BaseModelOutputWithPast")


def _calls_transformers_own(cls: type[nn.Module]) -> bool:
    """Whether these names are transformers' in the module of the class's forward, and not somebody's who wants to be called."""
    scope = inspect.unwrap(cls.forward).__globals__
    return all(_is_transformers(scope[name]) for name in _CALLED if name in scope)


# What `torch.compiler.assume_constant_result` does, which imports dynamo: 1 s.
_calls_transformers_own._dynamo_marked_constant = True


def _is_transformers(found: Any) -> bool:
    """Whether a class or function is, and whoever wrapped it, too."""
    return (found.__module__ if isinstance(found, type) else home(found)).startswith("transformers.") and (
        not hasattr(found, "__wrapped__") or _is_transformers(found.__wrapped__)
    )


def _has_its_mask() -> bool:
    """Whether the mask of PyTorch's attention is what transformers has for it, and nobody's own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
