"""What kind of device a kernel is registered for.

>>> Device("cuda", CUDAProperties(min_capability=80, max_capability=90)).properties.holds(86)
True
"""

from __future__ import annotations

from dataclasses import dataclass

from kernelhub.core.backends import BACKENDS
from kernelhub.errors import InvalidReference

# The device types of mappings, with the backend whose builds run there. ROCm has a name of its own here, although
# torch calls its devices `cuda` too.
DEVICE_BACKENDS: dict[str, str] = {("rocm" if row.name == "rocm" else row.device): row.name for row in BACKENDS}


@dataclass(frozen=True)
class _Capabilities:
    """Compute capabilities from `min_capability` to `max_capability`, both included: 86 is 8.6."""

    min_capability: int
    max_capability: int

    def __post_init__(self) -> None:
        for name in ("min_capability", "max_capability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidReference(f"{name} must be a whole number such as 90, got {value!r}")
        if self.min_capability > self.max_capability:
            raise InvalidReference(
                f"min_capability ({self.min_capability}) must be <= max_capability ({self.max_capability})"
            )

    @property
    def width(self) -> int:
        return self.max_capability - self.min_capability

    def holds(self, capability: int) -> bool:
        return self.min_capability <= capability <= self.max_capability

    def __str__(self) -> str:
        return f"{self.min_capability} to {self.max_capability}"


@dataclass(frozen=True)
class CUDAProperties(_Capabilities):
    """NVIDIA devices of these compute capabilities, both ends included: `CUDAProperties(80, 90)` is 8.0 to 9.0."""

    __str__ = _Capabilities.__str__


@dataclass(frozen=True)
class ROCMProperties(_Capabilities):
    """AMD devices of these compute capabilities as torch gives them, both ends included: 94 is 9.4."""

    __str__ = _Capabilities.__str__


@dataclass(frozen=True)
class Device:
    """A device type (`cpu cuda rocm mps xpu npu neuron tpu`), perhaps only some capabilities of it."""

    type: str
    properties: CUDAProperties | ROCMProperties | None = None

    def __post_init__(self) -> None:
        if self.type not in DEVICE_BACKENDS:
            raise InvalidReference(
                f"{self.type!r} is not a device type", hint=f"Expected one of {', '.join(DEVICE_BACKENDS)}."
            )
        for properties, device_type in ((CUDAProperties, "cuda"), (ROCMProperties, "rocm")):
            if isinstance(self.properties, properties) and self.type != device_type:
                raise InvalidReference(f"{properties.__name__} only belong to {device_type!r}, not to {self.type!r}")

    def __str__(self) -> str:
        return f"{self.type} {self.properties}" if self.properties else self.type
