"""A causal decoder of which only the last token's result is asked for: that is all its last layer computes.

Of the other tokens the last layer owes the keys and values, for the last token's attention and for the cache, and nothing
else: no queries, no product after the attention, no MLP. As when a token is decoded, with a cache that knows those before it.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .attention import keys_and_values
from .layers import computes_each_token
from .model import CausalDecoder, begin, is_plain, is_short, through
from .plain import PLAIN

__all__ = ["last_token"]


def last_token(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """What the forward of a causal decoder gives, its `last_hidden_state` that of the last token: (batch, 1, hidden).

    The cache is as after that forward. Where the last layer is not one as `DecoderLayer` and the attentions have it,
    with norms that are known, or somebody listens to a part of it or to the norm after it, that state is of all tokens. None, and nothing was computed or
    changed, where it cannot be had like this: with gradients, in training, for one token, where a mask is needed, with a cache
    that has tokens, is no `DynamicCache` or comes with `use_cache=False`, and where more than the last hidden state is asked for.

    A mask of the caller's, and positions, are read: a GPU is waited for once. Where that cannot be, under torch.compile and
    in a CUDA graph, it is None.
    """
    if torch.is_grad_enabled() or model.training:
        return None
    config = model.config
    layers = list(islice(model.layers, config.num_hidden_layers))
    if not (layers and is_plain(model, kwargs) and is_short(config, input_ids, inputs_embeds)):
        return None
    caches = getattr(config, "use_cache", False) if use_cache is None else use_cache
    of: Any = input_ids if inputs_embeds is None else inputs_embeds
    batch, tokens = of.shape[:2]
    if (
        tokens < 2
        or type(of) not in PLAIN
        or of.is_meta
        or (past_key_values is not None and not caches)  # some classes fill it then and do not return it, others do
        or not _is_empty(past_key_values, tokens)
        or not _say_nothing(attention_mask, position_ids, batch, tokens)
    ):
        return None
    from transformers.cache_utils import DynamicCache  # here, where such a model is
    from transformers.modeling_outputs import BaseModelOutputWithPast

    cache = DynamicCache(config=config) if caches and past_key_values is None else past_key_values
    hidden, positions, tables = begin(model, input_ids, inputs_embeds, position_ids)
    kwargs.pop("return_dict", None)
    hidden = through(layers[:-1], hidden, positions, tables, cache, caches, kwargs)

    last: Any = layers[-1]
    alone = (  # asked here, while a GPU is at work
        computes_each_token(last, model.norm)
        and _are_plain(last, model.norm)
        and not _knows_tokens(cache, last.self_attn.layer_idx)
    )
    if not alone:
        hidden = through((last,), hidden, positions, tables, cache, caches, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)
    keys, values = keys_and_values(last.self_attn, last.input_layernorm(hidden), tables)
    if cache is not None:
        keys, values = cache.update(keys, values, last.self_attn.layer_idx)
    cos, sin = tables
    hidden = through(
        (last,),
        hidden[:, -1:].contiguous(),
        positions[:, -1:],
        (cos[:, -1:], sin[:, -1:]),
        _Known(keys, values),
        caches,
        kwargs,
    )
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)


# Who wants it finds it on the forward that the model runs: kernels do not import one another's layers.
CausalDecoder.forward.last_token = last_token


class _Known:
    """What the layer asks as a cache: it knows all keys and values, those of the token that it is asked with among them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def _are_plain(*modules: nn.Module) -> bool:
    """Whether the weights are plain tensors: a product of quantised ones may scale the input by the largest of all tokens."""
    return all(type(of) in PLAIN for module in modules for of in module.parameters())


def _knows_tokens(cache: Any, at: int) -> bool:
    """Whether the cache has tokens of that layer by now: those of another layer with the same number."""
    return cache is not None and at < len(cache.layers) and cache.layers[at].is_initialized


def _is_empty(cache: Any, tokens: int) -> bool:
    """Whether there is no cache, or one that holds nothing, and will give back all keys and values of so many tokens."""
    if cache is None:
        return True
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if cache.layer_class_to_replicate not in (None, DynamicLayer):
        return False
    for layer in cache.layers:
        if layer.is_initialized:
            return False
        if type(layer) is not DynamicLayer and not (
            type(layer) is DynamicSlidingWindowLayer and tokens < layer.sliding_window
        ):
            return False
    return True


def _say_nothing(mask: Any, positions: Any, batch: int, tokens: int) -> bool:
    """Whether each token is one, attends to all before it, and is where it stands. Waits for a GPU, unless both are None."""
    if mask is None and positions is None:
        return True
    if torch.compiler.is_compiling():  # what is read would have to be known before the program is
        return False
    if torch._C._are_functorch_transforms_active() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    ):
        return False
    facts = []
    if mask is not None:
        if type(mask) is not Tensor or mask.shape != (batch, tokens):
            return False
        facts.append(mask == 1)
    if positions is not None:
        if type(positions) is not Tensor or positions.shape not in ((1, tokens), (batch, tokens)):
            return False
        facts.append(positions == torch.arange(tokens, device=positions.device))
    device = facts[-1].device
    return bool(torch.stack([fact.all().to(device) for fact in facts]).all())
