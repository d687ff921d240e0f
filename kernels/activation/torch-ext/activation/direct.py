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


def functions() -> Any:
    """The extension with the functions; None where the build has none, or this PyTorch lacks what they need."""
    extension = getattr(_ops, _ops.ops.name, None)
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if extension is None or api is None:
        return None
    ready = extension.prepare(
        api,
        Tensor,
        nn.Parameter,
        torch.empty_like,
        torch.empty(0).is_neg,
        vars(forward_ad),
        vars(profiler),
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._is_tracing,
        torch._C._are_functorch_transforms_active,
    )
    return extension if ready else None
