"""The functions that users call: one step each over the default client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from kernelhub.core.lockfile import LockFile
from kernelhub.core.refs import KernelRef
from kernelhub.core.variants import VariantAccepted, VariantRejected
from kernelhub.errors import InvalidReference
from kernelhub.hub.client import default_hub
from kernelhub.hub.client import loaded_kernels as get_loaded_kernels
from kernelhub.hub.importer import LoadedKernel, get_kernel_dep
from kernelhub.settings import user_path

__all__ = [
    "LoadedKernel",
    "get_kernel",
    "get_kernel_dep",
    "get_kernel_variants",
    "get_loaded_kernels",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "install_kernel",
    "load_kernel",
]


def get_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    user_agent: str | Mapping[str, str] | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    check_arch: bool = True,
    refresh: bool = False,
) -> ModuleType:
    """A kernel by name: found, verified and imported.

    Give exactly one of `version` (a major number, `1`) and `revision` (a branch, tag or commit), or write it behind the
    name: `"org/name@v1"`. `backend` is `"cpu"` or what torch was built for (the default). `trust_remote_code` is True, or
    a list of what to trust (`"org/name"`, `"org/*"`). `refresh` asks the hub now whether the version has moved.

    Raises `InvalidReference`, `KernelNotFound`, `NoCompatibleVariant`, `UntrustedKernel`, `IntegrityError`,
    `InvalidMetadata`, `MissingDependency`, `IncompatibleDevice` or `HubUnavailable`.

        >>> activation = get_kernel("kernelhub/activation", version=1)  # doctest: +SKIP
    """
    return (
        default_hub()
        .load(
            KernelRef.of(repo_id, version=version, revision=revision),
            backend=backend,
            user_agent=user_agent,
            trust_remote_code=trust_remote_code,
            check_arch=check_arch,
            refresh=refresh,
        )
        .module
    )


def get_local_kernel(
    repo_path: str | Path,
    *,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    user_agent: str | Mapping[str, str] | None = None,
) -> ModuleType:
    """The kernel in a folder: a kernel repository, its `build` folder, one variant's folder, or a source tree.

    `trust_remote_code` is for the kernels that it depends on. Raises as `get_kernel` does.
    """
    return (
        default_hub()
        .load_local(user_path(repo_path), backend=backend, trust_remote_code=trust_remote_code, user_agent=user_agent)
        .module
    )


def has_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    check_arch: bool = True,
) -> bool:
    """Whether `get_kernel` would find a build of the kernel for this machine. The arguments are those of `get_kernel`."""
    ref = KernelRef.of(repo_id, version=version, revision=revision)
    return default_hub().has(ref, backend=backend, trust_remote_code=trust_remote_code, check_arch=check_arch)


def install_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    local_files_only: bool = False,
    user_agent: str | Mapping[str, str] | None = None,
    trust_remote_code: bool | Sequence[str] = False,
) -> Path:
    """Fetch the kernel's variant for this machine, and the kernels that it needs; the folder it lies in.

    Afterwards `get_kernel` sends nothing. `local_files_only` asks no remote hub.
    """
    return default_hub().install(
        KernelRef.of(repo_id, version=version, revision=revision),
        backend=backend,
        local_files_only=local_files_only,
        user_agent=user_agent,
        trust_remote_code=trust_remote_code,
    )


def get_kernel_variants(
    repo_id: str, *, revision: str | None = None, version: int | None = None, backend: str | None = None
) -> list[VariantAccepted | VariantRejected]:
    """All builds of the kernel: those that run here, best first, then the others, each with the reason."""
    return default_hub().variants(KernelRef.of(repo_id, version=version, revision=revision), backend=backend)


def get_locked_kernel(
    repo_id: str,
    *,
    lockfile: str | Path | None = None,
    package: str | ModuleType | None = None,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    user_agent: str | Mapping[str, str] | None = None,
) -> ModuleType:
    """The kernel at the commit, and with the digest, that a lock names; it is downloaded where it is not here.

    The lock is the file `lockfile`, or that in the metadata of the installed project that `package` names: its
    distribution's name, or a module of it (`package=__name__`). What the kernel depends on is taken from the lock too.
    Raises as `get_kernel` does; `KernelNotFound` for what the lock does not name.
    """
    ref = KernelRef.parse(repo_id)
    return (
        default_hub()
        .load_locked(
            ref.repo,
            lockfile=_lock(lockfile, package),
            pin=ref.pin,
            backend=backend,
            trust_remote_code=trust_remote_code,
            user_agent=user_agent,
        )
        .module
    )


def load_kernel(
    repo_id: str,
    *,
    lockfile: str | Path | None = None,
    package: str | ModuleType | None = None,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
) -> ModuleType:
    """The kernel that a lock names, from the store; nothing is ever downloaded. The lock is as for `get_locked_kernel`.

    A lock file says which bytes, not whose code may run: that is decided as for `get_kernel`.
    """
    ref = KernelRef.parse(repo_id)
    return (
        default_hub()
        .load_locked(
            ref.repo,
            lockfile=_lock(lockfile, package),
            pin=ref.pin,
            backend=backend,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
        .module
    )


def _lock(path: str | Path | None, package: str | ModuleType | None) -> Path | LockFile:
    if (path is None) == (package is None):
        raise InvalidReference(
            "expected one of lockfile and package" if path else "no lock file was given",
            hint='Pass lockfile="kernels.lock", or package=__name__ in a project that was installed with its lock.',
        )
    if path is not None:
        return user_path(path)
    from kernelhub.hub.locks import package_lock

    assert package is not None
    return package_lock(package)
