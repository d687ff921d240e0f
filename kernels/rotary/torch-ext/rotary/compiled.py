"""The compiled op: when it takes a call, and its gradients.

Where a build has none (every noarch one), Triton's takes its place on a GPU; where there is no Triton, or the case is not its,
PyTorch's own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import triton_here
from ._ops import add_op_namespace_prefix, ops

__all__ = ["HERE", "INTERLEAVED", "INVERSE", "ROUND_ONCE", "TRANSPOSED", "rotate", "takes"]

HERE = hasattr(ops, "rotate")
# A build has the op for the CPU or for CUDA.
_CUDA = HERE and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("rotate"), "CUDA")

# As in rotary_cpu/parts.h and rotary_cuda/launch.h.
INTERLEAVED, INVERSE, TRANSPOSED, ROUND_ONCE = 1, 2, 4, 8

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, nn.Parameter))
_transforms_active = torch._C._are_functorch_transforms_active


def takes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, rotary_dim: int, round_once: bool
) -> bool:
    """Whether the op takes q and k, ([batch,] heads, tokens, head_dim) or with heads and tokens the other way round.

    Only where no more is broadcast than heads, and cos and sin over the batch. Not where those need a gradient, nor while
    `torch.func` or forward-mode AD is at work, for which the op has no rules: a tensor there says neither that it is
    batched nor that it is differentiated. Nor in a trace of `torch.jit`, which has no place for an `autograd.Function` and
    may be loaded elsewhere, nor for subclasses (DTensor and the like), which know their own ways.
    """
    dtype = q.dtype
    if not HERE:
        if not (
            triton_here.takes(q, k)
            and triton_here.takes(cos, sin)
            and cos.device == q.device
            and (cos.dtype is dtype or (round_once and cos.dtype is torch.float32))
            and rotary_dim <= 1024
        ):
            return False
    elif not (
        dtype in _DTYPES
        and k.dtype is dtype
        and (cos.dtype is dtype or (round_once and cos.dtype is torch.float32))
        and sin.dtype is cos.dtype
        and (
            q.is_cuda and k.is_cuda and cos.is_cuda and sin.is_cuda and rotary_dim <= 1024
            if _CUDA
            else q.is_cpu and k.is_cpu and cos.is_cpu and sin.is_cpu
        )
        and type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(cos) in _PLAIN
        and type(sin) in _PLAIN
    ):
        return False
    of_q, of_k, of_cos = q.shape, k.shape, cos.shape
    dims = len(of_cos)
    if dims not in (2, 3) or len(of_q) != dims + 1 or len(of_k) != dims + 1 or sin.shape != of_cos:
        return False
    heads_dim = unsqueeze_dim if unsqueeze_dim >= 0 else unsqueeze_dim + dims + 1
    if heads_dim not in (dims - 2, dims - 1):
        return False
    tokens, width = 2 * dims - 3 - heads_dim, of_cos[-1]
    return (
        of_q[tokens] == of_k[tokens] == of_cos[-2]
        and (dims == 2 or (of_q[0] == of_k[0] and (of_cos[0] == of_q[0] or of_cos[0] == 1)))
        and rotary_dim % 2 == 0
        and (width == rotary_dim or 2 * width == rotary_dim)
        and rotary_dim <= of_q[-1]
        and rotary_dim <= of_k[-1]
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        and not _transforms_active()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )


_rotate = ops.rotate.default if HERE else triton_here.op("rotate")


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, rotary_dim: int, form: int
) -> tuple[Tensor, Tensor]:
    """q, k, cos, sin as `takes` has it -> q and k turned, of their shapes. `heads_dim` is not negative."""
    # The op by itself has no gradient. It is called where none can be asked for, because it costs half as much.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotate.apply(q, k, cos, sin, heads_dim, rotary_dim, form)
    return _rotate(q, k, cos, sin, heads_dim, rotary_dim, form)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, rotary_dim: int, form: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.options = heads_dim, rotary_dim, form
        return _rotate(q, k, cos, sin, heads_dim, rotary_dim, form)

    @staticmethod
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Linear in q and k: the gradient is the same op with the matrix transposed, and has a gradient itself.
        heads_dim, rotary_dim, form = ctx.options
        turned = rotate(q_grad, k_grad, *ctx.saved_tensors, heads_dim, rotary_dim, form ^ TRANSPOSED)
        return (*turned, None, None, None, None, None)


def _register_shapes() -> None:
    """What the op returns, for `torch.compile` and export: laid out as the C++ does it."""

    def like(x: Tensor) -> Tensor:
        if x.stride(-3) < x.stride(-2):
            return x.new_empty((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1])).transpose(-3, -2)
        return x.new_empty(x.shape)

    @torch.library.register_fake(add_op_namespace_prefix("rotate"))
    def _(
        q: Tensor,
        k: Tensor,
        cos: Tensor,  # noqa: ARG001  (an op's shape function has the op's arguments)
        sin: Tensor,  # noqa: ARG001
        heads_dim: int,  # noqa: ARG001
        rotary_dim: int,  # noqa: ARG001
        form: int,  # noqa: ARG001
    ) -> tuple[Tensor, Tensor]:
        return like(q), like(k)


if HERE:
    _register_shapes()
