"""The ops of `compiled.py` and `tables.py` as Triton kernels, registered when this module is imported, which needs Triton.

Nothing is tuned: how many heads a program has is fixed by their width.
"""

# Without postponed annotations: PyTorch reads the op's schema from them.

from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from ._ops import add_op_namespace_prefix, ops
from .triton_here import launch, register

__all__ = ["probe"]

_TOGETHER = 1024  # pairs to a program, but for heads that have more


def _dense(x: Tensor) -> Tensor:
    """x, if its innermost elements lie side by side, else a copy in which they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """As x, without values: contiguous, or with its two middle dimensions the other way round in memory, as x has them."""
    if x.stride(-3) < x.stride(-2):
        return x.new_empty((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1])).transpose(-3, -2)
    return x.new_empty(x.shape)


def _strides(x: Tensor, *dims: int) -> tuple[Any, ...]:
    """Of these dimensions; 0 where there is no such one, or but one element along it."""
    return tuple(0 if dim < 0 or x.shape[dim] == 1 else x.stride(dim) for dim in dims)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, rotary_dim: int, form: int
) -> tuple[Tensor, Tensor]:
    found = _like(q), _like(k)
    first = q.dim() - 3
    tokens_dim = 2 * first + 1 - heads_dim
    batches, tokens = (q.shape[0] if first else 1), q.shape[tokens_dim]
    if batches * tokens == 0 or q.numel() + k.numel() == 0:
        return found
    q, k, cos, sin = (_dense(x) for x in (q, k, cos, sin))
    pairs = 1 << max(rotary_dim // 2 - 1, 0).bit_length()
    q_heads, k_heads = q.shape[heads_dim], k.shape[heads_dim]
    together = min(max(_TOGETHER // pairs, 1), 16)
    programs = batches * tokens * ((q_heads + together - 1) // together + (k_heads + together - 1) // together)
    places = [stride for x in (q, k, *found) for stride in _strides(x, first - 1, heads_dim, tokens_dim)]
    tables = [stride for x in (cos, sin) for stride in _strides(x, first - 1, first)]
    launch(
        kernels.rotate, programs, q, q, k, cos, sin, *found, tokens, rotary_dim, q_heads, k_heads,
        q.shape[-1], k.shape[-1], *places, *tables, 1.0,
        INTERLEAVED=form & 1 != 0, INVERSE=form & 2 != 0, TRANSPOSED=form & 4 != 0, ROUNDS=form & 8 == 0,  # as in compiled.py
        PAIRED=cos.shape[-1] != rotary_dim, BLOCK_H=together, BLOCK_P=pairs, num_warps=4,
    )  # fmt: skip
    return found


_RESULTS = (torch.float32, torch.bfloat16, torch.float16)  # by number, as in tables.py


def _new_tables(inv_freq: Tensor, positions: Tensor, dtype: int, layout: int) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, inv_freq.shape[0] * (1 if layout == 2 else 2))
    return positions.new_empty(shape, dtype=_RESULTS[dtype]), positions.new_empty(shape, dtype=_RESULTS[dtype])


def tables(inv_freq: Tensor, positions: Tensor, scale: float, dtype: int, layout: int) -> tuple[Tensor, Tensor]:
    found = _new_tables(inv_freq, positions, dtype, layout)
    (batches, tokens), pairs = positions.shape, inv_freq.shape[0]
    rows = batches * tokens
    if rows == 0 or pairs == 0:
        return found
    across = min(1 << max(pairs - 1, 0).bit_length(), _TOGETHER)
    together = 1 if tokens == 1 else max(256 // across, 1)
    programs = (rows + together - 1) // together * ((pairs + across - 1) // across)
    launch(
        kernels.tables, programs, positions, inv_freq, positions, *found, rows, tokens, pairs, inv_freq.stride(0),
        *positions.stride(), float(scale), LAYOUT=layout, BLOCK_R=together, BLOCK_P=across, num_warps=4,
    )  # fmt: skip
    return found


def probe(device: torch.device) -> None:
    """Compile and run the smallest rotation, and the smallest tables."""
    x = torch.ones(1, 1, 16, dtype=torch.bfloat16, device=device)
    rotate(x, x, x[0], x[0], 0, 16, 0)
    tables(x[0, 0], torch.ones(1, 1, dtype=torch.int64, device=device), 1.0, 1, 0)
    torch.get_device_module(device).synchronize(device)


if not hasattr(ops, "triton_rotate"):  # it is there where this build was imported before, from another place
    torch.library.triton_op(add_op_namespace_prefix("triton_rotate"), rotate, mutates_args=()).register_fake(
        lambda q, k, *_: (_like(q), _like(k))
    )
    torch.library.triton_op(add_op_namespace_prefix("triton_tables"), tables, mutates_args=()).register_fake(
        lambda inv_freq, positions, _scale, dtype, layout: _new_tables(inv_freq, positions, dtype, layout)
    )
register("rotate", ops.triton_rotate.default, rotate)
register("tables", ops.triton_tables.default, tables)
