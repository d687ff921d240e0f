"""Parts of decoder layers as one: an RMS norm with the gated MLP after it, and the layer with its residual adds."""

from __future__ import annotations

from . import last, layers
from .functions import rms_norm_gated_mlp

__all__ = ["last", "layers", "rms_norm_gated_mlp"]
