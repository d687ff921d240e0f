"""Whether calling a layer's parts would do nothing but compute: then a kernel may compute it, and else it calls them.

Looked at in every call, because hooks, other forwards and other weights may come at any time. A module's `__dict__` is asked,
which is faster than the module; but under Dynamo the module, because a compiled program looks again, in every call, at what was
read, and at attributes sooner: of a Llama of 16 layers in 1.00 ms for 1.15, on a processor, with torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as everywhere

__all__ = [
    "PLAIN",
    "Projections",
    "Weights",
    "attention_linears",
    "home",
    "linears",
    "marked_as",
    "runs",
    "takes",
    "takes_projections",
    "without_autocast",
]

PLAIN = frozenset((Tensor, nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_transforms_active = torch._C._are_functorch_transforms_active
# Hooks of all modules, in the tables that torch has of them.
_HOOKS_OF_ALL = (
    everywhere._global_forward_hooks,
    everywhere._global_forward_pre_hooks,
    everywhere._global_backward_hooks,
    everywhere._global_backward_pre_hooks,
)


def home(function: Any) -> str:
    """The module that a function is written in. Who wraps one takes its `__module__` over, but not its globals."""
    return getattr(function, "__globals__", {}).get("__name__", "")


# What all linear layers run; None where somebody had put another forward there before this was imported.
_LINEAR = nn.Linear.forward if home(nn.Linear.forward) == "torch.nn.modules.linear" else None


class Weights(NamedTuple):
    """The weights of a gated MLP; without `up`, gate and up are one projection, whose result is both side by side."""

    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Projections(NamedTuple):
    """The weights of an attention's projections: (heads * head_dim, hidden) the first three, the other way round the last.

    The last is None where it is to be called as a module.
    """

    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    o: Tensor | None
    o_bias: Tensor | None


def linears(mlp: nn.Module, gate: str, up: str | None, down: str) -> Weights | None:
    """The weights of the projections of those names, if they are plain linear layers that nobody listens to."""
    if any(_HOOKS_OF_ALL) or nn.Linear.forward is not _LINEAR:
        return None
    parts, traced = mlp._modules, is_dynamo_compiling()
    first = _linear(parts.get(gate), traced)
    second = (None, None) if up is None else _linear(parts.get(up), traced)
    last = _linear(parts.get(down), traced)
    if first is None or second is None or last is None:
        return None
    return Weights(*first, *second, *last)


def attention_linears(attention: nn.Module) -> Projections | None:
    """The weights of `q_proj`, `k_proj`, `v_proj`, if they are plain linear layers that nobody listens to, and of `o_proj` if it is."""
    if any(_HOOKS_OF_ALL) or nn.Linear.forward is not _LINEAR:
        return None
    parts, traced = attention._modules, is_dynamo_compiling()
    q, k, v = (_linear(parts.get(name), traced) for name in ("q_proj", "k_proj", "v_proj"))
    if q is None or k is None or v is None:
        return None
    return Projections(*q, *k, *v, *(_linear(parts.get("o_proj"), traced) or (None, None)))


def _linear(module: nn.Module | None, traced: bool) -> tuple[Tensor, Tensor | None] | None:
    if type(module) is not nn.Linear:
        return None
    if traced:
        forward, listened, own = module.forward, _heard(module), module._parameters
        if type(forward) is not MethodType or forward.__self__ is not module or forward.__func__ is not _LINEAR:
            return None
    else:
        held = module.__dict__
        if "forward" in held:
            return None
        listened, own = _listened(held), held["_parameters"]
    if listened:
        return None
    weight = own.get("weight")  # FSDP and weight_norm of old keep it elsewhere
    return None if weight is None or "bias" not in own else (weight, own["bias"])


def _listened(held: dict[str, Any]) -> bool:
    return bool(
        held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
    )


def _heard(module: nn.Module) -> bool:
    """`_listened`, by the module's attributes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def runs(module: nn.Module, *forwards: Any) -> bool:
    """Whether the module runs its class's forward, and a kernel may stand in for that, or one of these kernels', and has no hooks."""
    if is_dynamo_compiling():
        listened, forward = _heard(module), module.forward
        if forward is type(module).forward:  # static, as that of a function which is kernel-aware
            forward = None
    else:
        held = module.__dict__
        listened, forward = _listened(held), held.get("forward")
    if any(_HOOKS_OF_ALL) or listened:
        return False
    if forward is None:
        return _may_be_swapped(module)
    # Not `getattr(forward, "__self__", None)`, which in a frame of torch 2.11's compiler is None.
    if type(forward) is not MethodType or forward.__self__ is not module:
        return False
    function = forward.__func__
    if function is type(module).forward:
        return _may_be_swapped(module)
    # Of what somebody else has wrapped the two differ, though it has both: it takes over what the wrapped one has.
    watched = getattr(function, "watches", None)
    if watched is not None and function.__wrapped__ is watched:
        function = watched
    return any(function is known for known in forwards)


