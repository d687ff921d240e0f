"""Cross entropy over large vocabularies, with and without the projection before it: no copy of all logits in float32."""

from __future__ import annotations

from . import layers
from .functions import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "layers", "linear_cross_entropy"]
