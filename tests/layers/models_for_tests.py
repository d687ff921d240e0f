"""Small kernel-aware models, in a module of their own so that they pickle and spawned processes can import them."""

from __future__ import annotations

import torch
from torch import nn

from kernelhub.layers.markers import use_kernel_forward_from_hub, use_kernelized_func


@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@use_kernel_forward_from_hub("Gate")
class Gate(nn.Module):
    """A layer without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@use_kernel_forward_from_hub("Mlp")
class Mlp(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


@use_kernel_forward_from_hub("Linear")
class Linear(nn.Linear):
    """A layer whose kernel takes any weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.linear = nn.Linear(size, size)
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate(self.linear(self.norm(x)))


class Model(nn.Module):
    def __init__(self, layers: int = 2, size: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.norm = Norm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@use_kernel_forward_from_hub("rotary")
def rotate(q: torch.Tensor, k: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a rotary embedding."""
    return q * scale, k * scale


@use_kernelized_func(rotate)
class Attention(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = rotate(self.linear(x), x)
        return q + k
