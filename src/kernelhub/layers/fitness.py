"""What an instance is: does it let a kernel stand in for its forward?"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from kernelhub.layers.survey import PLAIN_DTYPES
from kernelhub.layers.swap import in_effect, left_over, of_class, ours


class Weights(NamedTuple):
    """What a layer's weights are: why a kernel cannot read them (None: it can), and whether they are DTensors."""

    reason: str | None
    distributed: bool


READABLE = Weights(None, False)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def foreign_forward(module: nn.Module) -> str | None:
    """Why a forward on the instance keeps the layer as it is; None where a kernel can go there, or under it."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    if forward is None or of_class(module, forward) or ours(module) or left_over(module):
        return None
    hooked = "_hf_hook" in attributes and isinstance(forward, functools.partial)
    if hooked and of_class(module, attributes.get("_old_forward")):
        return None
    return "somebody else put a forward of their own on this instance"


def weights(module: nn.Module, managed: Callable[[], frozenset[int]]) -> Weights:
    """Whether a kernel can read the module's own weights. `managed()` are those that FSDP gathers before a forward."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is nn.Parameter:
            if parameter.dtype not in PLAIN_DTYPES:
                return Weights(f"its {name} is quantised ({_dtype(parameter)})", False)
        elif _is_dtensor(parameter):
            if id(parameter) not in managed():
                return Weights(None, True)
        elif is_special(type(parameter)):
            return Weights(f"its {name} is a {type(parameter).__name__}, not a plain tensor", False)
    return READABLE


def children(module: nn.Module, managed: Callable[[], frozenset[int]]) -> str | None:
    """Why a kernel that reads the weights of the module's children would compute something else than they do."""
    for path, child in module.named_modules():
        if child is module:
            continue
        if any(child.__dict__.get(name) for name in _HOOKS):
            return f"its {path} has hooks, which the kernel would not call"
        if "forward" in child.__dict__ and not (in_effect(child) or of_class(child, child.__dict__["forward"])):
            return f"its {path} has a forward of its own on the instance, which the kernel would not call"
        if "base_layer" in child._modules:
            return f"its {path} is adapted ({type(child).__name__}), and the kernel would not call the adapter"
        reason, distributed = weights(child, managed)
        if reason or distributed:
            return f"its {path}: {reason or 'its weights are DTensors'}"
        if _packed(child):
            return f"its {path} is quantised ({type(child).__name__})"
    return None


def _packed(child: nn.Module) -> bool:
    """A layer of a quantisation library: its weights are whole numbers in buffers."""
    if type(child).__module__.startswith("torch.nn.modules."):
        return False
    if type(child).__module__.startswith("torch.ao.nn.quantized."):
        return True
    return any(
        buffer is not None and buffer.dim() >= 2 and buffer.dtype not in PLAIN_DTYPES
        for buffer in child._buffers.values()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@functools.lru_cache(maxsize=256)
def is_special(cls: type) -> bool:
    """Whether the tensor class has a behaviour of its own under torch's functions and ops."""
    plain = (torch.Tensor, nn.Parameter)
    functions = {getattr(base.__torch_function__, "__func__", base.__torch_function__) for base in plain}
    function: Any = cls.__torch_function__  # type: ignore[attr-defined]
    dispatch: Any = cls.__torch_dispatch__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function) not in functions or dispatch not in {
        base.__torch_dispatch__ for base in plain
    }


def gathered_by_fsdp(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The sharded parameters that FSDP2 replaces by whole, plain ones while their module runs, by identity.

    A parameter that was a DTensor before it was sharded (tensor parallelism) stays one, and is not among them.
    """
    found: set[int] = set()
    for module in modules:
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        inner = state()
        groups = getattr(inner, "_fsdp_param_groups", None) or [getattr(inner, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if not getattr(parameter, "is_dtensor", False):
                    found.add(id(parameter.sharded_param))
    return frozenset(found)
