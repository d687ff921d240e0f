"""The order in which dimensions lie in memory: PyTorch's elementwise operations, and so the models' formulas, keep it.

Whoever takes a view of a result, or set its model to channels last, counts on that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

__all__ = ["in_order", "other_order"]

_PLAIN = frozenset((Tensor, nn.Parameter))


def other_order(x: Tensor, *others: Tensor | None) -> tuple[int, ...] | None:
    """x's dimensions from the outermost in memory to the innermost; None where they lie as they are counted.

    None too for subclasses, and where one of the others has another shape.
    """
    if type(x) not in _PLAIN or any(y is not None and y.shape != x.shape for y in others):
        return None
    sure: Callable[[Any], bool] = bool
    if is_dynamo_compiling():  # of sizes that only the data tell nothing is sure
        from torch.fx.experimental import symbolic_shapes

        sure = getattr(symbolic_shapes, "guard_or_false", bool)
    elif x.is_contiguous():
        return None
    strides, sizes = x.stride(), x.shape
    found = [*reversed(range(x.dim()))]
    for dim in range(1, x.dim()):  # as PyTorch's iterator sorts: what is expanded says nothing of its place
        at = dim
        for before in reversed(range(dim)):
            left, right = found[before], found[at]
            if sure(strides[left] == 0) or sure(strides[right] == 0):
                continue
            same = sure(strides[left] == strides[right])
            if sure(strides[left] > strides[right]) or (same and sure(sizes[left] > sizes[right])):
                found[before], found[at], at = right, left, before
            elif not same:
                break
    order = tuple(reversed(found))
    return None if order == tuple(range(x.dim())) else order


def in_order(order: tuple[int, ...], by_rows: bool, compute: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`compute(*operands)`, whose results, of the operands' shape but for the last dimension, lie in that order.

    `by_rows`: it computes along the last dimension.
    """
    inverse = sorted(range(len(order)), key=order.__getitem__)
    if by_rows and order[-1] != len(order) - 1:
        found = compute(*(x if x is None else x.contiguous() for x in operands))

        def lay(y: Tensor) -> Tensor:
            return y.permute(order).contiguous().permute(inverse)
    else:
        found = compute(*(x if x is None else x.permute(order) for x in operands))

        def lay(y: Tensor) -> Tensor:
            return y.permute(inverse)

    return lay(found) if isinstance(found, Tensor) else tuple(map(lay, found))
