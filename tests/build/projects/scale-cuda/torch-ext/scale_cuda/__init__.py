"""x * factor as one CUDA op on torch's stable ABI."""

import torch

from ._ops import ops


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    output = torch.empty_like(x)
    ops.scale(output, x, factor)
    return output
