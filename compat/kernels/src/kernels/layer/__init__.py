"""Layers: what marks them, what names their kernels, and what puts these in their place."""

from typing import Any

from torch import nn

from kernelhub.layers import kernelize as _kernelhub
from kernelhub.layers.device import CUDAProperties, Device, ROCMProperties
from kernelhub.layers.mapping import register_kernel_mapping, use_kernel_mapping
from kernelhub.layers.markers import (
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_func_from_hub,
    use_kernelized_func,
)
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.repositories import (
    FuncRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedFuncRepository,
    LockedLayerRepository,
)

__all__ = [
    "CUDAProperties",
    "Device",
    "FuncRepository",
    "KernelizeFallback",
    "LayerRepository",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "LockedFuncRepository",
    "LockedLayerRepository",
    "Mode",
    "ROCMProperties",
    "kernelize",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub",
    "use_kernel_func_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
]


def kernelize(model: nn.Module, *, group: Any = False, **options: Any) -> nn.Module:
    """`kernelhub.kernelize`, on each rank alone unless `group` says otherwise.

    Libraries that import `kernels` know of no other ranks: they kernelize again in `train()` and `eval()`, on whatever rank.
    """
    return _kernelhub.kernelize(model, group=group, **options)
