"""Models whose norm and MLP can be fused, and kernels for both of them. Spawned processes import this file too."""

from __future__ import annotations

from pathlib import Path

import torch
from kernels_for_tests import write_kernel
from torch import nn

from kernelhub.layers.markers import use_kernel_forward_from_hub

KEY = (("Norm", "layers.*.norm"), ("Mlp", "layers.*.mlp"))


@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class SmallMlp(nn.Module):
    """Not kernel-aware."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.mlp = SmallMlp(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        x = self.norm(x)
        x = self.mlp(x)
        return residual + x


class Model(nn.Module):
    def __init__(self, layers: int = 2, size: int = 8, block: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(block(size) for _ in range(layers))
        self.norm = Norm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


LAYERS = """
import torch
from torch import nn
from torch.nn import functional as F


def normed(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return normed(x, self.weight, self.eps)


class NormMlp(nn.Module):  # reads the modules' weights when it is called
    can_torch_compile = True

    def forward(self, x):
        x = normed(x, self.norm.weight, self.norm.eps)
        return F.linear(F.relu(F.linear(x, self.mlp.up.weight)), self.mlp.down.weight)


class NormMlpLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp


class Calls(nn.Module):  # calls the modules themselves
    can_torch_compile = True

    def forward(self, x):
        return self.mlp(self.norm(x))


class CallsLayout(NormMlpLayout):
    pass


class Named(nn.Module):  # keeps the modules' weights under other names
    can_torch_compile = True

    def forward(self, x):
        x = normed(x, self.scale, self.eps)
        return self.last(F.relu(F.linear(x, self.first)))


class NamedLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.scale, self.eps = norm.weight, norm.eps
        self.first = mlp.up.weight
        self.last = mlp.down


class Laid(nn.Module):  # weights of its own, made of the modules'
    can_torch_compile = True

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return F.linear(F.relu(F.linear(x, self.scaled)), self.mlp.down.weight)


class LaidLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.scaled = nn.Parameter(mlp.up.weight.detach() * norm.weight.detach())
        self.eps, self.mlp = norm.eps, mlp


class Unset(Laid):
    pass


class UnsetLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.scaled = nn.Parameter(torch.empty_like(mlp.up.weight))
        self.eps, self.mlp = norm.eps, mlp


class Drawn(Laid):
    pass


class DrawnLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.up = nn.Linear(mlp.up.in_features, mlp.up.out_features)
        self.eps, self.mlp = norm.eps, mlp


class Loaded(Laid):
    pass


class LoadedLayout(LaidLayout):
    conversion_mapping = ["what a loader of checkpoints would do"]


class Renamed(NormMlp):
    pass


class RenamedLayout(NormMlpLayout):  # for a loader; its weights are the modules' own
    conversion_mapping = ["what a loader of checkpoints would do"]


class Changes(NormMlp):
    pass


class ChangesLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp
        del mlp.up


class Writes(NormMlp):
    pass


class WritesLayout(NormMlpLayout):
    def __init__(self, norm, mlp):
        super().__init__(norm, mlp)
        with torch.no_grad():
            norm.weight.mul_(1)


class Fails(NormMlp):
    pass


class FailsLayout(nn.Module):
    def __init__(self, norm):
        super().__init__()


class Alone(NormMlp):  # without a layout
    pass


class Wrong(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.mlp(self.norm(x)) + 1e-2


class WrongLayout(NormMlpLayout):
    pass


class Forward(nn.Module):
    has_backward = False

    def forward(self, x):
        return self.mlp(self.norm(x))


class ForwardLayout(NormMlpLayout):
    pass
"""


def write_fused(folder: Path) -> Path:
    return write_kernel(folder, name="fused", layers=LAYERS, init="from . import layers\n")
