"""The layers: one for two modules that stand one after another, with its layout, and one for a whole decoder layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import compiled, hopper
from .attention import KINDS, Kind, added, attention, has_plain_parts, kind_of
from .functions import (
    FORMS,
    FORMULAS,
    PRODUCTS,
    activation,
    add_gated_mlp,
    gated_mlp_as_one,
    may_be_one,
    norm,
    rms_norm_and_input,
    rms_norm_gated_mlp,
)
from .gated import gated_mlp
from .model import CausalDecoder
from .plain import asked, first_of, forwards, home, linears, mark_of, marked_as, marks, runs, takes

__all__ = [
    "CausalDecoder",
    "DecoderLayer",
    "GatedFeedForward",
    "GatedMLP",
    "NormedRotaryAttention",
    "PackedGatedMLP",
    "RMSNormGatedMLP",
    "RotaryAttention",
    "WindowedRotaryAttention",
]


# The kernels' forwards that compute what the modules' own do: a module that runs one of them may be passed by.
_NORMS = forwards(*(getattr(norm.layers, name).forward for name in FORMS))
_ACTIVATIONS = forwards(*(getattr(activation.layers, name).forward for name in ("SiLU", "GeLU", "GeluTanh", "NewGELU")))
# Whose classes are meant by the names in PRODUCTS.
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


class GatedMLP(nn.Module):
    """Reads `act_fn`, and calls `gate_proj`, `up_proj` and `down_proj`: `down(f(gate(x)) * up(x))`.

    With gradients, of plain linear layers, it reads their weights and has a backward of its own: see `gated.py`.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        product = _product(self.act_fn)
        if product is None:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        if torch.is_grad_enabled():
            weights = linears(self, "gate_proj", "up_proj", "down_proj")
            if weights is not None and takes(x, weights):
                return gated_mlp(x, weights, product)
        elif may_be_one(x):
            weights = linears(self, "gate_proj", "up_proj", "down_proj")
            made = None if weights is None else gated_mlp_as_one(x, weights, product)
            if made is not None:
                return made
        return self.down_proj(PRODUCTS[product](self.gate_proj(x), self.up_proj(x)))


