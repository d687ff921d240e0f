import torch

from .._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("square"))
def _square(input: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input)


@torch.library.register_fake(add_op_namespace_prefix("cube"))
def _cube(input: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input)


def square(x: torch.Tensor) -> torch.Tensor:
    return ops.square(x.contiguous())
