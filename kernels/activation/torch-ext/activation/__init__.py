"""Activations: one pass over memory where the usual formulas take several."""

from __future__ import annotations

from . import layers
from .functions import (
    gelu,
    gelu_and_mul,
    gelu_fast,
    gelu_new,
    gelu_quick,
    gelu_tanh,
    gelu_tanh_and_mul,
    mish,
    relu_squared,
    silu,
    silu_and_mul,
    tanh,
)

__all__ = [
    "gelu",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "layers",
    "mish",
    "relu_squared",
    "silu",
    "silu_and_mul",
    "tanh",
]
