"""What this machine is: the only code that asks torch and the system.

Torch is asked through its `version.py`, without importing it, so that selecting a kernel costs milliseconds.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from kernelhub.core.backends import BACKENDS, BY_NAME, Backend, VersionPair
from kernelhub.core.host import Host

_CPUS = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
_ASSIGNMENT = re.compile(r"""^(\w+)(?:\s*:[^=]+)?\s*=\s*['"]([^'"]*)['"]""", re.MULTILINE)


@cache
def detect_host() -> Host:
    """The facts about this machine that decide what runs on it; asked once a process."""
    versions = torch_versions()
    cpu = _CPUS.get(platform.machine().lower(), platform.machine().lower())
    system = platform.system().lower()
    backend, version = _torch_backend(versions, cpu, system)
    return Host(
        python=sys.version_info[:2],
        torch=_pair(versions.get("__version__")),
        backend=backend.name,
        backend_version=version,
        cpu=cpu,
        os=system,
        cxx_abi=_cxx_abi(),
        tvm_ffi=_package_version("apache-tvm-ffi"),
        free_threaded=_free_threaded(),
        macos=_macos(),
    )


@cache
def torch_versions() -> Mapping[str, str]:
    """What the installed torch says of itself (`__version__`, `cuda`, `hip`, ...), without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return {}
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(_ASSIGNMENT.findall(text))


def visible_archs(backend: Backend) -> tuple[str, ...]:
    """The architecture of each visible device, by index (`"9.0"`, `"gfx942"`); empty where kernels name none.

    Imports torch, where the backend is one whose devices have architectures.
    """
    if backend.name not in ("cuda", "rocm"):
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(device_arch(index) for index in range(torch.cuda.device_count()))


def device_arch(index: int) -> str:
    """The architecture of one CUDA or ROCm device."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "gcnArchName", "") if torch.version.hip else f"{properties.major}.{properties.minor}"


def current_device() -> int:
    """The index of the device that torch uses now; 0 before it used one."""
    import torch

    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if initialized else 0


def _torch_backend(versions: Mapping[str, str], cpu: str, system: str) -> tuple[Backend, VersionPair | None]:
    for row in BACKENDS:
        if row.torch_version and versions.get(row.torch_version):
            return row, _pair(versions[row.torch_version])
        if row.torch_package and importlib.util.find_spec(row.torch_package):
            return row, _package_version(row.torch_package)
    if versions and system == "darwin" and cpu == "aarch64":
        return BY_NAME["metal"], None
    return BY_NAME["cpu"], None


def _pair(text: str | None) -> VersionPair | None:
    """`"12.8"` or `"6.4.43482-0f2d60242"` -> its first two numbers; oneAPI's `"20250201"` is 2025.2."""
    if not text:
        return None
    if match := re.match(r"(\d+)\.(\d+)", text):
        return int(match[1]), int(match[2])
    if match := re.match(r"(\d{4})(\d{2})", text):
        return int(match[1]), int(match[2])
    return None


def _cxx_abi() -> str:
    # Since 2.7 every torch on Linux is built with the new ABI; only one that is imported can say otherwise.
    torch = sys.modules.get("torch")
    return "cxx98" if torch is not None and not torch.compiled_with_cxx11_abi() else "cxx11"


def _free_threaded() -> bool:
    if sys.version_info < (3, 13):
        return False
    import sysconfig  # 3 ms, and older Pythons have only one kind

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def _macos() -> int | None:
    release = platform.mac_ver()[0]
    return int(release.split(".")[0]) if release else None


def _package_version(name: str) -> VersionPair | None:
    from importlib import metadata  # 8 ms, and needed for backends that few machines have

    if importlib.util.find_spec(name.removeprefix("apache-").replace("-", "_")) is None:
        return None
    try:
        return _pair(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None
