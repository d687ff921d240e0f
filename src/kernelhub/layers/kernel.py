"""A layer's kernel: loaded from its repository, with what it says of itself; and read back for a model from a file."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from kernelhub.core.refs import KernelRef, RepoId, Revision
from kernelhub.errors import IntegrityError, KernelHubError
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.mode import Mode
from kernelhub.layers.repositories import LocalRepository, RemoteRepository, Repository
from kernelhub.settings import Settings

if TYPE_CHECKING:
    from kernelhub.hub.client import Hub
    from kernelhub.hub.importer import LoadedKernel


@dataclass(frozen=True, eq=False)
class LayerKernel:
    """A layer class of a loaded kernel. `forward` is the function that is bound to a model's modules.

    A kernel that computes on DTensor weights (tensor parallelism) says so on its function: `forward.takes_dtensor = True`.
    One that reads no weights and calls each child as a module: `forward.calls_children = True`. One that on some types of
    device only calls the forward of the layer's class names them: `forward.runs_original_on = ("cpu",)`.
    """

    repository: Repository
    backend: str
    cls: type[nn.Module]
    forward: Any
    loaded: LoadedKernel

    @property
    def can_torch_compile(self) -> bool:
        return bool(getattr(self.cls, "can_torch_compile", False))

    @property
    def has_backward(self) -> bool:
        return bool(getattr(self.cls, "has_backward", True))

    @property
    def takes_dtensor(self) -> bool:
        return bool(getattr(self.forward, "takes_dtensor", False))

    @property
    def calls_children(self) -> bool:
        return bool(getattr(self.forward, "calls_children", False))

    @property
    def runs_original_on(self) -> tuple[str, ...]:
        return tuple(getattr(self.forward, "runs_original_on", ()))

    @property
    def repo(self) -> str:
        """The repository's name, or the folder's path."""
        info = self.loaded.repo_info
        if info is not None:
            return info.repo_id
        if isinstance(self.repository, RemoteRepository):
            return str(self.repository.ref.repo)
        return str(getattr(self.repository, "repo_path", self.repository))


@dataclass(frozen=True)
class Swap:
    """What stands in for a module's forward: which kernel, and what it was chosen for.

    It is all that a report needs and all that a pickle carries; `mode` is the mode that was asked for, `device` the
    device that the layer had, `training` whether it was in training mode then, `restore` whether the
    kernel is taken out when it raises. `lost` says of the kernels that were
    registered beside this one why it is none of them.
    """

    repository: Repository
    repo: str
    layer: str
    backend: str
    mode: Mode
    device: str
    training: bool
    commit: str | None
    variant: str | None
    digest: str
    notes: tuple[str, ...] = ()
    evidence: Evidence | None = field(default=None, compare=False)
    restore: bool = False
    lost: tuple[str, ...] = field(default=(), compare=False)

    @property
    def content(self) -> tuple[object, ...]:
        """What is run, whoever asked for it."""
        return self.repo, self.layer, self.commit, self.variant, self.digest


def load_layer(repository: Repository, backend: str, hub: Hub) -> LayerKernel:
    """The repository's layer for a backend. Raises what `Hub.load` raises, and `NoKernelForLayer`."""
    loaded = repository.kernel(hub, backend=backend)
    return _layer(repository, backend, loaded)


def read_back(swap: Swap) -> LayerKernel:
    """The kernel that a model from a file was kernelized with, sending no request.

    The model's file grants nothing: what may run is decided by the settings here, and what is loaded must have the
    digest that it had there (another variant of the same commit is as good). Raises `KernelHubError`, `ImportError`.
    """
    from kernelhub.hub.client import default_hub

    if Settings.from_env().mapping_disabled:
        raise KernelHubError("kernels are switched off (DISABLE_KERNEL_MAPPING)")
    hub = default_hub().without_network()
    if isinstance(swap.repository, LocalRepository):
        loaded = swap.repository.kernel(hub, backend=swap.backend)
    elif swap.commit is None and isinstance(swap.repository, RemoteRepository):
        loaded = hub.load(swap.repository.ref, backend=swap.backend, check_arch=False)
    else:
        pinned = KernelRef(RepoId.parse(swap.repo), Revision.parse(str(swap.commit)))
        loaded = hub.load(pinned, backend=swap.backend, check_arch=False)
    variant = str(loaded.variant) if loaded.variant else None
    if loaded.digest != swap.digest and (swap.commit is None or variant == swap.variant):
        raise IntegrityError(f"{swap.repository} is not what the model was kernelized with: {swap.digest}")
    return _layer(swap.repository, swap.backend, loaded)


def _layer(repository: Repository, backend: str, loaded: LoadedKernel) -> LayerKernel:
    cls = repository.layer(loaded)
    return LayerKernel(repository, backend, cls, _method(getattr(cls, "forward", None)), loaded)


@functools.cache
def _method(forward: Any) -> Any:
    """The function under the name `forward`: a bound method is pickled by the name of its function."""
    if not isinstance(forward, FunctionType) or forward.__name__ == "forward":
        return forward
    same = FunctionType(forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(same, forward, assigned=("__module__", "__doc__", "__annotations__"))
    del same.__wrapped__  # type: ignore[attr-defined]
    return same
