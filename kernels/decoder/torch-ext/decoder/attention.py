"""An attention's projections and its rotary embedding as one, with a backward of their own; and what comes before `o_proj`.

The backward turns the gradients of q and k back in one call, and makes the input's gradient in one place: the products of
k and v are added where that of q lies. PyTorch's engine makes three tensors, and adds them in two passes more. Where each
head of q and k has a norm between the two, the projections are one without the rotary embedding.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kernelhub import get_kernel_dep

from . import hopper
from .plain import (
    PLAIN,
    Projections,
    attention_linears,
    forwards,
    mark_of,
    marks,
    runs,
    takes_projections,
    without_autocast,
)
from .sums import add_product_

rotary = get_kernel_dep("kernelhub/rotary")

__all__ = [
    "KINDS",
    "Kind",
    "add_product",
    "added",
    "attention",
    "has_plain_parts",
    "keys_and_values",
    "kind_of",
    "rotary",
]

# What the forwards call that are of this formula, by the names that their modules have for it.
_FUNCTION, _ATTENTIONS, _EAGER = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
_LAYER = "rotary_pos_emb"
_ROTARY = forwards(rotary.layers.rotary_pos_emb.forward)
_TRANSPOSED = rotary.compiled.TRANSPOSED


class Kind(NamedTuple):
    """Of an attention: whether it has a window, its own or the configuration's, and norms of q and k before they are turned."""

    windowed: bool = False
    normed: bool = False


# By the names that layers are marked with.
KINDS = {
    "RotaryAttention": Kind(),
    "WindowedRotaryAttention": Kind(windowed=True),
    "NormedRotaryAttention": Kind(windowed=True, normed=True),
}


_MARKS = marks(*KINDS)


def kind_of(module: nn.Module) -> Kind | None:
    """Of an attention by its mark; None of any other."""
    mark = mark_of(module, _MARKS)
    return None if mark is None else KINDS[mark]


# The module


def attention(
    module: nn.Module,
    x: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
    kind: Kind,
) -> tuple[Tensor, Tensor | None]:
    """What the forward of the module's class gives."""
    if may_take(x, tables):
        projections = attention_linears(module)
        made = None if projections is None else _projected(module, x, tables, projections, kind.normed)
        if made is not None:
            found, weights = _attend(module, *made, mask, cache, kwargs, kind.windowed)
            return module.o_proj(found), weights
    return type(module).forward(module, x, tables, mask, cache, **kwargs)


def added(
    module: nn.Module,
    x: Tensor,
    residual: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
    kind: Kind,
) -> tuple[Tensor, bool] | None:
    """What the module gives for x, added to the residual where one op does both, and whether it is.

    None where the module is to be called.
    """
    projections = attention_linears(module)
    if projections is None or projections.o is None or projections.o_bias is not None:
        return None
    wide = projections.o.shape[1]
    # What the op will be asked to take: of x's shape where the heads are as wide as the model, else of this one.
    like = x if x.shape[-1] == wide or type(x) not in PLAIN else x.detach()[..., :1].expand(*x.shape[:-1], wide)
    adds = hopper.takes_add(like, projections.o, residual)
    made = _projected(module, x, tables, projections, kind.normed, wanted=adds)
    if made is None:
        return None
    found, _ = _attend(module, *made, mask, cache, kwargs, kind.windowed)
    if hopper.takes_add(found, projections.o, residual):
        return add_product(found, projections.o, residual), True
    return F.linear(found, projections.o), False


def may_take(x: Tensor, tables: Any) -> bool:
    """Whether it is worth while to look for the weights: with gradients on a GPU, and where there is an op.

    On a CPU the backward saves nothing that counts, and an `autograd.Function` costs: 83.4 ms for 82.8 with 512 rows of 1024.
    """
    return tables is not None and (_has_backward(x) or hopper.may_take_rows(x))


def _has_backward(x: Tensor) -> bool:
    return torch.is_grad_enabled() and not x.is_cpu


