"""Which formula a function has that is marked as `rotary_pos_emb`, or a module that makes its tables.

transformers 5.22 marks functions of six formulas by this one name: they differ in what makes a pair, in the direction, in
where they round, in the dtype of the result, and in the width of cos and sin. So a function is asked, once, with a few numbers.
So is a class that makes tables, of which there are those of three layouts, and those whose result is float32 whatever the
dtype.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .compiled import INTERLEAVED, INVERSE, ROUND_ONCE
from .functions import apply_rotary
from .tables import HALVES, NEIGHBOURS, PAIRS, rotary_tables

__all__ = ["CAST_BACK", "IN_FLOAT32", "PAIRED", "UNKNOWN", "is_static", "of", "of_tables"]

# Beside INTERLEAVED, INVERSE and ROUND_ONCE, which say what it is with tables of the elements' dtype:
CAST_BACK = 16  # with float32 tables the result has q's dtype, not float32
PAIRED = 32  # cos and sin have one element for each pair
UNKNOWN = -1
# Beside a layout of `tables.py`: the tables are float32, whatever dtype the model computes in.
IN_FLOAT32 = 4

_FORMS = tuple(sum(bits) for bits in itertools.product((0, INTERLEAVED), (0, INVERSE), (0, ROUND_ONCE)))
_Function = Callable[..., tuple[Tensor, Tensor]]
# By class, with the forward that it had: somebody may put another one there.
_known: dict[type, tuple[Any, int]] = {}
_known_tables: dict[type, tuple[Any, int]] = {}


def of(cls: type[nn.Module]) -> int:
    """The formula of the class's forward, as bits; UNKNOWN where it is none that the op has."""
    forward, found = _known.get(cls, (None, UNKNOWN))
    if forward is not cls.forward:
        function: Any = cls.forward
        if not is_static(cls):
            function = functools.partial(function, None)
        # Not by the tensors of a trace that may be going on: what is asked for is values.
        with _disable_current_modes():
            found = _formula(function)
        _known[cls] = cls.forward, found
    return found


def is_static(cls: type[nn.Module]) -> bool:
    """Whether the class's forward is the function itself, which takes no module."""
    return isinstance(inspect.getattr_static(cls, "forward"), staticmethod)


def of_tables(cls: type[nn.Module]) -> int:
    """How the class's forward lays out its tables, and IN_FLOAT32 or not; UNKNOWN where it does something else.

    It is asked in the place of a module of a static rope type, which reads no more than the layers here do.
    """
    forward, found = _known_tables.get(cls, (None, UNKNOWN))
    if forward is not cls.forward:
        with _disable_current_modes():
            found = _tables_formula(cls)
        _known_tables[cls] = cls.forward, found
    return found


# What dynamo would otherwise trace into. `torch.compiler.assume_constant_result` does just this, and imports dynamo: 1 s.
of._dynamo_marked_constant = True
of_tables._dynamo_marked_constant = True
is_static._dynamo_marked_constant = True


def _formula(function: _Function) -> int:
    q, k, cos, sin = _numbers()
    for paired in (0, PAIRED):
        width = 4 if paired else 8
        tables = cos[..., :width], sin[..., :width]
        for form in _FORMS:
            if _agree(function, form, q, k, *(table.to(q.dtype) for table in tables)):
                return form | paired | _with_float32(function, form, q, k, *tables)
    return UNKNOWN


def _with_float32(function: _Function, form: int, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> int:
    return CAST_BACK if _agree(function, form | ROUND_ONCE, q, k, cos, sin) else 0


def _agree(function: _Function, form: int, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the function gives the bits of the form, with heads before and behind tokens."""
    options = {
        "interleaved": bool(form & INTERLEAVED),
        "inverse": bool(form & INVERSE),
        "round_once": bool(form & ROUND_ONCE),
        "rotary_dim": q.shape[-1],
    }
    for dim in (1, 2):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        try:
            got = function(q, k, cos, sin, unsqueeze_dim=dim)
        except Exception:  # noqa: BLE001 - whatever the function raises, it has not this formula
            return False
        expected = apply_rotary(q, k, cos, sin, dim, **options)
        if not _same(got, expected):
            return False
    return True


def _same(got: Any, expected: tuple[Tensor, Tensor]) -> bool:
    return (
        isinstance(got, tuple)
        and len(got) == len(expected)
        and all(isinstance(a, Tensor) and a.dtype is b.dtype for a, b in zip(got, expected, strict=True))
        and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    )


def _numbers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k, (2, tokens, heads, 8) in bfloat16, cos and sin, (2, tokens, 8) in float32: of no pattern that a formula could share."""

    def numbers(*shape: int, start: int, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        ones = torch.arange(start, start + count, dtype=torch.float32, device="cpu")
        return (ones * 12.9898).sin().reshape(shape).to(dtype)

    return (
        numbers(2, 3, 4, 8, start=1, dtype=torch.bfloat16),
        numbers(2, 3, 2, 8, start=201, dtype=torch.bfloat16),
        numbers(2, 3, 8, start=301, dtype=torch.float32),
        numbers(2, 3, 8, start=401, dtype=torch.float32),
    )


def _tables_formula(cls: type[nn.Module]) -> int:
    for layout in (HALVES, NEIGHBOURS, PAIRS):
        for in_float32 in (0, IN_FLOAT32):
            if all(_makes(cls, layout, dtype, in_float32) for dtype in (torch.bfloat16, torch.float32)):
                return layout | in_float32
    return UNKNOWN


def _makes(cls: type[nn.Module], layout: int, dtype: torch.dtype, in_float32: int) -> bool:
    """Whether the class's forward makes the tables of that layout for x of that dtype."""
    inv_freq = _numbers()[2][0, 0, :6].abs()
    positions = torch.tensor([[3, 1, 700], [0, 2, 100_000]], device="cpu")
    x = torch.zeros(2, 3, 4, dtype=dtype, device="cpu")
    forward: Any = cls.forward
    try:
        if "layer_type" in inspect.signature(forward).parameters:
            module = SimpleNamespace(rope_type={"a": "default"}, a_inv_freq=inv_freq, a_attention_scaling=1.25)
            got = forward(module, x, positions, "a")
        else:
            module = SimpleNamespace(rope_type="default", inv_freq=inv_freq, attention_scaling=1.25)
            got = forward(module, x, positions)
    except Exception:  # noqa: BLE001 - whatever it raises, it reads or does something else
        return False
    expected = rotary_tables(
        inv_freq,
        positions,
        1.25,
        torch.float32 if in_float32 else dtype,
        interleaved=layout == NEIGHBOURS,
        paired=layout == PAIRS,
    )
    return _same(got, expected)
