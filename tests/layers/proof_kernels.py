"""Layers whose kernels are wrong in one way each: what `verify` must catch. Spawned processes do not need this file."""

from __future__ import annotations

import torch
from torch import nn

from kernelhub.layers.markers import use_kernel_forward_from_hub


@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    """RMSNorm as models have it: in float32, rounded, then multiplied by the weight."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@use_kernel_forward_from_hub("Act")
class Act(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@use_kernel_forward_from_hub("Half")
class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)[:, :4]


@use_kernel_forward_from_hub("Many")
class Many(nn.Module):
    """Nested results, an argument that is written to, one that is no tensor."""

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, cache: torch.Tensor | None = None):
        if cache is not None:
            cache.add_(1)
        return {"first": (x * scale, None), "second": [x + 1, scale]}


@use_kernel_forward_from_hub("Batch")
class Batch(nn.BatchNorm1d):
    """A layer that changes its buffers in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


HEAD = """
import threading

import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

"""

# By name: what stands for the layer, and the body of a kernel's forward for it that is right.
RIGHT = {
    "Norm": "def forward(self, x):\n        return norm(x, self.weight, self.eps)",
    "Act": "def forward(self, x):\n        return nn.functional.relu(x)",
    "Batch": "def forward(self, x):\n        return nn.BatchNorm1d.forward(self, x)",
    "Many": """def forward(self, x, scale=2.0, *, cache=None):
        if cache is not None:
            cache.add_(1)
        return {"first": (x * scale, None), "second": [1 + x, scale]}""",
}


def source(forward: str, before: str = "") -> str:
    """The `layers` of a kernel whose layer `Kernel` has this forward."""
    return f"{HEAD}\n{before}\n\nclass Kernel(nn.Module):\n    {forward}\n"