def _projected(
    module: nn.Module,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    projections: Projections,
    normed: bool,
    wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q and k turned, and v, (batch, tokens, heads * head_dim) each; None where the class's forward is to make them.

    That is where the tensors are none that `takes_projections` knows, where the rotary embedding is not Llama's or
    somebody's kernel stands in for it, and, unless they are `wanted`, where there is nothing to gain. `normed`: the module
    has norms of q and k, which are called before they are turned.
    """
    cos, sin = tables
    head_dim = module.head_dim
    if not takes_projections(x, projections, cos, sin, head_dim) or not _is_llamas(module):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or any(of is not None and of.requires_grad for of in projections[:6])
    ):
        if not normed:
            return _Projections.apply(head_dim, x, *projections[:6], cos, sin)
        return _normed(module, _Projections.apply(head_dim, x, *projections[:6], None, None), cos, sin)
    if normed:
        return _normed(module, _products(x, projections), cos, sin) if wanted else None
    if hopper.takes_projections(x, projections, cos, sin, head_dim):
        return hopper.rotary_projections(x, projections, cos, sin, head_dim)
    return _apart(x, projections, cos, sin, head_dim) if wanted else None


def _normed(
    module: nn.Module, products: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, each head by the module's norm of it, turned; and v."""
    q, k, v = products
    heads = (*q.shape[:-1], -1, module.head_dim)
    q, k = module.q_norm(q.view(heads)), module.k_norm(k.view(heads))
    q, k = rotary.apply_rotary(q, k, cos, sin, 2)
    return q.flatten(-2), k.flatten(-2), v


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
    windowed: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the attention gives, (batch, tokens, heads * head_dim): by the functions that the class's forward calls."""
    scope: dict[str, Any] = type(module).forward.__globals__
    shape = q.shape[:-1]
    heads = (*shape, -1, module.head_dim)
    q, k, v = q.view(heads).transpose(1, 2), k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    interface = scope[_ATTENTIONS].get_interface(module.config._attn_implementation, scope[_EAGER])
    options = {"sliding_window": _window(module)} if windowed else {}
    dropout = module.attention_dropout if module.training else 0.0
    made, weights = interface(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **options, **kwargs)
    return made.reshape(*shape, -1).contiguous(), weights


def _window(module: nn.Module) -> int | None:
    """The layer's own, or the one of all layers."""
    held = module.__dict__  # to ask a module for what it does not have costs microseconds
    return held["sliding_window"] if "sliding_window" in held else getattr(module.config, "sliding_window", None)


# Keys and values alone


def has_plain_parts(module: nn.Module) -> bool:
    """Whether its projections are plain linear layers that nobody listens to, and between them are Llama's rotary embedding and
    PyTorch's attention, as transformers calls it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # here, where such a model is

    projections = attention_linears(module)
    if projections is None or projections.o is None or not _is_llamas(module):
        return False
    interfaces: Any = type(module).forward.__globals__[_ATTENTIONS]
    return interfaces.get_interface(module.config._attn_implementation, None) is sdpa_attention_forward


def keys_and_values(module: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Those of x, (batch, heads, tokens, head_dim) each, as the forward of the class makes them, for what `has_plain_parts`."""
    heads = (*x.shape[:-1], -1, module.head_dim)
    k, v = module.k_proj(x).view(heads), module.v_proj(x).view(heads).transpose(1, 2)
    kind = kind_of(module)
    k = (module.k_norm(k) if kind is not None and kind.normed else k).transpose(1, 2)
    turn: Any = type(module).forward.__globals__[_FUNCTION]
    _, k = turn(k[:, :1], k, *tables)  # it turns two, and there are no queries: one head, the least that it takes
    return k, v


# The rotary embedding


def _is_llamas(module: nn.Module) -> bool:
    """Whether the rotary embedding that the class's forward calls is Llama's, by itself or with our kernel."""
    forward: Any = type(module).forward
    scope = getattr(forward, "__globals__", {})
    if _ATTENTIONS not in scope or _EAGER not in scope:  # a forward that somebody wrapped
        return False
    function = scope.get(_FUNCTION)
    if isinstance(function, nn.Module):
        kind = type(function)
        return (
            getattr(kind, "kernel_layer_name", None) == _LAYER
            and runs(function, _ROTARY)
            and _is_plain(rotary.formulas.of(kind))
        )
    return isinstance(function, FunctionType) and _has_plain_formula(function, forward)


def _has_plain_formula(function: FunctionType, forward: FunctionType) -> bool:
    """Whether it is of the module that the forward is from, not one that somebody put there; asked with a few numbers, once."""
    if function.__globals__ is not forward.__globals__:
        return False
    found = _known.get(function)
    if found is None:
        with _disable_current_modes():  # not by the tensors of a trace that may be going on
            found = _known[function] = _is_plain(rotary.formulas._formula(function))
    return found


# What dynamo would otherwise trace into. `torch.compiler.assume_constant_result` does just this, and imports dynamo: 1 s.
_has_plain_formula._dynamo_marked_constant = True
_known: dict[FunctionType, bool] = {}


def _is_plain(formula: int) -> bool:
    """Pairs i and i + head_dim / 2, each product rounded: all else says something of tables of other dtypes."""
    return formula & ~rotary.formulas.CAST_BACK == 0  # UNKNOWN has all bits


def _apart(
    x: Tensor, projections: Projections, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned, and v, by three products and the rotary kernel."""
    q, k, v = _products(x, projections)
    return *_turned(q, k, cos, sin, head_dim, 0), v


def _products(x: Tensor, projections: Projections) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (F.linear(x, *projections[at : at + 2]) for at in (0, 2, 4))
    return q, k, v


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int, form: int) -> tuple[Tensor, Tensor]:
    """q and k, (..., heads * head_dim), turned; or with TRANSPOSED as `form`, gradients of turned ones turned back."""
    shapes = q.shape, k.shape
    q, k = (of.reshape(*of.shape[:-1], of.shape[-1] // head_dim, head_dim) for of in (q, k))
    if rotary.compiled.takes(q, k, cos, sin, 2, head_dim, False):
        q, k = rotary.compiled.rotate(q, k, cos, sin, 2, head_dim, form)
    elif form:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        q, k = _turned_back(q, cos, sin), _turned_back(k, cos, sin)
    else:
        q, k = rotary.apply_rotary(q, k, cos, sin, 2)
    return q.reshape(shapes[0]), k.reshape(shapes[1])


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (grad * sin).chunk(2, -1)
    return grad * cos + torch.cat((second, -first), -1)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head_dim: int,
        x: Tensor,
        q_weight: Tensor,
        q_bias: Tensor | None,
        k_weight: Tensor,
        k_bias: Tensor | None,
        v_weight: Tensor,
        v_bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With cos and sin, (batch or 1, tokens, head_dim), q and k are turned."""
        projections = Projections(q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, None, None)
        if cos is None or sin is None:
            q, k, v = _products(x, projections)
        elif hopper.takes_projections(x, projections, cos, sin, head_dim):
            q, k, v = hopper.rotary_projections(x, projections, cos, sin, head_dim)
        else:
            q, k, v = _apart(x, projections, cos, sin, head_dim)
        _, for_x, for_q, _, for_k, _, for_v, *_ = ctx.needs_input_grad
        kept = x if for_q or for_k or for_v else None
        weights = (q_weight, k_weight, v_weight) if for_x else (None, None, None)
        ctx.save_for_backward(kept, *weights, cos, sin)
        ctx.head_dim = head_dim
        return q, k, v

    @staticmethod
    @without_autocast
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Every operation here is differentiable, for gradients of gradients.
        x, q_weight, k_weight, v_weight, cos, sin = ctx.saved_tensors
        _, for_x, *needs = ctx.needs_input_grad
        shape = q_grad.shape[:-1]
        if cos is not None:
            q_grad, k_grad = _turned(q_grad, k_grad, cos, sin, ctx.head_dim, _TRANSPOSED)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in (q_grad, k_grad, v_grad)]
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        found: list[Tensor | None] = []
        for grad, for_weight, for_bias in zip(grads, needs[:6:2], needs[1:6:2], strict=True):
            found.append(grad.t().mm(rows) if for_weight else None)
            found.append(grad.sum(0) if for_bias else None)
        x_grad = None
        if for_x:
            x_grad = grads[0].mm(q_weight)
            for grad, weight in zip(grads[1:], (k_weight, v_weight), strict=True):
                add_product_(x_grad, grad, weight)
            x_grad = x_grad.view(*shape, q_weight.shape[1])
        return None, x_grad, *found, None, None


# The product after it


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """`residual + F.linear(x, weight)` by the op that does both, with its gradients; for what `hopper.takes_add`."""
    if torch.is_grad_enabled():
        return _AddProduct.apply(x, weight, residual)
    return hopper.add_product(x, weight, residual)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return hopper.add_product(x, weight, residual)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        x_grad = None if weight is None else rows.mm(weight).view(*grad.shape[:-1], weight.shape[1])
        weight_grad = None if x is None else rows.t().mm(x.reshape(-1, x.shape[-1]))
        return x_grad, weight_grad, grad
