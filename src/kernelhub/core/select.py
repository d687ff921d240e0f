"""Which builds run on a machine, the best first, and why not the others.

Each rule below is a fact about a build that does not fit, in words for a user. `rank` is total: the key ends in the
variant's name, so no input order and no hash seed decides.
"""

from __future__ import annotations

from collections.abc import Iterable

from kernelhub.core.backends import BY_NAME, Backend, Fit, VersionPair
from kernelhub.core.host import Host
from kernelhub.core.variants import (
    BuildVariant,
    Compiled,
    Framework,
    NoArch,
    UnknownVariant,
    VariantAccepted,
    VariantRejected,
    parse_variant,
)

Ranked = list[VariantAccepted | VariantRejected]

# Best first. A stable-ABI build comes before one for a single torch: it is what publishers keep up to date.
_KINDS = {"torch-stable-abi": 0, "torch": 1, "tvm-ffi": 2, "noarch": 3}


def rank(names: Iterable[str], host: Host, backend: Backend) -> Ranked:
    """All variants of a repository: those that fit, best first, then the rejected ones by name."""
    accepted: list[BuildVariant] = []
    rejected: list[VariantRejected] = []
    for variant in (parse_variant(name) for name in set(names)):
        reason = reject(variant, host, backend)
        if isinstance(variant, BuildVariant) and reason is None:
            accepted.append(variant)
        else:
            rejected.append(VariantRejected(variant, reason or ""))
    accepted.sort(key=_best_first)
    rejected.sort(key=lambda item: item.variant.variant_str)
    return [*map(VariantAccepted, accepted), *rejected]


def reject(variant: BuildVariant | UnknownVariant, host: Host, backend: Backend) -> str | None:
    """Why the build does not run on the machine; None where it does."""
    if isinstance(variant, UnknownVariant):
        return "not the name of a build variant"
    if isinstance(variant.arch, NoArch):
        return _reject_noarch(variant.arch, backend)
    return _reject_machine(variant.arch, host, backend) or _reject_framework(variant.framework, host)


def _reject_noarch(arch: NoArch, backend: Backend) -> str | None:
    if arch.backend in (None, backend.name):
        return None
    return f"made for {BY_NAME[arch.backend or ''].title}, wanted is {backend.title}"


def _reject_machine(arch: Compiled, host: Host, backend: Backend) -> str | None:
    row = BY_NAME[arch.backend]
    if row != backend:
        return f"built for {row.title}, wanted is {backend.title}"
    if arch.os != host.os:
        return f"built for {arch.os}, this machine runs {host.os}"
    if arch.cpu != host.cpu:
        return f"built for {arch.cpu} processors, this machine has {host.cpu}"
    if host.free_threaded and host.python < (3, 15):
        return "compiled for the limited Python API, which free-threaded Python has only from 3.15 on"
    if row.min_macos and (host.macos or 0) < row.min_macos:
        return f"needs macOS {row.min_macos}, this machine has {host.macos or 'none'}"
    if arch.version and not _fits(arch.version, host.backend_version, row.fit):
        return _built_for(row.title, arch.version, host.backend_version)
    return None


def _reject_framework(framework: Framework, host: Host) -> str | None:
    if framework.version is None:
        return None
    if framework.kind == "tvm-ffi":
        return None if framework.version == host.tvm_ffi else _built_for("tvm-ffi", framework.version, host.tvm_ffi)
    if framework.kind == "torch-stable-abi":
        if host.torch and framework.version <= host.torch:
            return None
        have = f"has {_dotted(host.torch)}" if host.torch else "has no torch"
        return f"built for torch {_dotted(framework.version)} and newer, this machine {have}"
    if framework.version != host.torch:
        return _built_for("torch", framework.version, host.torch)
    if framework.cxx_abi not in (None, host.cxx_abi):
        return f"built for the {framework.cxx_abi} ABI, torch here has {host.cxx_abi}"
    return None


def _fits(built: VersionPair, have: VersionPair | None, fit: Fit) -> bool:
    if have is None:
        return False
    if fit is Fit.SAME_MAJOR:
        return built[0] == have[0] and built[1] <= have[1]
    return built == have


def _built_for(title: str, built: VersionPair, have: VersionPair | None) -> str:
    return f"built for {title} {_dotted(built)}, this machine has {_dotted(have) if have else 'none'}"


def _best_first(variant: BuildVariant) -> tuple[object, ...]:
    framework, arch = variant.framework, variant.arch
    newest = framework.version or (0, 0)
    backend_version = arch.version if isinstance(arch, Compiled) and arch.version else (0, 0)
    return (
        _KINDS[framework.kind],
        tuple(-part for part in newest),
        framework.cxx_abi is not None,
        arch.backend is None,
        tuple(-part for part in backend_version),
        str(variant),
    )


def _dotted(version: VersionPair) -> str:
    return f"{version[0]}.{version[1]}"
