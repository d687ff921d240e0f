"""The layers: one for two modules that stand one after another, with its layout, and one for a whole decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functions import FORMULAS, PRODUCTS, add_gated_mlp, norm, rms_norm_gated_mlp

__all__ = ["DecoderLayer", "GatedFeedForward", "GatedMLP", "PackedGatedMLP", "RMSNormGatedMLP"]


class GatedMLP(nn.Module):
    """Reads `act_fn`, and calls `gate_proj`, `up_proj` and `down_proj`: `down(f(gate(x)) * up(x))`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        multiply = PRODUCTS[type(self.act_fn).__name__]
        return self.down_proj(multiply(self.gate_proj(x), self.up_proj(x)))


class PackedGatedMLP(nn.Module):
    """Reads `activation_fn`, and calls `gate_up_proj`, whose result is gate and up side by side, and `down_proj`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        multiply = PRODUCTS[type(self.activation_fn).__name__]
        return self.down_proj(multiply(self.gate_up_proj(hidden_states)))


class GatedFeedForward(nn.Module):
    """As T5 has it. Reads `act`, and calls `wi_0`, `wi_1`, `dropout` and `wo`, in the dtype of `wo` where that is another."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        multiply = PRODUCTS[type(self.act).__name__]
        inner = self.dropout(multiply(self.wi_0(hidden_states), self.wi_1(hidden_states)))
        weight = getattr(self.wo, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype not in (inner.dtype, torch.int8):
            inner = inner.to(weight.dtype)
        return self.wo(inner)


class RMSNormGatedMLP(nn.Module):
    """An RMS norm, and `down(f(gate(x)) * up(x))` of what it gives. Reads the modules' weights when it is called."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        # By the tables of the modules: each attribute that is none of an instance's own costs a third of a microsecond.
        norm, mlp = self.parts
        mlp = mlp._modules
        return rms_norm_gated_mlp(
            hidden_states,
            norm._parameters["weight"],
            self.eps,
            mlp["gate_proj"],
            mlp["up_proj"],
            mlp["down_proj"],
            self.formula,
            self.product,
        )


class RMSNormGatedMLPLayout(nn.Module):
    """The two modules, and which formulas theirs are. The norm's is told by the name that its class is marked with."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.parts = (norm, mlp)  # no submodules: an attribute that is quick to read
        self.eps = _epsilon(norm)
        self.formula = getattr(type(norm), "kernel_layer_name", None)
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
        if self.product not in PRODUCTS:
            raise TypeError(f"the activation is {self.product}; expected one of {', '.join(PRODUCTS)}")


class DecoderLayer(nn.Module):
    """Attention and MLP, each after an RMS norm and with a residual add; the add after the attention is one with the norm.

    Reads `post_attention_layernorm` (an RMS norm as Llama has it) and the projections of a gated `mlp`, and calls
    `input_layernorm`, `self_attn` and any other `mlp`.
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
        attended, _ = parts["self_attn"](
            hidden_states=parts["input_layernorm"](hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        between = parts["post_attention_layernorm"]
        normed, residual = norm.add_rms_norm(attended, hidden_states, between.weight, _epsilon(between))
        mlp = parts["mlp"]
        if _plain_gated(mlp):
            inner = mlp._modules
            product = type(inner["act_fn"]).__name__
            return add_gated_mlp(normed, residual, inner["gate_proj"], inner["up_proj"], inner["down_proj"], product)
        return residual + mlp(normed)


def _plain_gated(mlp: nn.Module) -> bool:
    """Whether the MLP is a gated one, by its mark, of plain linear layers, and nobody listens to it."""
    if getattr(type(mlp), "kernel_layer_name", None) != "GatedMLP" or mlp._forward_hooks or mlp._forward_pre_hooks:
        return False
    parts = mlp._modules
    return (
        type(parts["gate_proj"]) is type(parts["up_proj"]) is type(parts["down_proj"]) is nn.Linear
        and type(parts["act_fn"]).__name__ in PRODUCTS
    )


def _epsilon(module: nn.Module) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