class PackedGatedMLP(nn.Module):
    """Reads `activation_fn`, and calls `gate_up_proj`, whose result is gate and up side by side, and `down_proj`.

    With gradients, of plain linear layers, as `GatedMLP`.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        product = _product(self.activation_fn)
        if product is None:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))
        if torch.is_grad_enabled():
            weights = linears(self, "gate_up_proj", None, "down_proj")
            if weights is not None and takes(hidden_states, weights):
                return gated_mlp(hidden_states, weights, product)
        elif may_be_one(hidden_states):
            weights = linears(self, "gate_up_proj", None, "down_proj")
            made = None if weights is None else gated_mlp_as_one(hidden_states, weights, product)
            if made is not None:
                return made
        return self.down_proj(PRODUCTS[product](self.gate_up_proj(hidden_states)))


class GatedFeedForward(nn.Module):
    """As T5 has it. Reads `act`, and calls `wi_0`, `wi_1`, `dropout` and `wo`, in the dtype of `wo` where that is another.

    With gradients, of plain linear layers and without a dropout, as `GatedMLP`.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        product = _product(self.act)
        if product is not None and torch.is_grad_enabled() and _keeps_all(self.dropout):
            weights = linears(self, "wi_0", "wi_1", "wo")
            if weights is not None and takes(hidden_states, weights):
                return gated_mlp(hidden_states, weights, product)
        if product is None:
            inner = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            inner = PRODUCTS[product](self.wi_0(hidden_states), self.wi_1(hidden_states))
        inner = self.dropout(inner)
        weight = getattr(self.wo, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype not in (inner.dtype, torch.int8):
            inner = inner.to(weight.dtype)
        return self.wo(inner)


class RMSNormGatedMLP(nn.Module):
    """An RMS norm, and `down(f(gate(x)) * up(x))` of what it gives. Reads the modules' weights when it is called.

    Where somebody listens to the MLP's projections, or put others in their place, they are called.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        # By the tables of the modules: each attribute that is none of an instance's own costs a third of a microsecond.
        norm, mlp = self.parts
        weights = linears(mlp, "gate_proj", "up_proj", "down_proj")
        weight, eps = norm._parameters["weight"], _epsilon(norm)
        if weights is None or _product(mlp._modules["act_fn"]) != self.product:
            return type(mlp).forward(mlp, FORMULAS[self.formula](hidden_states, weight, eps))
        return rms_norm_gated_mlp(hidden_states, weight, eps, weights, self.formula, self.product)


class RMSNormGatedMLPLayout(nn.Module):
    """The two modules, and which formulas theirs are. The norm's is told by the name that its class is marked with."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.parts = (norm, mlp)  # no submodules: an attribute that is quick to read
        for part in self.parts:
            kind: Any = type(part)
            if hasattr(kind, "kernel_layer_name") and marked_as(kind) is None:
                raise TypeError(f"{kind.__name__} has another forward than the one marked as {kind.kernel_layer_name}")
        self.formula = marked_as(type(norm))
        missing = [name for name in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(mlp, name)]
        if missing:
            raise TypeError(f"{type(mlp).__name__} has no {', '.join(missing)}, which the kernel reads")
        for name in ("gate_proj", "up_proj", "down_proj"):
            if set(getattr(mlp, name)._parameters) != {"weight", "bias"}:
                raise TypeError(f"{name} is a {type(getattr(mlp, name)).__name__}; expected a plain nn.Linear")
        self.product = type(mlp.act_fn).__name__
        if self.formula not in FORMULAS:
            known = ", ".join(FORMULAS)
            raise TypeError(f"{type(norm).__name__} is marked as {self.formula}; expected one of {known}")
        if not _is_known(type(mlp.act_fn)):
            raise TypeError(f"the activation is {self.product}; expected one of {', '.join(PRODUCTS)}")


def _attention_of(kind: Kind) -> Any:
    """The forward of an attention's layer."""

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return attention(self, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs, kind)

    forward.runs_original_on = ("cpu",)
    return forward


class RotaryAttention(nn.Module):
    """As Llama has it: `o_proj` of the attention of q and k, turned, and v.

    With gradients, on a GPU and of plain linear layers, it reads the weights of `q_proj`, `k_proj` and `v_proj`, and has a
    backward of its own: see `attention.py`; where there is an op for the three products and the rotary embedding, without gradients
    too. Anything else the forward of the class computes.
    """

    can_torch_compile = True
    has_backward = True
    forward = _attention_of(KINDS["RotaryAttention"])


class WindowedRotaryAttention(nn.Module):
    """As Mistral and Qwen2 have it: `RotaryAttention` with a window, the layer's own or the configuration's."""

    can_torch_compile = True
    has_backward = True
    forward = _attention_of(KINDS["WindowedRotaryAttention"])


class NormedRotaryAttention(nn.Module):
    """As Qwen3 has it: `WindowedRotaryAttention` with norms of each head of q and k, `q_norm` and `k_norm`, which it calls.

    There is no op for its projections: it has the backward, and a decoder layer the op that adds its last product.
    """

    can_torch_compile = True
    has_backward = True
    forward = _attention_of(KINDS["NormedRotaryAttention"])


_ATTENTION_FORWARDS = forwards(RotaryAttention.forward, WindowedRotaryAttention.forward, NormedRotaryAttention.forward)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after an RMS norm and with a residual add; the add after the attention is one with the norm.

    Reads `post_attention_layernorm` (an RMS norm as Llama has it) and the projections of a gated `mlp`, and calls
    `input_layernorm`, `self_attn` and any other `mlp`. Where an op adds a product to the residual, it reads the projections
    of a `self_attn` that is one of the attentions above, too, and that op is the add.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        parts = self._modules
        normed, residual = _norm_and_input(parts["input_layernorm"], hidden_states)
        made = None
        if position_embeddings is not None and hopper.may_take_rows(normed):
            options = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}
            made = _added(
                parts["self_attn"], normed, residual, position_embeddings, attention_mask, past_key_values, options
            )
        attended, is_sum = made or (None, False)
        if attended is None:
            attended, _ = parts["self_attn"](
                hidden_states=normed,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        between, mlp = parts["post_attention_layernorm"], parts["mlp"]
        product = _gated(mlp)
        weights = None if product is None else linears(mlp, "gate_proj", "up_proj", "down_proj")
        weight = between._parameters.get("weight") if _is_llamas(between) else None
        if is_sum or weight is None:
            residual = attended if is_sum else residual + attended
            normed, residual = _norm_and_input(between, residual)
        else:
            eps = _epsilon(between)
            if weights is not None and compiled.takes(attended, weights, product, weight, residual):
                return compiled.gated_mlp(attended, weights, product, residual, weight, eps)
            normed, residual = norm.add_rms_norm(attended, residual, weight, eps)
        if product is None or weights is None:
            return residual + mlp(normed)
        return add_gated_mlp(normed, residual, weights, product, ours=weight is not None)


_DECODER_LAYER, _MLP, _NONE = forwards(DecoderLayer.forward), forwards(GatedMLP.forward), forwards()
_LAYER_MARK, _MLP_MARK, _NORM_MARKS = marks("DecoderLayer"), marks("GatedMLP"), marks(*FORMS)


def computes_each_token(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether in the layer and in the norm after it a token's result depends on others by the attention alone, and nobody listens.

    That is a layer as `DecoderLayer` has it, of parts that run their class's forward or ours, outside of training.
    """
    if layer.training or mark_of(layer, _LAYER_MARK) is None or not runs(layer, _DECODER_LAYER):
        return False
    parts = layer._modules
    attention, mlp = parts.get("self_attn"), parts.get("mlp")
    norms = parts.get("input_layernorm"), parts.get("post_attention_layernorm"), norm
    if attention is None or attention.training or mlp is None or not all(map(_is_norm, norms)):
        return False
    kind = kind_of(attention)
    if kind is None or (kind.normed and not all(map(_is_norm, map(attention._modules.get, ("q_norm", "k_norm"))))):
        return False
    return (
        runs(attention, _ATTENTION_FORWARDS)
        and has_plain_parts(attention)
        and _gated(mlp) is not None
        and linears(mlp, "gate_proj", "up_proj", "down_proj") is not None
    )


def _is_norm(module: nn.Module | None) -> bool:
    """Whether it is an RMS norm of a formula that is known, by its mark, that nobody listens to."""
    return module is not None and mark_of(module, _NORM_MARKS) is not None and runs(module, _NORMS)


def _is_llamas(module: nn.Module) -> bool:
    """Whether it is an RMS norm of Llama's formula, by its mark, that nobody listens to; any other is to be called."""
    return mark_of(module, _NORM_MARKS) == "RMSNorm" and runs(module, _NORMS)


def _added(
    module: nn.Module,
    normed: Tensor,
    residual: Tensor,
    tables: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> tuple[Tensor, bool] | None:
    """What the attention gives, and whether the residual is in it; None where it is to be called as a module.

    Where there is an op that adds a product, for an attention of ours that nobody listens to.
    """
    kind = kind_of(module)
    if kind is None or not runs(module, _ATTENTION_FORWARDS):
        return None
    return added(module, normed, residual, tables, mask, cache, options, kind)


def _norm_and_input(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the module gives for x, and x; an RMS norm whose ops take x also takes the gradient that comes to x itself."""
    mark = mark_of(module, _NORM_MARKS)
    if mark is not None and torch.is_grad_enabled() and x.requires_grad and runs(module, _NORMS):
        weight = module._parameters.get("weight")
        if weight is not None and norm.compiled.takes(x, weight):
            return rms_norm_and_input(x, weight, _epsilon(module), FORMS[mark])
    return module(x), x


def _product(activation: nn.Module) -> str | None:
    """By which name the product of that activation is known; None where the activation is to be called."""
    name = first_of(activation, _PRODUCTS) if is_dynamo_compiling() else _known_name(activation)
    if name is None or not runs(activation, _ACTIVATIONS):
        return None
    # It may have been asked for the formula in Python, which rounds at other places.
    return None if name == "GELUActivation" and activation.__dict__.get("act") is not F.gelu else name


def _known_name(activation: nn.Module) -> str | None:
    kind = type(activation)
    return kind.__name__ if _is_known(kind) else None


def _is_known(kind: type[nn.Module]) -> bool:
    """Whether it is an activation of those names, by its forward too, and not somebody's class of the same name."""
    return kind.__name__ in PRODUCTS and home(kind.forward) in _ACTIVATION_MODULES


_PRODUCTS = {name: asked(lambda module, name=name: _known_name(module) == name) for name in PRODUCTS}


def _gated(mlp: nn.Module) -> str | None:
    """The product of a gated MLP, by its mark, that nobody listens to; None for any other, which is to be called."""
    if mark_of(mlp, _MLP_MARK) is None or not runs(mlp, _MLP):
        return None
    activation = mlp._modules.get("act_fn")
    return None if activation is None else _product(activation)


def _keeps_all(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and (dropout.p == 0.0 or not dropout.training) and runs(dropout, _NONE)


def _epsilon(module: nn.Module) -> float:
    held = module.__dict__  # to ask a module for what it does not have costs microseconds
    for name in ("variance_epsilon", "eps"):
        if name in held:
            return held[name]
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps  # a layout's view of one
