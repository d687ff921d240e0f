"""The backends that kernels are built for: one table, one row each.

A new backend is a new row. Everything else (variant names, noarch names, torch devices) is derived from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kernelhub.errors import InvalidReference

VersionPair = tuple[int, int]


class Fit(Enum):
    """When a version that a kernel was built for fits the machine's."""

    SAME_MAJOR = "the same major version, and a minor version not above the machine's"
    EQUAL = "the same version"


@dataclass(frozen=True)
class Backend:
    """A row: what the backend is called, and how its version is spelt in a variant's name.

        `tag` is the spelling in compiled variants (`cu` in `cu128`), `major_digits` how many digits of it are the major
    X"""

    name: str
    title: str
    device: str
    tag: str
    noarch: str
    major_digits: int | None = None
    fit: Fit = Fit.EQUAL
    min_macos: int | None = None
    torch_version: str | None = None
    torch_package: str | None = None

    def version_text(self, version: VersionPair) -> str:
        return f"{self.tag}{version[0]}{version[1]}"


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", "the CPU", "cpu", "cpu", "cpu"),
    Backend("cuda", "CUDA", "cuda", "cu", "cuda", major_digits=2, fit=Fit.SAME_MAJOR, torch_version="cuda"),
    Backend("rocm", "ROCm", "cuda", "rocm", "rocm", major_digits=1, torch_version="hip"),
    Backend("xpu", "XPU", "xpu", "xpu", "xpu", major_digits=4, torch_version="xpu"),
    Backend("cann", "CANN", "npu", "cann", "npu", major_digits=1, torch_package="torch_npu"),
    Backend("metal", "Metal", "mps", "metal", "metal", min_macos=26),
    Backend("neuron", "Neuron", "neuron", "neuron", "neuron", torch_package="torch_neuronx"),
    Backend("tpu", "TPU", "tpu", "tpu", "tpu", torch_package="torch_tpu"),
)

BY_NAME = {row.name: row for row in BACKENDS}
BY_NOARCH = {row.noarch: row for row in BACKENDS}
_LONGEST_TAG_FIRST = sorted(BACKENDS, key=lambda row: (-len(row.tag), row.tag))


def backend(name: str) -> Backend:
    """The row of that name. Raises `InvalidReference`, listing the names there are."""
    try:
        return BY_NAME[name]
    except KeyError:
        raise InvalidReference(
            f"{name!r} is not a backend", hint=f"Expected one of {', '.join(sorted(BY_NAME))}."
        ) from None


def parse_tag(text: str) -> tuple[Backend, VersionPair | None] | None:
    """`"cu128"` -> (CUDA, (12, 8)), `"cpu"` -> (CPU, None); None where no row spells it so."""
    for row in _LONGEST_TAG_FIRST:
        if not text.startswith(row.tag):
            continue
        digits = text[len(row.tag) :]
        if row.major_digits is None:
            return (row, None) if not digits else None
        version = split_version(digits, row.major_digits)
        return (row, version) if version else None
    return None


def split_version(digits: str, major_digits: int) -> VersionPair | None:
    """`("128", 2)` -> (12, 8). None where the digits are no such version or would print back otherwise."""
    if not (digits.isascii() and digits.isdigit()) or not major_digits < len(digits) <= major_digits + 4:
        return None
    major, minor = digits[:major_digits], digits[major_digits:]
    if (minor[0] == "0" and minor != "0") or (major[0] == "0" and major != "0"):
        return None
    return int(major), int(minor)
