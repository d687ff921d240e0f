"""Tables of cosines and sines: the compiled op, or Triton's, in one launch; else PyTorch's code, with half of the work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import compiled, triton_here
from ._ops import add_op_namespace_prefix, ops

__all__ = ["HALVES", "NEIGHBOURS", "PAIRS", "rotary_tables", "tables", "takes", "with_op"]

# As in rotary_cuda/launch.h: how a table lies along a token, with an angle for each pair.
HALVES, NEIGHBOURS, PAIRS = 0, 1, 2

# As in rotary_cuda/device.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTEGERS = frozenset((torch.int64, torch.int32))
_PLAIN = frozenset((Tensor, nn.Parameter))
_transforms_active = torch._C._are_functorch_transforms_active

_HERE = hasattr(ops, "tables")  # in builds for CUDA alone: on a CPU PyTorch's own cosine is as fast as one of ours
_tables = ops.tables.default if _HERE else triton_here.op("tables")


def takes(inv_freq: Tensor, positions: Tensor, x: Tensor) -> bool:
    """Whether these are plain tensors on one device, as a model has them: integers, and frequencies without a gradient.

    x's dtype is the result's. Not while `torch.func` or forward-mode AD is at work, nor of subclasses.
    """
    device = positions.device
    return (
        positions.dtype in _INTEGERS
        and inv_freq.dtype in _DTYPES
        and x.dtype in _DTYPES
        and type(positions) in _PLAIN
        and type(inv_freq) in _PLAIN
        and type(x) in _PLAIN
        and inv_freq.device == device
        and x.device == device
        and inv_freq.dim() == 1
        and not (inv_freq.requires_grad and torch.is_grad_enabled())
        and not _transforms_active()
        and forward_ad._current_level < 0
    )


def with_op(inv_freq: Tensor, positions: Tensor) -> bool:
    """Whether an op computes what `takes` has let through."""
    here = _HERE and positions.is_cuda if compiled.HERE else triton_here.takes(inv_freq)
    return here and positions.dim() == 2


def tables(inv_freq: Tensor, positions: Tensor, scale: float, dtype: torch.dtype, layout: int) -> tuple[Tensor, Tensor]:
    """Of what `takes` has let through."""
    if with_op(inv_freq, positions):
        return _tables(inv_freq, positions, scale, _DTYPES[dtype], layout)
    return _with_pytorch(inv_freq, positions, scale, dtype, layout)


def rotary_tables(
    inv_freq: Tensor,
    positions: Tensor,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    *,
    interleaved: bool = False,
    paired: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin of each position times each frequency, times `scale`: what `apply_rotary` takes.

    inv_freq: (pairs,). positions: (batch, tokens), or of any other shape. Returns two tensors of positions' shape with one
    dimension more, of 2 * pairs elements: each angle at both places of its pair, in halves (Llama) or, `interleaved`, as
    neighbours (Cohere). With `paired` it is pairs elements, each angle once. Computed in float32, as the models do, and
    rounded to `dtype` at the end.

    >>> cos, sin = rotary_tables(1 / 10000 ** (torch.arange(32) / 32), torch.arange(5)[None], dtype=torch.bfloat16)
    >>> cos.shape, cos.dtype
    (torch.Size([1, 5, 64]), torch.bfloat16)
    """
    layout = PAIRS if paired else NEIGHBOURS if interleaved else HALVES
    if dtype in _DTYPES and takes(inv_freq, positions, inv_freq):
        return tables(inv_freq, positions, scale, dtype, layout)
    return _with_pytorch(inv_freq, positions, scale, dtype, layout)


def _with_pytorch(
    inv_freq: Tensor, positions: Tensor, scale: float, dtype: torch.dtype, layout: int
) -> tuple[Tensor, Tensor]:
    # The models' own operations, but each angle once, and none that changes nothing. An integer times a float32 is one of
    # the float32 nearest to it, as `.float()` makes it.
    angles = (positions if positions.dtype in _INTEGERS else positions.float()).unsqueeze(-1) * inv_freq.float()
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    # Autocast's `cat` refuses the 16 bits that are not its own: there the rounding comes last.
    last = not cos.is_meta and torch.is_autocast_enabled(cos.device.type)
    if not last:
        cos, sin = cos.to(dtype), sin.to(dtype)
    if layout == HALVES:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    elif layout == NEIGHBOURS:
        cos, sin = torch.stack((cos, cos), -1).flatten(-2), torch.stack((sin, sin), -1).flatten(-2)
    return (cos.to(dtype), sin.to(dtype)) if last else (cos, sin)


def _register_shapes() -> None:
    """What the op returns, for `torch.compile` and export."""
    by_number = {number: dtype for dtype, number in _DTYPES.items()}

    @torch.library.register_fake(add_op_namespace_prefix("tables"))
    def _(
        inv_freq: Tensor,
        positions: Tensor,
        _scale: float,
        dtype: int,
        layout: int,
    ) -> tuple[Tensor, Tensor]:
        shape = (*positions.shape, inv_freq.shape[0] * (1 if layout == PAIRS else 2))
        return (
            positions.new_empty(shape, dtype=by_number[dtype]),
            positions.new_empty(shape, dtype=by_number[dtype]),
        )


if _HERE:
    _register_shapes()
