"""Where a layer's kernel comes from: values that compare and hash, and touch nothing before they are loaded.

>>> str(LayerRepository("kernels-community/activation", layer_name="SiluAndMul", version=1))
'kernels-community/activation@v1:SiluAndMul'
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelhub.core.lockfile import NAME, LockFile
from kernelhub.core.refs import KernelRef
from kernelhub.core.trust import TrustPolicy
from kernelhub.errors import InvalidReference, LayerContractError, NoKernelForLayer
from kernelhub.settings import user_path

if TYPE_CHECKING:
    from torch import nn

    from kernelhub.hub.client import Hub
    from kernelhub.hub.importer import LoadedKernel

Trust = bool | list[str] | tuple[str, ...]


class Repository:
    """What every kind of repository does: find the kernel, then the one layer in it."""

    @property
    def name(self) -> str:
        """The layer's or function's name in the kernel."""
        raise NotImplementedError

    def kernel(self, hub: Hub, *, backend: str | None = None) -> LoadedKernel:
        """The kernel, fetched where it is not here yet, verified and imported. Raises what `Hub.load` raises."""
        raise NotImplementedError

    def layer(self, kernel: LoadedKernel) -> type[nn.Module]:
        """The layer's class. Raises `NoKernelForLayer` where the kernel has none of that name."""
        raise NotImplementedError

    def load(self) -> type[nn.Module]:
        """The layer's class, from the default hub."""
        from kernelhub.hub.client import default_hub

        return self.layer(self.kernel(default_hub()))


@dataclass(frozen=True)
class _Layer(Repository):
    """A class in the kernel's `layers`."""

    layer_name: str = field(kw_only=True)

    @property
    def name(self) -> str:
        return self.layer_name

    def layer(self, kernel: LoadedKernel) -> type[nn.Module]:
        layers = getattr(kernel.module, "layers", None)
        found = getattr(layers, self.layer_name, None)
        if found is None:
            raise NoKernelForLayer(
                f"{self}: the kernel has no layer {self.layer_name!r}", hint=f"It has {_listed(_classes(layers))}."
            )
        if not isinstance(found, type):
            raise LayerContractError(f"{self}: {self.layer_name} is not a class; FuncRepository takes functions")
        return found


@dataclass(frozen=True)
class _Func(Repository):
    """A function of the kernel, as a layer without weights."""

    func_name: str = field(kw_only=True)

    @property
    def name(self) -> str:
        return self.func_name

    def layer(self, kernel: LoadedKernel) -> type[nn.Module]:
        found = getattr(kernel.module, self.func_name, None)
        if not callable(found) or isinstance(found, type):
            functions = [name for name in getattr(kernel.module, "__all__", ()) if name != "layers"]
            raise NoKernelForLayer(
                f"{self}: the kernel has no function {self.func_name!r}", hint=f"It has {_listed(functions)}."
            )
        return function_class(found)


@dataclass(frozen=True)
class RemoteRepository(Repository):
    """A kernel by name: exactly one of `version` and `revision`, or `"org/name@v1"`."""

    repo_id: str
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)
    trust_remote_code: Trust = field(default=False, kw_only=True)
    user_agent: Any = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trust_remote_code", _trust(self.trust_remote_code))
        if isinstance(self.user_agent, Mapping):
            object.__setattr__(self, "user_agent", tuple(sorted(self.user_agent.items())))
        _ = self.ref  # a name that cannot be is an error here, where it was written, not when a model is kernelized

    @property
    def ref(self) -> KernelRef:
        return KernelRef.of(self.repo_id, version=self.version, revision=self.revision)

    def kernel(self, hub: Hub, *, backend: str | None = None) -> LoadedKernel:
        agent = dict(self.user_agent) if isinstance(self.user_agent, tuple) else self.user_agent
        # Each layer's own device is checked by kernelize; the process's current device need not be one of them.
        return hub.load(
            self.ref,
            backend=backend,
            trust_remote_code=_untuple(self.trust_remote_code),
            user_agent=agent,
            check_arch=False,
        )

    def __str__(self) -> str:
        return f"{self.ref}:{self.name}"


@dataclass(frozen=True)
class LocalRepository(Repository):
    """A kernel in a folder of the user's own, which the user trusts by naming it."""

    repo_path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "repo_path", user_path(self.repo_path, type(self).__name__))

    def kernel(self, hub: Hub, *, backend: str | None = None) -> LoadedKernel:
        return hub.load_local(self.repo_path, backend=backend)

    def __str__(self) -> str:
        return f"{self.repo_path}:{self.name}"


