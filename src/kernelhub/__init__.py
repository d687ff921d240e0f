"""Swap faster compute kernels into PyTorch models, prove each swap, and undo it.

The public names are imported when they are first used, so that `import kernelhub` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "kernelhub.errors": (
        "BuildFailed CompatibilityWarning HubUnavailable IncompatibleDevice IntegrityError InvalidMetadata InvalidReference KernelCycle "
        "KernelHubError KernelHubWarning KernelImportError KernelNotFound LayerContractError MissingDependency NoCompatibleVariant "
        "NoKernelForLayer PublishConflict RankFailed RanksDisagree StoreError UntrustedKernel"
    ),
    "kernelhub.benchmark": "Benchmark",
    "kernelhub.config.kernel_config": "KernelConfig",
    "kernelhub.core.metadata": "Metadata",
    "kernelhub.core.trust": "TrustPolicy",
    "kernelhub.core.variants": "VariantAccepted VariantRejected",
    "kernelhub.hub.api": (
        "get_kernel get_kernel_dep get_kernel_variants get_loaded_kernels get_local_kernel get_locked_kernel has_kernel "
        "install_kernel load_kernel"
    ),
    "kernelhub.hub.client": "Hub default_hub",
    "kernelhub.hub.importer": "LoadedKernel RepoInfo",
    "kernelhub.layers.capture": "Sample",
    "kernelhub.layers.device": "CUDAProperties Device ROCMProperties",
    "kernelhub.layers.kernelize": "kernelize kernelized unkernelize",
    "kernelhub.layers.mapping": "register_kernel_mapping use_kernel_mapping",
    "kernelhub.layers.markers": (
        "replace_kernel_forward_from_hub use_kernel_forward_from_hub use_kernel_func_from_hub use_kernelized_func"
    ),
    "kernelhub.layers.mode": "KernelizeFallback Mode",
    "kernelhub.layers.plan": "KernelPlan plan_kernels",
    "kernelhub.layers.report": "kernel_report",
    "kernelhub.layers.report_values": "KernelReport",
    "kernelhub.layers.repositories": (
        "FuncRepository LayerRepository LocalFuncRepository LocalLayerRepository LockedFuncRepository "
        "LockedLayerRepository"
    ),
    "kernelhub.layers.tolerance": "Tolerance",
    "kernelhub.settings": "Settings",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from kernelhub.benchmark import Benchmark
    from kernelhub.config.kernel_config import KernelConfig
    from kernelhub.core.metadata import Metadata
    from kernelhub.core.trust import TrustPolicy
    from kernelhub.core.variants import VariantAccepted, VariantRejected
    from kernelhub.errors import (
        BuildFailed,
        CompatibilityWarning,
        HubUnavailable,
        IncompatibleDevice,
        IntegrityError,
        InvalidMetadata,
        InvalidReference,
        KernelCycle,
        KernelHubError,
        KernelHubWarning,
        KernelImportError,
        KernelNotFound,
        LayerContractError,
        MissingDependency,
        NoCompatibleVariant,
        NoKernelForLayer,
        PublishConflict,
        RankFailed,
        RanksDisagree,
        StoreError,
        UntrustedKernel,
    )
    from kernelhub.hub.api import (
        get_kernel,
        get_kernel_dep,
        get_kernel_variants,
        get_loaded_kernels,
        get_local_kernel,
        get_locked_kernel,
        has_kernel,
        install_kernel,
        load_kernel,
    )
    from kernelhub.hub.client import Hub, default_hub
    from kernelhub.hub.importer import LoadedKernel, RepoInfo
    from kernelhub.layers.capture import Sample
    from kernelhub.layers.device import CUDAProperties, Device, ROCMProperties
    from kernelhub.layers.kernelize import kernelize, kernelized, unkernelize
    from kernelhub.layers.mapping import register_kernel_mapping, use_kernel_mapping
    from kernelhub.layers.markers import (
        replace_kernel_forward_from_hub,
        use_kernel_forward_from_hub,
        use_kernel_func_from_hub,
        use_kernelized_func,
    )
    from kernelhub.layers.mode import KernelizeFallback, Mode
    from kernelhub.layers.plan import KernelPlan, plan_kernels
    from kernelhub.layers.report import kernel_report
    from kernelhub.layers.report_values import KernelReport
    from kernelhub.layers.repositories import (
        FuncRepository,
        LayerRepository,
        LocalFuncRepository,
        LocalLayerRepository,
        LockedFuncRepository,
        LockedLayerRepository,
    )
    from kernelhub.layers.tolerance import Tolerance
    from kernelhub.settings import Settings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernelhub' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
