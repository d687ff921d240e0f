"""The layers that stand in for the functions that transformers marks as `rotary_pos_emb`, and for the modules before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, formulas, functions, tables

__all__ = ["RotaryEmbedding", "RotaryEmbeddingByLayerType", "rotary_pos_emb"]


class RotaryEmbedding(nn.Module):
    """The tables that `rotary_pos_emb` takes. Reads `inv_freq`, `attention_scaling` and `rope_type`, at every call.

    It lays them out as the class does whose place it takes. What it does not know, frequencies that are to be computed
    anew (rope types "dynamic" and "longrope"), and tensors that are not plain or lie apart are for that class's forward.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cls = type(self)
        if isinstance(self, RotaryEmbedding):  # called for itself
            return tables.rotary_tables(self.inv_freq, position_ids, self.attention_scaling, x.dtype)
        formula = formulas.of_tables(cls)
        if formula != formulas.UNKNOWN and _is_static(self.rope_type):
            made = _made(self.inv_freq, position_ids, self.attention_scaling, x, formula)
            if made is not None:
                return made
        return cls.forward(self, x, position_ids)


class RotaryEmbeddingByLayerType(nn.Module):
    """The same where a model has several kinds of layers, with frequencies for each.

    Reads `<layer_type>_inv_freq`, `<layer_type>_attention_scaling` and `rope_type[layer_type]`.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        cls = type(self)
        formula = formulas.of_tables(cls)
        if formula != formulas.UNKNOWN and layer_type is not None and _is_static(self.rope_type[layer_type]):
            inv_freq, scale = getattr(self, f"{layer_type}_inv_freq"), getattr(self, f"{layer_type}_attention_scaling")
            made = _made(inv_freq, position_ids, scale, x, formula)
            if made is not None:
                return made
        return cls.forward(self, x, position_ids, layer_type)


def _is_static(rope_type: Any) -> bool:
    """Whether the frequencies stay as they are, whatever the positions: as transformers' decorator has it."""
    return isinstance(rope_type, str) and "dynamic" not in rope_type and rope_type != "longrope"


def _made(inv_freq: Any, positions: Tensor, scale: Any, x: Tensor, formula: int) -> tuple[Tensor, Tensor] | None:
    """The tables, if all is as the formula has it."""
    if not isinstance(scale, (float, int)) or not tables.takes(inv_freq, positions, x):
        return None
    dtype = torch.float32 if formula & formulas.IN_FLOAT32 else x.dtype
    return tables.tables(inv_freq, positions, scale, dtype, formula & ~formulas.IN_FLOAT32)


class rotary_pos_emb(nn.Module):
    """Has the formula of the function whose place it takes; what the compiled op does not take, that function computes."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cls = type(self)
        if isinstance(self, rotary_pos_emb):  # called for itself
            return functions.apply_rotary(q, k, cos, sin, unsqueeze_dim)
        formula = formulas.of(cls) if compiled.HERE else formulas.UNKNOWN
        if formula != formulas.UNKNOWN:
            width = q.shape[-1]
            form = formula & (compiled.INTERLEAVED | compiled.INVERSE | compiled.ROUND_ONCE)
            if cos.dtype is not q.dtype and formula & formulas.CAST_BACK:
                form |= compiled.ROUND_ONCE
            pairs = 2 if formula & formulas.PAIRED else 1
            whole = cos.shape[-1] * pairs == width == k.shape[-1]  # as the functions have it; the op turns parts, too
            if whole and compiled.takes(q, k, cos, sin, unsqueeze_dim, width, form & compiled.ROUND_ONCE != 0):
                heads_dim = unsqueeze_dim if unsqueeze_dim >= 0 else unsqueeze_dim + q.dim()
                return compiled.rotate(q, k, cos, sin, heads_dim, width, form)
        if formulas.is_static(cls):
            return cls.forward(q, k, cos, sin, unsqueeze_dim)
        return cls.forward(self, q, k, cos, sin, unsqueeze_dim)
