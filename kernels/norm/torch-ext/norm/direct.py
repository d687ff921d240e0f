"""Calls that go around PyTorch's dispatcher where nobody can tell: its way in and out takes longer than a row does.

The extension's functions take an op's arguments and return its result, or None where the op itself is to be called. The
extension's direct.h says when that is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

from . import _ops

__all__ = ["functions"]


# Functions of PyTorch's that return something false where nobody watches; none of them is public.
_WATCHERS = (
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_is_tracing",
    "_are_functorch_transforms_active",
)


def functions() -> Any:
    """The extension with the functions; None where the build has none, or this PyTorch lacks what they need."""
    extension = getattr(_ops, _ops.ops.name, None)
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    watchers = [getattr(torch._C, name, None) for name in _WATCHERS]
    if extension is None or api is None or None in watchers:
        return None
    ready = extension.prepare(
        api,
        Tensor,
        nn.Parameter,
        torch.empty_like,
        torch.empty(0).is_neg,
        vars(forward_ad),
        vars(profiler),
        *watchers,
    )
    return extension if ready else None