@dataclass(frozen=True)
class LockedRepository(Repository):
    """A kernel at the commit that a lock names: that of the installed project that `package` names (its distribution, or
    a module of it: `package=__name__`), else the file; None is `kernels.lock` in the current folder when it is loaded.
    """

    repo_id: str
    lockfile: Path | None = field(default=None, kw_only=True)
    package: str | ModuleType | None = field(default=None, kw_only=True)
    trust_remote_code: Trust = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trust_remote_code", _trust(self.trust_remote_code))
        if self.lockfile is not None:
            object.__setattr__(self, "lockfile", user_path(self.lockfile, type(self).__name__))
        if isinstance(self.package, ModuleType):
            object.__setattr__(self, "package", self.package.__name__)
        if self.lockfile is not None and self.package is not None:
            raise InvalidReference(f"{self.repo_id}: expected one of lockfile and package")
        if KernelRef.parse(self.repo_id).layer is not None:
            raise InvalidReference(f"{self.repo_id!r} names a layer; here a kernel is wanted")

    def kernel(self, hub: Hub, *, backend: str | None = None) -> LoadedKernel:
        ref = KernelRef.parse(self.repo_id)
        lock: Path | LockFile = self.lockfile or Path(NAME)
        if self.package is not None:
            from kernelhub.hub.locks import package_lock  # 10 ms, and only installed projects need it

            lock = package_lock(self.package)
        return hub.load_locked(
            ref.repo,
            lockfile=lock,
            pin=ref.pin,
            backend=backend,
            trust_remote_code=_untuple(self.trust_remote_code),
            check_arch=False,
        )

    def __str__(self) -> str:
        return f"{self.repo_id} (locked):{self.name}"


@dataclass(frozen=True)
class LayerRepository(_Layer, RemoteRepository):
    """A layer of a kernel on a hub: `LayerRepository("org/name", layer_name="RMSNorm", version=1)`."""

    __str__ = RemoteRepository.__str__


@dataclass(frozen=True)
class FuncRepository(_Func, RemoteRepository):
    """A function of a kernel on a hub, used as a layer."""

    __str__ = RemoteRepository.__str__


@dataclass(frozen=True)
class LocalLayerRepository(_Layer, LocalRepository):
    """A layer of a kernel in a folder (a repository, its `build`, or one variant)."""

    __str__ = LocalRepository.__str__


@dataclass(frozen=True)
class LocalFuncRepository(_Func, LocalRepository):
    """A function of a kernel in a folder, used as a layer."""

    __str__ = LocalRepository.__str__


@dataclass(frozen=True)
class LockedLayerRepository(_Layer, LockedRepository):
    """A layer of a kernel at the commit in `kernels.lock`."""

    __str__ = LockedRepository.__str__


@dataclass(frozen=True)
class LockedFuncRepository(_Func, LockedRepository):
    """A function of a kernel at the commit in `kernels.lock`, used as a layer."""

    __str__ = LockedRepository.__str__


@functools.cache
def function_class(function: Callable[..., Any]) -> type[nn.Module]:
    """A layer class whose forward is the function.

    It says of itself what the function's attributes `can_torch_compile` and `has_backward` say. The forward is a
    method that calls the function: a bound method is what copies and pickles of a model can carry.
    """
    from torch import nn

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - a method has it
        return function(*args, **kwargs)

    own = inspect.signature(function)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = own.replace(parameters=[receiver, *own.parameters.values()])  # type: ignore[attr-defined]
    return type(
        getattr(function, "__name__", "function"),
        (nn.Module,),
        {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "forward": forward,
            "can_torch_compile": bool(getattr(function, "can_torch_compile", False)),
            "has_backward": bool(getattr(function, "has_backward", True)),
        },
    )


def _trust(value: Trust) -> bool | tuple[str, ...]:
    """A trust argument as a value that hashes. Raises `InvalidReference` for one that names nothing."""
    TrustPolicy.of(value)
    return value if isinstance(value, bool) else tuple(value)


def _untuple(value: Trust) -> bool | list[str]:
    return value if isinstance(value, bool) else list(value)


def _classes(layers: object) -> list[str]:
    from torch import nn

    found = vars(layers).items() if layers is not None else ()
    return [name for name, value in found if isinstance(value, type) and issubclass(value, nn.Module)]


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def check_repository(value: object, where: str) -> Repository:
    """`value`, where it is a repository. Raises `InvalidReference`, which says where it stood."""
    if isinstance(value, Repository):
        return value
    raise InvalidReference(
        f"{where}: {value!r} is not a kernel repository",
        hint='Expected such as LayerRepository("org/name", layer_name="RMSNorm", version=1).',
    )
