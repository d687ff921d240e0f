"""Backwards whose results may not be differentiated: what would be lost without a word is an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

__all__ = ["differentiable_once"]

_Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(refusal: str) -> Callable[[_Backward], _Backward]:
    """For the backward of an autograd function: a derivative of its results is a RuntimeError that says `refusal`.

    PyTorch's `once_differentiable` lets a second derivative by the inputs pass as zero where the gradient that came in
    does not depend on them. Under Dynamo, which has no second derivatives at all, it is the backward itself.
    """

    def decorate(backward: _Backward) -> _Backward:
        @wraps(backward)
        def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if is_dynamo_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            saved = _Saved(ctx)
            with torch.no_grad():
                found = backward(saved, *grads)
            gradients = [grad.detach().requires_grad_() for grad in found if grad is not None]
            # With what they were made of: where only gradients by that are asked for, nothing else would be looked at.
            made_of = [x for x in (*grads, *saved.saved_tensors) if x is not None]
            marked = iter(_Refused.apply(refusal, len(gradients), *gradients, *made_of))
            return tuple(None if grad is None else next(marked) for grad in found)

        return once

    return decorate


class _Refused(torch.autograd.Function):
    """The first `count` tensors as they are: gradients, whose own by the others, which they were made of, are errors."""

    @staticmethod
    def forward(ctx: Any, refusal: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusal = refusal
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.refusal)


class _Saved:
    """A context whose saved tensors are asked for once: those of a checkpoint can be no second time."""

    def __init__(self, ctx: Any) -> None:
        self.saved_tensors, self._ctx = ctx.saved_tensors, ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
