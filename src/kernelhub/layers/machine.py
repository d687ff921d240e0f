"""What computes, and with what: the facts that a measurement, and a report, hold for."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernelhub import __version__


def machine(devices: Iterable[torch.device]) -> dict[str, Any]:
    """What decides how fast and how exactly is computed: devices by name, torch, the libraries under it, threads."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": version("triton"),
        "python": list(sys.version_info[:3]),
        "system": [platform.system(), platform.machine()],
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": sorted({device_name(device) for device in devices} | {device_name(torch.device("cpu"))}),
    }


def summary(devices: Iterable[str]) -> dict[str, str]:
    """The same for a reader: what reports of two machines, or of two ranks, are told apart by."""
    named = {device_name(torch.device(device)) for device in devices}
    facts = {
        "kernelhub": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": "; ".join(sorted(named)),
        "threads": str(torch.get_num_threads()),
    }
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        facts["rank"] = f"{torch.distributed.get_rank()} of {torch.distributed.get_world_size()}"
    return facts


def device_name(device: torch.device) -> str:
    """The device by its maker's name: what is measured on one holds for others of that name."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return f"cuda: {properties.name}, {properties.multi_processor_count} multiprocessors"
    if device.type == "cpu":
        return f"cpu: {_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return str(device.type)


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(named, "") or platform.processor() or platform.machine()


def switches() -> dict[str, str]:
    """The settings of torch that decide how it computes."""
    return {name: _switch(ask) for name, ask in _SWITCHES.items()}


_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")

# What the libraries under torch read from the environment, and torch has no question for.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE", "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_F32_DEFAULT", "TRITON_INTERPRET",
)  # fmt: skip

_SWITCHES: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "matmul precision": torch.get_float32_matmul_precision,
    "matmul tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "matmul fp16": lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    "matmul bf16": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    "cudnn tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cudnn benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn deterministic": lambda: torch.backends.cudnn.deterministic,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "deterministic or a warning": torch.is_deterministic_algorithms_warn_only_enabled,
    "new memory": lambda: torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    "matmul fp16 sums": lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
    "attention": lambda: [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _ATTENTION],
    "cudnn": lambda: torch.backends.cudnn.enabled,
    "mkldnn": lambda: torch.backends.mkldnn.enabled,
    # "none" is what nobody has set, and "ieee" what it then is.
    "mkldnn matmul": lambda: torch.backends.mkldnn.matmul.fp32_precision.replace("none", "ieee"),  # type: ignore[attr-defined]
    "default device": lambda: torch.get_default_device().type,
    "denormals": lambda: bool(torch.tensor(1e-40, device="cpu").mul(1) != 0),
    **{name: functools.partial(os.environ.get, name) for name in _VARIABLES},
}


def _switch(ask: Callable[[], Any]) -> str:
    try:
        return str(ask())
    except (AttributeError, RuntimeError) as error:  # torch refuses the old names where the new ones were used
        return type(error).__name__


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a Python package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
