"""What can be built of a project here, and why not the rest: facts in, decisions out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kernelhub.build.recipe import Recipe, Section
from kernelhub.build.toolchain import Toolchain, missing, missing_nvcc
from kernelhub.core.archs import covers
from kernelhub.core.backends import BY_NAME, VersionPair
from kernelhub.core.variants import CPUS, SYSTEMS, BuildVariant, Compiled, Framework, NoArch

# What a CUDA kernel that names no capabilities is built for when it is to run elsewhere; PTX serves newer devices.
RELEASE_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
_DEVICE = re.compile(r"[a-z]?(\+PTX)?$", re.ASCII)  # what follows the device in "9.0a" and "10.0+PTX"


@dataclass(frozen=True)
class Target:
    """One variant to build. `sections` are the source groups with the device architectures of each.

    `stable_abi` is the torch version whose stable ABI is used; None: the build is for the installed torch alone.
    `left_out` are the architectures that the project names and the compiler here does not know.
    """

    variant: BuildVariant
    backend: str
    stable_abi: VersionPair | None = None
    sections: tuple[tuple[Section, tuple[str, ...]], ...] = ()
    cuda: VersionPair | None = None
    left_out: tuple[str, ...] = ()

    @property
    def compiled(self) -> bool:
        return isinstance(self.variant.arch, Compiled)

    @property
    def reason(self) -> None:
        """There is none: it is built."""
        return None

    @property
    def archs(self) -> tuple[str, ...]:
        """All device architectures, in order."""
        return tuple(dict.fromkeys(arch for _, archs in self.sections for arch in archs))


@dataclass(frozen=True)
class Skipped:
    """A backend that is not compiled for here, and why; `variant` is what it would be called, where that is known."""

    backend: str
    reason: str
    variant: BuildVariant | None = None


def targets(recipe: Recipe, toolchain: Toolchain, devices: Sequence[str] | None = None) -> list[Target | Skipped]:
    """Every variant of a project in the order of its backends: compiled before noarch, what is not built with why.

    `devices` are the architectures to build for (`"9.0"`); None is a release, for all that the project names.
    """
    found: list[Target | Skipped] = []
    if recipe.binding:
        found += [compiled_target(recipe, backend, toolchain, devices) for backend in recipe.backends]
    if recipe.noarch:
        found += noarch_targets(recipe)
    return found


def noarch_targets(recipe: Recipe) -> list[Target]:
    """The variants without machine code."""
    if not recipe.noarch:
        return []
    return [Target(BuildVariant(Framework("noarch"), NoArch(backend)), backend) for backend in recipe.backends]


def compiled_target(
    recipe: Recipe, backend: str, toolchain: Toolchain, devices: Sequence[str] | None
) -> Target | Skipped:
    """The compiled variant for a backend, or why it is not built here."""
    if not recipe.compiles_for(backend):
        return Skipped(backend, f"there is no [kernel.*] for {backend}: its variant is the noarch one")
    variant, cuda = _variant(recipe, backend, toolchain), _cuda_tag(toolchain) if backend == "cuda" else None
    if reason := _refuse(recipe, backend, toolchain):
        return Skipped(backend, reason, variant)
    assert variant is not None
    sections = []
    for section in recipe.sections_of(backend):
        if section.minver and (toolchain.nvcc is None or (toolchain.nvcc.version or (0, 0)) < section.minver):
            continue
        archs = _archs(section, devices, toolchain) if backend == "cuda" else ()
        if backend == "cuda" and not archs:
            return Skipped(backend, _no_arch(section, devices, toolchain), variant)
        sections.append((section, archs))
    left_out = tuple(
        arch for section, _ in sections for arch in section.archs if backend == "cuda" and not _known(arch, toolchain)
    )
    return Target(
        variant, backend, recipe.stable_abi_of(backend), tuple(sections), cuda, tuple(dict.fromkeys(left_out))
    )


def _variant(recipe: Recipe, backend: str, toolchain: Toolchain) -> BuildVariant | None:
    """What the backend's compiled variant is called; None where the machine lacks what its name says."""
    stable_abi, cuda = recipe.stable_abi_of(backend), _cuda_tag(toolchain) if backend == "cuda" else None
    if backend not in ("cpu", "cuda") or (backend == "cuda" and cuda is None) or recipe.tvm_ffi:
        return None
    if toolchain.cpu not in CPUS or toolchain.os not in SYSTEMS:
        return None
    if stable_abi:
        framework = Framework("torch-stable-abi", stable_abi)
    elif toolchain.torch:
        framework = Framework("torch", toolchain.torch.pair, "cxx11")
    else:
        return None
    return BuildVariant(framework, Compiled(backend, cuda, toolchain.cpu, toolchain.os))


