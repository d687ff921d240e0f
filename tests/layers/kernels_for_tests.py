"""Small kernels in folders, written by the tests that load them. Spawned processes import this file too."""

from __future__ import annotations

import json
from pathlib import Path

INIT = """
import torch
from . import layers

def rotate(q, k, scale=1.0):
    return q * scale + 100, k * scale + 100

rotate.can_torch_compile = True

def no_backward(x):
    return x + 1

no_backward.has_backward = False
"""

# Each layer marks its output, so that a test sees which forward ran: RMSNorm adds nothing, Marked adds 1000.
LAYERS = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class Marked(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        return hidden_states * self.weight + 1000


class Gate(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return x + 1000


class Forward(nn.Module):  # for training, not for torch.compile
    def forward(self, x):
        return x + 1000


class NoBackward(nn.Module):
    has_backward = False
    can_torch_compile = True

    def forward(self, x):
        return torch.ops.kernelhub_tests.plus_thousand(x)


class _Double(torch.autograd.Function):  # with a backward, without rules for vmap and forward-mode AD
    @staticmethod
    def forward(ctx, x):
        return x + 1000

    @staticmethod
    def backward(ctx, grad):
        return grad


class Function(nn.Module):
    def forward(self, x):
        return _Double.apply(x)


class NoBackwardNoCompile(nn.Module):
    has_backward = False

    def forward(self, x):
        return x + 1000


class Mlp(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.up.weight).relu(), self.down.weight)


class CallingMlp(nn.Module):
    def forward(self, x):
        return self.down(self.up(x).relu())

    forward.calls_children = True


class Anything(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight)

    forward.takes_dtensor = True


class NotOnCpus(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight)

    forward.runs_original_on = ("cpu", "mps")


class NotOnGpus(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight)

    forward.runs_original_on = ("cuda",)


class OtherNames(nn.Module):
    def forward(self, hidden):
        return hidden + 1000


class TooMany(nn.Module):
    def forward(self, x, y):
        return x


class Constructed(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x


class Members(nn.Module):
    scale = 2

    def helper(self):
        return 2

    def forward(self, x):
        return x


def _misnamed(self, x):
    return x + 1000


class Misnamed(nn.Module):
    forward = _misnamed


class Keywords(nn.Module):
    def forward(self, x, *, scale=1.0):
        return x * scale + 1000


class Required(nn.Module):
    def forward(self, x, scale):
        return x * scale


class NotAModule:
    def forward(self, x):
        return x


class Rotary(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, scale=1.0):
        return q * scale + 200, k * scale + 200


def plain_function(x):
    return x


try:
    torch.ops.kernelhub_tests.plus_thousand
except (AttributeError, RuntimeError):
    # An op without a backward: torch refuses to differentiate it.
    torch.library.custom_op("kernelhub_tests::plus_thousand", lambda x: x + 1000, mutates_args=(), schema="(Tensor x) -> Tensor")
    torch.library.register_fake("kernelhub_tests::plus_thousand", lambda x: torch.empty_like(x))
"""


def write_kernel(
    folder: Path, *, name: str = "small", layers: str = LAYERS, init: str = INIT, backends: tuple[str, ...] = ("cpu",)
) -> Path:
    """A kernel repository with a noarch variant for each backend; returns its folder."""
    for backend in backends:
        build = folder / "build" / f"torch-{backend}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "__init__.py").write_text(init)
        (build / "layers.py").write_text(layers)
        metadata = {
            "name": name,
            "id": f"_{name.replace('-', '_')}_tests",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata))
    return folder
