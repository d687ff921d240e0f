"""The layer that stands in for the functions that transformers marks as `rotary_pos_emb`."""

from __future__ import annotations

from torch import Tensor, nn

from . import compiled, formulas, functions

__all__ = ["rotary_pos_emb"]


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
