"""The functions as layers, those that are one call of PyTorch's without a call in between.

They read nothing of the module whose `forward` they take the place of, but for `TorchGELU`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functions

__all__ = [
    "FastGELU",
    "GeGLUMLP",
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "GeluTanhAndMul",
    "Mish",
    "NewGELU",
    "QuickGELU",
    "ReLUSquared",
    "SiLU",
    "SiluAndMul",
    "SwiGLUMLP",
    "Tanh",
    "TorchGELU",
]


class SiLU(nn.Module):
    """`x * sigmoid(x)`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input)


class GeLU(nn.Module):
    """The exact GELU."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class GeluTanh(nn.Module):
    """GELU by its tanh approximation."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_tanh(input)


class NewGELU(nn.Module):
    """GELU by its tanh approximation, written out in the original."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_new(input)


class FastGELU(nn.Module):
    """GELU by its tanh approximation, with a shortened constant."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_fast(input)


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 * x)`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_quick(input)


class Mish(nn.Module):
    """`x * tanh(softplus(x))`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input)


class ReLUSquared(nn.Module):
    """`max(x, 0)**2`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.relu_squared(input)


class Tanh(nn.Module):
    """`tanh(x)`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(input)


class SiluAndMul(nn.Module):
    """`silu(a) * b` for the halves a and b of the last dimension."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.silu_and_mul(input)


class GeluAndMul(nn.Module):
    """`gelu(a) * b` for the halves a and b of the last dimension."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_and_mul(input)


class GeluTanhAndMul(nn.Module):
    """`gelu_tanh(a) * b` for the halves a and b of the last dimension."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return functions.gelu_tanh_and_mul(input)


class TorchGELU(nn.Module):
    """As `torch.nn.GELU`: reads `approximate`, "none" or "tanh"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return functions.gelu_tanh(input)
        return F.gelu(input, approximate=self.approximate)


class SwiGLUMLP(nn.Module):
    """Reads `gate_proj`, `up_proj` and `down_proj`: `down(silu(gate(x)) * up(x))`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functions.silu_and_mul(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(nn.Module):
    """Reads `gate_proj`, `up_proj` and `down_proj`: `down(gelu_tanh(gate(x)) * up(x))`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functions.gelu_tanh_and_mul(self.gate_proj(x), self.up_proj(x)))
