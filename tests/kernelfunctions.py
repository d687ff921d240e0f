"""Public functions of the kernels with compiled ops, and inputs: what tests of compilers, streams, graphs and devices call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Function:
    """One function of a kernel."""

    project: str
    of: Callable[[ModuleType], Callable[..., Any]]
    inputs: Callable[[int], Arguments]  # of so many rows, on the CPU
    rows: tuple[int | None, ...]  # which dimension of each input counts them
    leaves: int  # the first so many inputs have gradients

    def arguments(self, rows: int, device: str = "cpu") -> Arguments:
        return tuple(x.to(device) for x in self.inputs(rows))

    def step(self, module: ModuleType, call: Callable[..., Any] | None = None) -> Callable[..., list[Tensor]]:
        """Takes the inputs and returns the results and the gradients of each result's product with itself."""
        call = call or self.of(module)

        def both(*arguments: Any) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in arguments[: self.leaves]]
            results = call(*leaves, *arguments[self.leaves :])
            results = [results] if isinstance(results, Tensor) else list(results)
            return [*results, *torch.autograd.grad(results, leaves, [x.detach() for x in results])]

        return both


def _heads(rows: int) -> Arguments:
    q, k = (numbers(2, rows, heads, 64, seed=heads).transpose(1, 2) for heads in (4, 2))
    return q, k, numbers(2, rows, 64, seed=1), numbers(1, rows, 64, seed=2).expand(2, -1, -1)


def _labels(rows: int, classes: int) -> Tensor:
    labels = torch.arange(rows) * 7 % classes
    labels[rows // 2] = -100
    return labels


FUNCTIONS = {
    "rms_norm": Function("norm", lambda m: m.rms_norm, lambda n: (numbers(n, 96), numbers(96, seed=1)), (0, None), 2),
    "add_rms_norm": Function(
        "norm",
        lambda m: m.add_rms_norm,
        lambda n: (numbers(n, 96), numbers(n, 96, seed=1), numbers(96, seed=2)),
        (0, 0, None),
        3,
    ),
    "layer_norm": Function(
        "norm",
        lambda m: m.layer_norm,
        lambda n: (numbers(n, 96), numbers(96, seed=1), numbers(96, seed=2)),
        (0, None, None),
        3,
    ),
    "silu_and_mul": Function(
        "activation", lambda m: m.silu_and_mul, lambda n: (numbers(n, 96), numbers(n, 96, seed=1)), (0, 0), 2
    ),
    "gelu_tanh_and_mul": Function("activation", lambda m: m.gelu_tanh_and_mul, lambda n: (numbers(n, 192),), (0,), 1),
    "gelu_quick": Function("activation", lambda m: m.gelu_quick, lambda n: (numbers(n, 96),), (0,), 1),
    "apply_rotary": Function("rotary", lambda m: m.apply_rotary, _heads, (2, 2, 1, 1), 2),
    "cross_entropy": Function(
        "loss", lambda m: m.cross_entropy, lambda n: (numbers(n, 1000), _labels(n, 1000)), (0, 0), 1
    ),
    "linear_cross_entropy": Function(
        "loss",
        lambda m: m.linear_cross_entropy,
        lambda n: (numbers(n, 64), numbers(1000, 64, seed=1), _labels(n, 1000)),
        (0, None, 0),
        2,
    ),
}
