"""RMS and layer normalisation: fewer passes over memory than the usual formulas, the same rounding."""

from __future__ import annotations

from . import layers
from .functions import (
    add_rms_norm,
    layer_norm,
    layer_norm_cast_last,
    rms_norm,
    rms_norm_cast_last,
    rms_norm_gate_first,
    rms_norm_gated,
    rms_norm_gated_cast_last,
    rms_norm_weight_dtype,
    rms_norm_zero_centered,
)

__all__ = [
    "add_rms_norm",
    "layer_norm",
    "layer_norm_cast_last",
    "layers",
    "rms_norm",
    "rms_norm_cast_last",
    "rms_norm_gate_first",
    "rms_norm_gated",
    "rms_norm_gated_cast_last",
    "rms_norm_weight_dtype",
    "rms_norm_zero_centered",
]