def _refuse(recipe: Recipe, backend: str, toolchain: Toolchain) -> str | None:
    """Why a backend's compiled variant is not built here; None where it can be."""
    if recipe.tvm_ffi:
        return "kernels against tvm-ffi are not built by this version"
    if backend not in ("cpu", "cuda"):
        return (
            f"kernels for {BY_NAME[backend].title} are not built by this version, which compiles for the CPU and CUDA"
        )
    if reason := missing(toolchain):
        return reason
    for section in recipe.sections_of(backend):
        if other := [item for item in section.depends if item != "torch"]:
            return f"kernel.{section.name} depends on {', '.join(other)}, which this version does not provide"
    return _refuse_torch(recipe, backend, toolchain) or (_refuse_cuda(recipe, toolchain) if backend == "cuda" else None)


def _refuse_torch(recipe: Recipe, backend: str, toolchain: Toolchain) -> str | None:
    assert recipe.binding is not None
    assert toolchain.torch is not None
    have, stable_abi = toolchain.torch.pair, recipe.stable_abi_of(backend)
    if stable_abi and stable_abi > have:
        return f"torch.stable-abi is {_dotted(stable_abi)}, torch here is {_dotted(have)}"
    if toolchain.portable and (backend != "cpu" or not stable_abi):
        return "portable builds are made of CPU kernels on torch's stable ABI only (torch.stable-abi)"
    if not stable_abi and (reason := _outside(have, recipe.binding.minver, recipe.binding.maxver)):
        return f"torch here is {_dotted(have)}, the kernel needs {reason}"
    return None


def _refuse_cuda(recipe: Recipe, toolchain: Toolchain) -> str | None:
    assert toolchain.torch is not None
    if toolchain.nvcc is None or toolchain.nvcc.version is None:
        return missing_nvcc(toolchain)
    have, torch_has = toolchain.nvcc.version, toolchain.torch.cuda
    if torch_has and torch_has[0] != have[0]:
        return f"nvcc here is of CUDA {_dotted(have)}, torch was built for CUDA {_dotted(torch_has)}"
    if reason := _outside(have, recipe.cuda_minver, recipe.cuda_maxver):
        return f"CUDA here is {_dotted(have)}, the kernel needs {reason}"
    return None


def _cuda_tag(toolchain: Toolchain) -> VersionPair | None:
    """The CUDA that a build is tagged with: torch's, whose runtime it will use, else the compiler's."""
    of_torch = toolchain.torch.cuda if toolchain.torch else None
    return of_torch or (toolchain.nvcc.version if toolchain.nvcc else None)


def _archs(section: Section, devices: Sequence[str] | None, toolchain: Toolchain) -> tuple[str, ...]:
    """What a section is compiled for: of what it names, what the compiler knows and, given devices, they can run."""
    wanted = section.archs or (tuple(dict.fromkeys(devices)) if devices is not None else RELEASE_ARCHS)
    return tuple(
        arch
        for arch in wanted
        if _known(arch, toolchain) and (devices is None or any(covers((arch,), device) for device in devices))
    )


def _known(arch: str, toolchain: Toolchain) -> bool:
    """Whether nvcc compiles for an architecture; where it does not say, it is tried."""
    known = toolchain.nvcc.devices if toolchain.nvcc else ()
    return not known or _DEVICE.sub("", arch) in known


def _no_arch(section: Section, devices: Sequence[str] | None, toolchain: Toolchain) -> str:
    """Why there is no architecture to compile a section for."""
    known = ", ".join(toolchain.nvcc.devices) if toolchain.nvcc else ""
    compiles = f"; nvcc here compiles for {known}" if known else ""
    here = f"; the devices here are {', '.join(devices)}" if devices else ""
    return f"kernel.{section.name} is for {', '.join(section.archs or devices or RELEASE_ARCHS)}{compiles}{here}"


def _outside(have: VersionPair, least: VersionPair | None, most: VersionPair | None) -> str | None:
    if least and have < least:
        return f"{_dotted(least)} or newer"
    if most and have > most:
        return f"{_dotted(most)} or older"
    return None


def _dotted(version: VersionPair) -> str:
    return f"{version[0]}.{version[1]}"
