"""Rotary position embeddings: q and k turned in one call and one pass over memory, the same rounding."""

from __future__ import annotations

from . import layers
from .functions import apply_rotary
from .tables import rotary_tables

__all__ = ["apply_rotary", "layers", "rotary_tables"]
