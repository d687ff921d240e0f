"""`on_error="restore"`: a kernel that raises in use is taken out of its layer, and the original answers.

The kernel's forward is then called by one that watches it; without the option nothing stands on the call path. What it
does where the kernel raises, step by step:

    is it the kernel's?   not memory that is full, a device that failed, a fake tensor, checkpointing that stops early
    can it be answered?   not where the kernel has written to what it was called with, as torch's counters tell, or has
                          added to it (a cache of keys and values, a list)
    the original          runs; what it raises too is the caller's error, and the kernel stays
    the kernel goes       once, with a warning; the report has the reason
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelhub.errors import InvalidReference, KernelHubWarning
from kernelhub.layers.mode import Mode
from kernelhub.layers.survey import class_name
from kernelhub.layers.swap import MARKER, Taken, functions_lock, in_effect, take
from kernelhub.warning import warn

_PASSED_ON = (MemoryError, torch.OutOfMemoryError)


def restores(on_error: str, mode: Mode) -> bool:
    """Whether kernels that raise are to be taken out. Raises `InvalidReference` [ValueError] for what cannot be."""
    if on_error not in ("raise", "restore"):
        raise InvalidReference(f"on_error={on_error!r}", hint='Expected "raise" or "restore".')
    if on_error == "restore" and Mode.TORCH_COMPILE in mode:
        raise InvalidReference(
            'on_error="restore" with Mode.TORCH_COMPILE: compiled code has no place where an error could be caught',
            hint="Use verify=True to find kernels that raise before the model is compiled.",
        )
    return on_error == "restore"


def forward_for(restore: bool, forward: Any) -> Any:
    """What a layer runs: the kernel's forward, or one that watches it."""
    return watched(forward) if restore else forward


@functools.cache
def watched(kernel: Any) -> Any:
    """The kernel's forward, taken out of the layer where it raises; the same one for all layers, as the kernel's is."""

    @functools.wraps(kernel)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what was kernelized for eager: errors come later, elsewhere
            return kernel(self, *args, **kwargs)
        before = _before(self, args, kwargs)
        try:
            return kernel(self, *args, **kwargs)
        except Exception as error:
            if not _of_kernel(error, before):
                raise
            return _answer(self, forward, error, before, args, kwargs)

    forward.__name__ = "forward"  # a bound method is pickled by the name of its function
    vars(forward)["watches"] = kernel  # for kernels that look at what a part of theirs runs
    return forward


@dataclass(frozen=True)
class _Before:
    """What a call had before the kernel ran: its tensors, each with how often it had been written to, and what held them."""

    tensors: list[tuple[torch.Tensor, int]]
    held: list[Any]


def _answer(
    module: nn.Module,
    forward: Any,
    error: Exception,
    before: _Before,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The original's answer to a call on which the kernel raised; then the kernel goes."""
    from kernelhub.layers.capture import original_forward  # here: nothing else needs it where kernels do not raise

    if any(version != _version(tensor) for tensor, version in before.tensors) or before.held != _held((args, kwargs)):
        _take_out(module, forward, error, "; it had written to what it was called with, so this call is an error")
        raise error
    answer = original_forward(module)(*args, **kwargs)
    _take_out(module, forward, error, "")
    return answer


def _take_out(module: nn.Module, forward: Any, error: Exception, also: str) -> None:
    """Give the layer its own forward back, if it still runs this kernel, and say so."""
    said = str(error).partition("\n")[0]
    with functions_lock:
        marker = in_effect(module)
        if marker is None or marker.function is not forward:
            return  # another thread was first, or somebody undid it meanwhile
        take(module)
        reason = f"{marker.swap.repository} raised {type(error).__name__}: {said}"
        module.__dict__[MARKER] = Taken(marker.swap, reason)
    warn(f"{class_name(module)} runs its own forward from now on: {reason}{also}", KernelHubWarning)


def _of_kernel(error: Exception, before: _Before) -> bool:
    """Whether the error says something about the kernel, so that the original may do better."""
    if isinstance(error, _PASSED_ON) or "DefaultCPUAllocator" in str(error):
        return False
    if type(error).__module__ == "torch.utils.checkpoint":  # how recomputation ends as soon as it has what it needs
        return False
    tensors = [tensor for tensor, _ in before.tensors]
    if any(tensor.is_meta or _is_fake(tensor) for tensor in tensors):
        return False
    return not any(_failed(device) for device in {tensor.device for tensor in tensors})


def _is_fake(tensor: torch.Tensor) -> bool:
    return any(cls.__name__ == "FakeTensor" for cls in type(tensor).__mro__)


def _failed(device: torch.device) -> bool:
    """Whether the device itself has failed, or is recording: then nothing can be run on it instead."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Before:
    """The tensors of a call and of the layer, each with how often it has been written to."""
    tensors: list[torch.Tensor] = []
    held = _held((args, kwargs), tensors)
    for own in (module._parameters, module._buffers):
        tensors += [tensor for tensor in own.values() if tensor is not None]
    return _Before([(tensor, _version(tensor)) for tensor in tensors], held)


# How deep arguments are looked into: a cache has layers, which have tensors.
_DEPTH = 6
_WHOLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Module, type)


def _held(value: Any, tensors: list[torch.Tensor] | None = None) -> list[Any]:
    """What the arguments of a call hold, by identity: a cache that was added to holds other things. `tensors` gets the tensors."""
    found: list[Any] = []
    waiting = [(value, 0)]
    seen: set[int] = set()
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.append(id(item))
            if tensors is not None:
                tensors.append(item)
        elif isinstance(item, _WHOLE) or callable(item) or depth > _DEPTH or id(item) in seen:
            found.append(item if isinstance(item, (bool, int, str)) else id(item))
        else:
            seen.add(id(item))
            inside = _inside(item)
            found.append((type(item), len(inside)))
            waiting += [(one, depth + 1) for one in inside]
    return found


def _inside(item: Any) -> list[Any]:
    if isinstance(item, (tuple, list, set, frozenset, deque)):
        return list(item)
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    slots = [name for cls in type(item).__mro__ for name in (cls.__dict__.get("__slots__") or ())]
    return [*vars(item).values()] if hasattr(item, "__dict__") else [getattr(item, name, None) for name in slots]


def _version(tensor: torch.Tensor) -> int:
    """How often torch has seen the tensor written to; tensors of inference mode are not counted."""
    return -1 if tensor.is_inference() else tensor._version
