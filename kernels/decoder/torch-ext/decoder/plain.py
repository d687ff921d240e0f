"""Whether calling a layer's parts would do nothing but compute: then a kernel may compute it, and else it calls them.

Looked at in every call, because hooks, other forwards and other weights may come at any time. A module's `__dict__` is asked,
which is faster than the module. A compiled program looks again, in every call, at all that was read while it was traced: so
Dynamo is given little to read, and asks the rest by `isinstance` (`Asked`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as everywhere

__all__ = [
    "PLAIN",
    "Asked",
    "Projections",
    "Weights",
    "asked",
    "attention_linears",
    "first_of",
    "forwards",
    "home",
    "linears",
    "mark_of",
    "marked_as",
    "marks",
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


class Asked(type):
    """Of classes that stand for a question: `isinstance(x, C)` is `C.holds(x)`, of a tensor in a trace `C.of_kind(type(x))`.

    Dynamo asks the object itself, and the answer is a constant: a compiled program does not look again at what was looked at.
    It looks again at the object's class (with torch 2.11 not where nothing else of the object changed); so an answer may hang
    on that, and, beside it, on what is read where it is asked.
    """

    holds: Callable[[Any], bool]
    of_kind: Callable[[type], bool]

    def __instancecheck__(cls, x: Any) -> bool:
        return cls.holds(x)

    def __subclasscheck__(cls, kind: type) -> bool:
        return cls.of_kind(kind)


def asked(holds: Callable[[Any], bool], of_kind: Callable[[type], bool] = lambda _: False) -> Asked:
    """The class that stands for a question."""
    return Asked("Asked", (), {"holds": staticmethod(holds), "of_kind": staticmethod(of_kind)})


_IsPlain = asked(lambda x: type(x) in PLAIN, lambda kind: kind in PLAIN)


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
    if traced:
        if (
            not isinstance(module, nn.Linear)
            or not _has_plain_forward(module)
            or not isinstance(module, _IsPlainLinear)
        ):
            return None
        parameters: Any = module._parameters
        return parameters["weight"], parameters["bias"]
    return None if type(module) is not nn.Linear else _of_linear(module)


def _of_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    held = module.__dict__
    if "forward" in held or _listened(held):
        return None
    own = held["_parameters"]
    weight = own.get("weight")  # FSDP and weight_norm of old keep it elsewhere
    return None if weight is None or "bias" not in own else (weight, own["bias"])


_IsPlainLinear = asked(lambda module: type(module) is nn.Linear and _of_linear(module) is not None)


def _listened(held: dict[str, Any]) -> bool:
    return bool(
        held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
    )


def _heard(module: nn.Module) -> bool:
    """`_listened`, by the module's attributes, at which programs look sooner than at entries of its `__dict__`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


# What a module runs.
_ANOTHER, _ITS_OWN, _KNOWN = range(3)


class Forwards(NamedTuple):
    """Some forwards, and the questions whether a module runs one of them or its class's, and whether it has no hooks."""

    known: tuple[Any, ...]
    run: Asked
    its_own: Asked


def forwards(*known: Any) -> Forwards:
    """For `runs`: these kernels' forwards."""
    return Forwards(
        known,
        asked(lambda module: _what(module, known) != _ANOTHER),
        asked(lambda module: _what(module, known) == _ITS_OWN),
    )


def runs(module: nn.Module, some: Forwards) -> bool:
    """Whether the module runs its class's forward, and a kernel may stand in for that, or one of these, and has no hooks."""
    if any(_HOOKS_OF_ALL):
        return False
    if not is_dynamo_compiling():
        what = _what(module, some.known)
        return what == _KNOWN or (what == _ITS_OWN and _may_be_swapped(module))
    if not _has_plain_forward(module) or not isinstance(module, some.run):
        return False
    if not isinstance(module, _HasOwnForward) and type(module).forward is None:  # so that the program looks at that
        return False
    return not (isinstance(module, some.its_own) and isinstance(module, _IsConditional)) or _may_be_swapped(module)


def _has_plain_forward(module: nn.Module) -> bool:
    """Not where it is another module's, or somebody listens and programs are to look at that.

    Asked in a trace, so that the program looks whether the module has a forward of its own, and which.
    """
    if isinstance(module, _HasHooksThatCount) and _heard(module):
        return False
    forward: Any = module.forward
    if not isinstance(module, _HasOwnForward):
        return True
    # Compared: what is only read is not looked at, and of a method not even what is compared.
    if not isinstance(module, _HasOwnMethod):
        return forward is not None
    function = forward.__func__
    if forward.__self__ is not module or function is None:
        return False
    # All that watch a kernel have one and the same code, which is what of a function is looked at.
    return not isinstance(module, _IsWatched) or function.__wrapped__ is not None


def _what(module: nn.Module, known: tuple[Any, ...]) -> int:
    held = module.__dict__
    if _listened(held):
        return _ANOTHER
    forward = held.get("forward")
    if forward is None:
        return _ITS_OWN
    if type(forward) is not MethodType or forward.__self__ is not module:
        return _ANOTHER
    function = forward.__func__
    if function is type(module).forward:
        return _ITS_OWN
    # Of what somebody else has wrapped the two differ, though it has both: it takes over what the wrapped one has.
    watched = getattr(function, "watches", None)
    if watched is not None and function.__wrapped__ is watched:
        function = watched
    return _KNOWN if any(function is one for one in known) else _ANOTHER


def _may_be_swapped(module: nn.Module) -> bool:
    cls = type(module)
    return not _is_conditional(cls) or bool(cls.kernel_condition(module))


def marks(*names: str) -> dict[str, Asked]:
    """For `mark_of`."""
    return {name: asked(partial(_is_marked, name=name)) for name in names}


def mark_of(module: nn.Module, among: dict[str, Asked]) -> str | None:
    """Which of those names the module's class is marked with; None if it is none of them."""
    if is_dynamo_compiling():
        return first_of(module, among)
    name = marked_as(type(module))
    return name if name in among else None


def first_of(x: Any, questions: dict[str, Asked]) -> str | None:
    """The name of the first that holds of x; None if none does."""
    for name, holds in questions.items():
        if isinstance(x, holds):
            return name
    return None


def _is_marked(module: nn.Module, name: str) -> bool:
    return marked_as(type(module)) == name


def marked_as(cls: type[nn.Module]) -> str | None:
    """The name that the class, or one that it comes from, is marked with, if it has the forward that was marked.

    Not where somebody put another one on the class since, or another method that it calls (the mark's condition knows), nor
    where the class has a `__call__` of its own around it.
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
    same: Any = cls.forward is marked.forward and cls.__call__ is marked.__call__
    return same and (knows is None or knows(cls))


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
_is_conditional._dynamo_marked_constant = True

# Whether compiled programs are to look whether hooks have come, which they do not unless they are told to.
_HasHooksThatCount = asked(
    lambda _: not getattr(sys.modules["torch._dynamo"].config, "skip_nnmodule_hook_guards", True)
)
_HasOwnForward = asked(lambda module: "forward" in module.__dict__)
_HasOwnMethod = asked(lambda module: type(module.__dict__.get("forward")) is MethodType)
_IsWatched = asked(lambda module: hasattr(module.__dict__["forward"].__func__, "__wrapped__"))
_IsConditional = asked(lambda module: _is_conditional(type(module)))


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
    traced = is_dynamo_compiling()
    for other in others:
        if other is not None and (
            not (isinstance(other, _IsPlain) if traced else type(other) in PLAIN) or other.dtype is not dtype
        ):
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