def _may_be_swapped(module: nn.Module) -> bool:
    cls = type(module)
    return not _is_conditional(cls) or bool(cls.kernel_condition(module))


def marked_as(cls: type[nn.Module]) -> str | None:
    """The name that the class, or one that it comes from, is marked with, if it has the forward that was marked.

    Not where somebody put another one on the class since, or another method that it calls: the mark's condition knows.
    """
    name = getattr(cls, "kernel_layer_name", None)
    if name is None:
        return None
    facts = name, _condition(cls), cls.forward
    known = _marked.get(cls)
    if known is None or known[0] != facts:
        known = _marked[cls] = facts, _has_marked_forward(cls)
    return name if known[1] else None


def _has_marked_forward(cls: type[nn.Module]) -> bool:
    marked = next(base for base in cls.__mro__ if "kernel_layer_name" in base.__dict__)
    knows = _knows(_condition(cls))
    return cls.forward is marked.forward and (knows is None or knows(cls))


def _condition(cls: type[nn.Module]) -> Callable[[nn.Module], bool] | None:
    """What the class is marked with to say of an instance whether a kernel may stand in for it."""
    return getattr(cls, "kernel_condition", None)


def _knows(condition: Any) -> Callable[[type[nn.Module]], bool] | None:
    """What the condition has to say of classes; the rest of it is looked at here where the tensors are."""
    return getattr(getattr(condition, "__self__", None), "knows", None)


def _is_conditional(cls: type[nn.Module]) -> bool:
    """Whether somebody's own condition is to be asked for each instance."""
    condition = _condition(cls)
    return condition is not None and _knows(condition) is None


_marked: dict[type[nn.Module], tuple[tuple[Any, ...], bool]] = {}

# What `torch.compiler.assume_constant_result` does, which imports dynamo: 1 s.
marked_as._dynamo_marked_constant = True
_is_conditional._dynamo_marked_constant = True


def takes(x: Tensor, weights: Weights) -> bool:
    """Whether x, (..., hidden), and the weights are plain tensors of one dtype, which nothing casts or transforms."""
    return (
        x.dim() >= 2
        and _are_plain(x, weights)
        and weights.gate.layout is torch.strided
        and weights.down.layout is torch.strided
    )


def takes_projections(x: Tensor, projections: Projections, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Whether x, (batch, tokens, hidden), the weights of q, k and v, and cos and sin, (batch or 1, tokens, head_dim), are such.

    Not where cos or sin needs a gradient.
    """
    if x.dim() != 3 or not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.dim() != 3:
        return False
    batches, tokens, width = cos.shape
    return (
        width == head_dim
        and head_dim % 2 == 0
        and tokens == x.shape[1]
        and (batches == 1 or batches == x.shape[0])
        and sin.shape == cos.shape
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        and _are_plain(x, (*projections[:6], cos, sin))
        and projections.q.layout is torch.strided
        and projections.k.layout is torch.strided
        and projections.v.layout is torch.strided
    )


def _are_plain(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether all are plain tensors of one dtype, which nothing casts or transforms.

    Subclasses (DTensor, quantised ones) know their own ways; there are no rules for `torch.func` and forward-mode AD;
    programs of `torch.jit.trace` have no place for an `autograd.Function`.
    """
    dtype = x.dtype
    if type(x) not in PLAIN or dtype not in _DTYPES:
        return False
    for other in others:
        if other is not None and (type(other) not in PLAIN or other.dtype is not dtype):
            return False
    return not (
        x.is_meta  # of which PyTorch knows no autocast
        or torch.is_autocast_enabled(x.device.type)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def without_autocast(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For the backward of what these let through, which was computed without autocast: so it is, wherever it is called."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run
