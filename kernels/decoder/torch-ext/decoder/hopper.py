"""The ops for GPUs of compute capability 9.0: products, and what becomes of them, in one pass over memory.

`gated_product` is both first products of a gated MLP and theirs, `rotary_projections` an attention's q, k and v with q and k
turned, `add_product` a product added to a residual, `added_mlp` a whole gated MLP added to one, `gated_gradients` a gated
product's gradients in the product before them. The results are the same bits as of the parts apart, up to the order in which
products are summed; but `add_product` and `added_mlp` round once where two operations round twice, and `gated_gradients` has the
activation's derivative by a formula of its own. None has gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import plain
from ._ops import add_op_namespace_prefix, ops
from .plain import PLAIN, Projections, Weights

__all__ = [
    "HERE",
    "add_product",
    "added_mlp",
    "added_mlp_parts",
    "gated_gradients",
    "gated_product",
    "gated_product_parts",
    "may_take",
    "may_take_rows",
    "rotary_projections",
    "takes",
    "takes_add",
    "takes_added_mlp",
    "takes_gradients",
    "takes_projections",
]

HERE = hasattr(ops, "gated_product")
_HERE_PROJECTIONS = hasattr(ops, "rotary_projections")
_HERE_ADD = hasattr(ops, "add_product")
_HERE_MLP = hasattr(ops, "added_mlp")
_HERE_GRADIENTS = hasattr(ops, "gated_gradients")

# As in decoder_cuda/launch.h, by the names of the classes that transformers has.
_FUNCTIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 2, "NewGELUActivation": 2}
_DTYPES = frozenset((torch.bfloat16, torch.float16))
_HEAD_DIMS = frozenset((64, 128, 256))
# Two blocks work on 256 rows together, by 256 columns of a result, so that fewer would leave tensor cores idle.
_FEWEST_ROWS = 256
_TILE = 256
_STEP = 64
_TALL = 8  # tiles below each other that are made before the next columns', as in hopper.cuh
# For gradients: steps of 64 in which all that becomes of the tile before is done meanwhile, and rounds of tiles, since
# what becomes of the last ones is done behind them.
_FEWEST_DEPTH = 2048
_FEWEST_ROUNDS = 12
_MOST_ROWS = 2**31 - 256  # which the op refuses more than


def may_take(x: Tensor) -> bool:
    """Whether it is worth while to look for the weights."""
    return HERE and x.is_cuda and x.dtype in _DTYPES


def may_take_rows(x: Tensor) -> bool:
    """As `may_take`, of x with so many rows that some op may be faster: asked first where a token at a time is decoded."""
    return may_take(x) and not _exporting() and x.numel() >= _FEWEST_ROWS * x.shape[-1]


def takes(x: Tensor, weights: Weights, product: str) -> bool:
    """Whether the op takes x, (..., hidden), and is faster.

    Not in exported programs, where the number of rows may be left open. Compiled ones are made anew for fewer rows.
    """
    if not may_take(x) or product not in _FUNCTIONS or _exporting():
        return False
    gate, hidden = weights.gate, x.shape[-1]
    return (
        hidden % 8 == 0
        and 0 < _FEWEST_ROWS * hidden <= x.numel() <= _MOST_ROWS * hidden
        and gate.shape[0] % (8 if weights.up is not None else 16) == 0  # a packed weight's halves are multiples of 8
        and weights.gate_bias is None
        and weights.up_bias is None
        and _capable(x.get_device())
        and plain.takes(x, weights)
    )


def gated_product(x: Tensor, weights: Weights, product: str) -> Tensor:
    """`f(gate(x)) * up(x)`: (..., hidden) -> (..., features). No gradients."""
    return ops.gated_product(x, *_both(weights), _FUNCTIONS[product])


def gated_product_parts(x: Tensor, weights: Weights, product: str) -> tuple[Tensor, Tensor, Tensor]:
    """`f(gate(x)) * up(x)`, `gate(x)` and `up(x)`. No gradients."""
    return ops.gated_product_parts(x, *_both(weights), _FUNCTIONS[product])


def takes_projections(x: Tensor, projections: Projections, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Whether the op takes x, (batch, tokens, hidden), with cos and sin, (batch or 1, tokens, head_dim), and is faster.

    In us on an H200, bfloat16, beside three products and kernels/rotary, by how full the tensor cores are: 26 and 25 of 36 %
    of a round (512 rows of 2048, 32 and 8 heads of 64), 27 and 31 of 73 % (1024 rows), 129 and 118 of 73 % of three (1536
    rows of 4096, heads of 128), 99 and 98 of 81 % (2048 rows of 3072, 24 and 8 heads of 128), 135 and 147 of 97 %.
    """
    if not (_HERE_PROJECTIONS and x.is_cuda and x.dtype in _DTYPES) or head_dim not in _HEAD_DIMS or _exporting():
        return False
    hidden = x.shape[-1]
    columns = [projections.q.shape[0], projections.k.shape[0], projections.v.shape[0]]
    return (
        hidden % 8 == 0
        and 0 < _FEWEST_ROWS * hidden <= x.numel() <= _MOST_ROWS * hidden
        and not any(of % head_dim for of in columns)
        and cos.is_cuda
        and sin.is_cuda
        and _fills(x.numel() // hidden, columns, x.get_device(), one=70, several=80)
        and plain.takes_projections(x, projections, cos, sin, head_dim)
    )


def rotary_projections(
    x: Tensor, projections: Projections, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of x with Llama's rotary embedding, and v: (batch, tokens, hidden) -> (batch, tokens, heads * head_dim) each.

    A head's pairs are elements i and i + head_dim / 2. No gradients.
    """
    return ops.rotary_projections(x, *projections[:6], cos, sin, head_dim)


def takes_add(x: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether the op takes x, (..., features), and the residual, (..., hidden), and is faster.

    In us on an H200, bfloat16, beside a product and an addition: 25 and 23 where the tensor cores are full to 73 % (1536 rows
    of 2048 to 2048), 46 and 44 of 73 % of two rounds (3072 rows), 26 and 30, 96 and 114 of 97 % (2048 and 8192 rows).
    """
    if not (_HERE_ADD and x.is_cuda and x.dtype in _DTYPES) or _exporting():
        return False
    hidden, features = weight.shape
    return (
        x.shape[-1] == features
        and features % 8 == 0
        and hidden % 8 == 0
        and 0 < _FEWEST_ROWS * features <= x.numel() <= _MOST_ROWS * features
        and _fits(residual, x, hidden)
        and _fills(x.numel() // features, [hidden], x.get_device(), one=90, several=90)
        and plain.takes(x, Weights(weight, None, None, None, weight, None))
    )


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """`residual + F.linear(x, weight)`, rounded once: (..., features) -> (..., hidden). No gradients."""
    return ops.add_product(x, weight, residual)


def takes_added_mlp(x: Tensor, weights: Weights, residual: Tensor, product: str) -> bool:
    """Whether the op takes x, (..., hidden), and the residual, of the result's shape, and is faster than its two parts.

    It is where pairs of multiprocessors make all tiles in turn in less time than those of the first products and then those of
    the last. In us on an H200, bfloat16, it and the two: 1,210 and 1,240 in a row, 1,028 and 1,044 after a pause (8192 rows of
    2048, 8192 between them).
    """
    if not (_HERE_MLP and takes(x, weights, product)) or weights.down_bias is not None:
        return False
    hidden, features = weights.down.shape
    return (
        hidden % 8 == 0
        and _fits(residual, x, hidden)
        and _saves(x.numel() // x.shape[-1], x.shape[-1], features, hidden, _pairs(x.get_device()))
    )


def added_mlp(x: Tensor, weights: Weights, residual: Tensor, product: str) -> Tensor:
    """`residual + down(f(gate(x)) * up(x))`, with the bits of `gated_product` and `add_product`. No gradients."""
    return ops.added_mlp(x, *_both(weights), weights.down, residual, _FUNCTIONS[product])


def added_mlp_parts(x: Tensor, weights: Weights, residual: Tensor, product: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same, `gate(x)` and `up(x)`. No gradients."""
    return ops.added_mlp_parts(x, *_both(weights), weights.down, residual, _FUNCTIONS[product])


def takes_gradients(grad: Tensor, weight: Tensor, gate: Tensor, up: Tensor | None, product: str) -> bool:
    """Whether the op takes the gradient of a gated MLP's result, (rows, hidden), and its factors, (rows, features)."""
    if not (_HERE_GRADIENTS and grad.is_cuda and grad.dtype in _DTYPES) or up is None or product not in _FUNCTIONS:
        return False
    hidden, features = weight.shape
    return (
        type(grad) in PLAIN
        and weight.dtype is grad.dtype
        and gate.dtype is grad.dtype
        and hidden % 8 == 0
        and features % 8 == 0
        and 0 < _FEWEST_ROWS * hidden <= grad.numel() <= _MOST_ROWS * hidden
        and hidden >= _FEWEST_DEPTH
        and _fills(grad.numel() // hidden, [features], grad.get_device(), one=90, several=90, fewest=_FEWEST_ROUNDS)
    )


def gated_gradients(
    grad: Tensor, weight: Tensor, gate: Tensor, up: Tensor, product: str, result: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up where that of `f(gate) * up` is `grad @ weight`; and, where asked for, that product again.

    grad: (rows, hidden), weight: (hidden, features), gate, up: (rows, features) -> (rows, features) each. No gradients.
    """
    gate_grad, up_grad, made = ops.gated_gradients(grad, weight, gate, up, _FUNCTIONS[product], result)
    return gate_grad, up_grad, made if result else None


def _both(weights: Weights) -> tuple[Tensor, Tensor]:
    if weights.up is not None:
        return weights.gate, weights.up
    gate, up = weights.gate.chunk(2)
    return gate, up


def _exporting() -> bool:
    # Not by `torch.compiler.is_exporting()`, which up to torch 2.13 is true of everything that is compiled.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def _fits(residual: Tensor, x: Tensor, hidden: int) -> bool:
    """Whether it is a plain tensor of as many rows as x, of `hidden` elements, and of its dtype."""
    return (
        residual.shape == (*x.shape[:-1], hidden)
        and residual.dtype is x.dtype
        and type(residual) in PLAIN
        and residual.is_cuda
    )


def _fills(rows: int, columns: list[int], device: int, one: int, several: int, fewest: int = 1) -> bool:
    """Whether products of those rows by each of the columns fill a GPU that the ops are for.

    Pairs of multiprocessors make tiles in rounds, and wait in the last one for whoever is still at work. Filled are so many
    percent of all rounds: `one` where there is one, else `several`; and there are `fewest` rounds at least.
    """
    pairs = _pairs(device)
    if pairs == 0:
        return False
    tiles = (rows + _TILE - 1) // _TILE * sum([(of + _TILE - 1) // _TILE for of in columns])
    rounds = (tiles + pairs - 1) // pairs
    if rounds < fewest:
        return False
    return 100 * rows * sum(columns) >= (several if rounds > 1 else one) * rounds * pairs * _TILE * _TILE


def _saves(rows: int, depth: int, features: int, columns: int, pairs: int) -> bool:
    """Whether a gated MLP's tiles in turn take fewer steps than those of its first products and then those of its last.

    Of the last one there are rounds of tiles enough that pairs hardly wait for each other: at first those of rows that are long done.
    """

    def up(n: int, by: int) -> int:
        return (n + by - 1) // by

    if pairs == 0:
        return False
    down = up(rows, _TILE)
    first, first_steps = down * up(2 * features, _TILE), up(depth, _STEP)
    last, last_steps = down * up(columns, _TILE), up(features, _STEP)
    both = up(first, pairs) * first_steps + up(last, pairs) * last_steps
    more, more_of_last = first % pairs, last % pairs
    # Pairs that have one more of the first's tiles are the last ones to have one more of the others, if any has both. One truth,
    # not several in a row: where the number of rows is left open, each would have a compiled program made anew.
    return (
        (down >= 2 * _TALL)
        & (last >= 2 * pairs)
        & (more > 0)
        & (more_of_last > 0)
        & (more + more_of_last <= pairs)
        & (min(first_steps, last_steps) * 100 >= both)
    )


def _capable(device: int) -> bool:
    return _pairs(device) != 0


def _pairs(device: int) -> int:
    """Pairs of multiprocessors of a GPU that the ops are for; 0 of any other."""
    return _known_pairs(device)


@cache
def _known_pairs(device: int) -> int:
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count // 2 if (found.major, found.minor) == (9, 0) else 0


# What `torch.compiler.assume_constant_result` does, which imports dynamo: 1 s. Not of the cached function itself, which
# torch.compile would look through.
_pairs._dynamo_marked_constant = True


def _register_shapes() -> None:
    """What the ops return, for programs that are traced."""

    def result(x: Tensor, gate: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], gate.shape[0]))

    @torch.library.register_fake(add_op_namespace_prefix("gated_product"))
    def _(x: Tensor, gate: Tensor, *_: Any) -> Tensor:
        return result(x, gate)

    @torch.library.register_fake(add_op_namespace_prefix("gated_product_parts"))
    def _(x: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return result(x, gate), result(x, gate), result(x, gate)

    if _HERE_PROJECTIONS:

        @torch.library.register_fake(add_op_namespace_prefix("rotary_projections"))
        def _(
            x: Tensor, q: Tensor, _q_bias: Tensor | None, k: Tensor, _k_bias: Tensor | None, v: Tensor, *_: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            return result(x, q), result(x, k), result(x, v)

    if _HERE_GRADIENTS:

        @torch.library.register_fake(add_op_namespace_prefix("gated_gradients"))
        def _(
            _grad: Tensor, _weight: Tensor, gate: Tensor, _up: Tensor, _function: int, wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor]:
            made = gate.new_empty(gate.shape) if wanted else gate.new_empty((0,))
            return gate.new_empty(gate.shape), gate.new_empty(gate.shape), made

    if _HERE_MLP:

        @torch.library.register_fake(add_op_namespace_prefix("added_mlp"))
        def _(x: Tensor, _gate: Tensor, _up: Tensor, down: Tensor, *_: Any) -> Tensor:
            return result(x, down)

        @torch.library.register_fake(add_op_namespace_prefix("added_mlp_parts"))
        def _(x: Tensor, gate: Tensor, _up: Tensor, down: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return result(x, down), result(x, gate), result(x, gate)

    if _HERE_ADD:

        @torch.library.register_fake(add_op_namespace_prefix("add_product"))
        def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
            return result(x, weight)


if HERE:
    _register_shapes()
