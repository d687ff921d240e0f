"""Names of builds: `"torch210-cxx11-cu128-x86_64-linux"` and the value it stands for.

>>> variant = BuildVariant.parse("torch210-cxx11-cu128-x86_64-linux")
>>> variant.framework, variant.arch
(Framework(kind='torch', version=(2, 10), cxx_abi='cxx11'), Compiled(backend='cuda', version=(12, 8), cpu='x86_64', os='linux'))
>>> str(variant)
'torch210-cxx11-cu128-x86_64-linux'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kernelhub.core.backends import BY_NAME, BY_NOARCH, VersionPair, parse_tag, split_version
from kernelhub.errors import InvalidReference

CPUS = ("x86_64", "aarch64")
SYSTEMS = ("linux", "darwin", "windows")
CXX_ABIS = ("cxx11", "cxx98")
UNIVERSAL = "universal"

FrameworkKind = Literal["torch-stable-abi", "torch", "tvm-ffi", "noarch"]
_VERSIONED: tuple[FrameworkKind, ...] = ("torch-stable-abi", "tvm-ffi", "torch")  # longest spelling first


@dataclass(frozen=True)
class Framework:
    """What a build is made against; `noarch` is Python or Triton and spelt `torch`."""

    kind: FrameworkKind
    version: VersionPair | None = None
    cxx_abi: str | None = None

    def __str__(self) -> str:
        if self.version is None:
            return "torch"
        abi = f"-{self.cxx_abi}" if self.cxx_abi else ""
        return f"{self.kind}{self.version[0]}{self.version[1]}{abi}"


@dataclass(frozen=True)
class Compiled:
    """The machine code of a compiled build."""

    backend: str
    version: VersionPair | None
    cpu: str
    os: str

    def __str__(self) -> str:
        row = BY_NAME[self.backend]
        tag = row.version_text(self.version) if self.version else row.tag
        return f"{tag}-{self.cpu}-{self.os}"


@dataclass(frozen=True)
class NoArch:
    """A build without machine code: for one backend, or for all (`backend` is None)."""

    backend: str | None

    def __str__(self) -> str:
        return BY_NAME[self.backend].noarch if self.backend else UNIVERSAL


@dataclass(frozen=True)
class BuildVariant:
    """One build of a kernel: the name of its folder."""

    framework: Framework
    arch: Compiled | NoArch

    @classmethod
    def parse(cls, text: str) -> BuildVariant:
        """Read a variant's name. Raises `InvalidReference`, which says what was expected."""
        variant = _parse(text)
        if variant is None or str(variant) != text:
            raise InvalidReference(
                f"{text!r} is not the name of a build variant",
                hint='Expected such as "torch210-cxx11-cu128-x86_64-linux", "torch-stable-abi29-cpu-x86_64-linux", '
                '"torch-cuda" or "torch-universal".',
            )
        return variant

    @property
    def variant_str(self) -> str:
        """The folder's name."""
        return str(self)

    @property
    def backend(self) -> str | None:
        """The backend it is for; None where it is for all."""
        return self.arch.backend

    def __str__(self) -> str:
        return f"{self.framework}-{self.arch}"


@dataclass(frozen=True)
class UnknownVariant:
    """A folder whose name is not a variant's: another tool's, or a newer format's."""

    variant_str: str

    def __str__(self) -> str:
        return self.variant_str


@dataclass(frozen=True)
class VariantAccepted:
    """A build that runs on the machine."""

    variant: BuildVariant


@dataclass(frozen=True)
class VariantRejected:
    """A build that does not run on the machine, and why."""

    variant: BuildVariant | UnknownVariant
    reason: str


def parse_variant(text: str) -> BuildVariant | UnknownVariant:
    """A variant's value; a name that is not a variant's is kept as it is."""
    try:
        return BuildVariant.parse(text)
    except InvalidReference:
        return UnknownVariant(text)


def _parse(text: str) -> BuildVariant | None:
    if text.startswith("torch-") and not text.startswith("torch-stable-abi"):
        name = text.removeprefix("torch-")
        if name == UNIVERSAL:
            return BuildVariant(Framework("noarch"), NoArch(None))
        return BuildVariant(Framework("noarch"), NoArch(BY_NOARCH[name].name)) if name in BY_NOARCH else None
    kind = next((kind for kind in _VERSIONED if text.startswith(kind)), None)
    if kind is None:
        return None
    version_text, *parts = text.removeprefix(kind).split("-")
    version = split_version(version_text, 1)
    abi = parts.pop(0) if kind == "torch" and parts and parts[0] in CXX_ABIS else None
    if version is None or len(parts) != 3:
        return None
    tag, (cpu, system) = parse_tag(parts[0]), parts[1:]
    if tag is None or cpu not in CPUS or system not in SYSTEMS:
        return None
    row, backend_version = tag
    return BuildVariant(Framework(kind, version, abi), Compiled(row.name, backend_version, cpu, system))
