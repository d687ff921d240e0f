"""Layers: what marks them, what names their kernels, and what puts these in their place."""

from kernelhub.layers.device import CUDAProperties, Device, ROCMProperties
from kernelhub.layers.kernelize import kernelize
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
