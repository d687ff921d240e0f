"""Whether Triton computes where a build has no compiled ops: asked when a tensor on a GPU first arrives.

Before that nothing of Triton is imported, and on machines without it, or without a GPU, nothing ever is.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["launch", "op", "register", "takes", "works"]

_DEVICES = frozenset(("cuda", "xpu"))  # ROCm's are called cuda, too
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, nn.Parameter))
_transforms_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack

_known: dict[tuple[str, int], bool] = {}
_registered: dict[str, tuple[Any, Callable[..., Any]]] = {}


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether there is Triton for x's device, and x and the others, where there are any, are plain tensors of one dtype there.

    Not while `torch.func` or forward-mode AD is at work, for which the ops have no rules, nor in a trace of `torch.jit`.
    """
    device = x.device
    if device.type not in _DEVICES or x.dtype not in _DTYPES or type(x) not in _PLAIN:
        return False
    for other in others:
        if other is not None and (other.dtype is not x.dtype or other.device != device or type(other) not in _PLAIN):
            return False
    if _transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return False
    return works(device.type, device.index)


def works(kind: str, index: int) -> bool:
    """Whether Triton is here and compiles for a device; found out once, by a small kernel. A warning says where it does not."""
    found = _known.get((kind, index))
    if found is None:
        if kind == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # nothing may be loaded now; the next call asks again
        with _disable_current_modes():  # the tensors of a trace that may be going on have no memory
            found = _known[kind, index] = _tried(torch.device(kind, index))
    return found


# What dynamo would otherwise trace into. `torch.compiler.assume_constant_result` does just this, and imports dynamo: 1 s.
works._dynamo_marked_constant = True


def _tried(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import triton_ops

        triton_ops.probe(device)
    except Exception as error:  # noqa: BLE001 - whatever it is, PyTorch's own code needs nothing of it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton is here but does not work on {device} ({type(error).__name__}: {reason}). PyTorch's own code runs "
            "instead: the same results, slower. Triton needs a C compiler (cc) and a driver that it supports.",
            stacklevel=2,
        )
        return False
    return True


def register(name: str, traced: Any, direct: Callable[..., Any]) -> None:
    """Have `op(name)` call one of them: `traced` in a trace, which sees the op; `direct` else, which starts the kernels."""
    _registered[name] = traced, direct


def op(name: str) -> Callable[..., Any]:
    """The op of that name, for calls that `takes` has let through: by then it is registered."""

    def call(*arguments: Any) -> Any:
        traced, direct = _registered[name]
        if is_dynamo_compiling() or _modes():
            return traced(*arguments)
        return direct(*arguments)

    return call


def launch(kernel: Any, programs: Any, x: Tensor, *arguments: Any, **options: Any) -> None:
    """Start so many programs of a kernel on x's device, on its current stream; in a trace, record that."""
    if _modes():
        kernel = torch.library.wrap_triton(kernel)
    if x.is_cpu:  # Triton's interpreter
        kernel[(programs,)](*arguments, **options)
        return
    device = x.device
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        kernel[(programs,)](*arguments, **options)
        return
    with module.device(device):
        kernel[(programs,)](*arguments, **options)
