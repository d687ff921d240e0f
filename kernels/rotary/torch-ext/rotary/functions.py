"""Rotary position embeddings, rounded where the models' own code rounds.

Any strides, and float16, bfloat16, float32 or float64. What the compiled op takes, where the build has it, it computes;
all else is plain PyTorch, as are gradients of cos and sin, vmap and forward-mode AD. Operands on several devices are
RuntimeErrors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled

__all__ = ["apply_rotary"]

_WIDE = (torch.float32, torch.float64)


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    rotary_dim: int | None = None,
    round_once: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn pairs of elements of every head: `(a * cos - b * sin, b * cos + a * sin)`.

    q and k: (batch, heads, tokens, head_dim), or with `unsqueeze_dim=2` (batch, tokens, heads, head_dim); they may have
    different numbers of heads. cos and sin: (batch or 1, tokens, rotary_dim), or one element for each pair,
    (batch or 1, tokens, rotary_dim / 2). Without a batch all have a dimension less, and `unsqueeze_dim` is 0 or 1.
    Returns two tensors of q's and k's shapes, in the dtypes that they and cos promote to.

    The pairs are elements i and i + rotary_dim / 2 (Llama), or `interleaved` 2i and 2i + 1 (GPT-J, Cohere). `rotary_dim`
    is the width of cos unless given; elements of a head beyond it are passed on as they are. `inverse` turns back. Products
    are rounded as PyTorch's are; `round_once` computes in float32 and rounds the result to q's and k's dtypes.

    Raises `ValueError` for a `rotary_dim` that is odd, wider than a head, or neither cos's width nor twice that.

    >>> q, k = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 5, 64)
    >>> angles = torch.arange(5)[None, :, None] / 10 ** torch.arange(32)
    >>> turned, _ = apply_rotary(q, k, angles.cos(), angles.sin(), rotary_dim=64)
    >>> torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-4)
    True
    """
    width = cos.shape[-1]
    if rotary_dim is None:
        rotary_dim = width
    if compiled.takes(q, k, cos, sin, unsqueeze_dim, rotary_dim, round_once):
        form = interleaved * compiled.INTERLEAVED + inverse * compiled.INVERSE + round_once * compiled.ROUND_ONCE
        heads_dim = unsqueeze_dim if unsqueeze_dim >= 0 else unsqueeze_dim + q.dim()
        return compiled.rotate(q, k, cos, sin, heads_dim, rotary_dim, form)
    _check(q, k, width, rotary_dim)
    if width != rotary_dim:
        cos, sin = (_for_pairs(table, interleaved) for table in (cos, sin))
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (
        _turned(q, cos, sin, rotary_dim, interleaved, inverse, round_once),
        _turned(k, cos, sin, rotary_dim, interleaved, inverse, round_once),
    )


def _check(q: Tensor, k: Tensor, width: int, rotary_dim: int) -> None:
    narrowest = min(q.shape[-1], k.shape[-1])
    if rotary_dim % 2 or rotary_dim > narrowest:
        raise ValueError(
            f"apply_rotary: rotary_dim is {rotary_dim}; expected an even number up to the head's width, {narrowest}"
        )
    if width != rotary_dim and 2 * width != rotary_dim:
        raise ValueError(
            f"apply_rotary: cos has {width} elements for a token; expected rotary_dim, {rotary_dim}, or half as many"
        )


def _for_pairs(table: Tensor, interleaved: bool) -> Tensor:
    """(..., pairs) -> (..., 2 * pairs): each element at both places of its pair."""
    return table.repeat_interleave(2, dim=-1) if interleaved else torch.cat((table, table), dim=-1)


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, inverse: bool, round_once: bool
) -> Tensor:
    dtype = x.dtype
    passed = x[..., rotary_dim:] if rotary_dim < x.shape[-1] else None
    if passed is not None:
        x = x[..., :rotary_dim]
    if round_once:
        x, cos, sin = _wide(x), _wide(cos), _wide(sin)
    y = x * cos + _quarter_turn(x, interleaved, inverse) * sin
    if round_once:
        y = y.to(dtype)
    return y if passed is None else torch.cat((y, passed), dim=-1)


def _quarter_turn(x: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """(a, b) -> (-b, a), or the inverse (b, -a), of each pair."""
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((b, -a) if inverse else (-b, a), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((b, -a) if inverse else (-b, a), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: float32, or float64 where x is."""
    return x if x.dtype in _WIDE else x.float()
