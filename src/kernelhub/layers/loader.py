"""decision -> kernel: what is registered for a layer is loaded and looked at; what can be used, or why nothing can."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernelhub.core.archs import covers
from kernelhub.core.backends import BY_NAME
from kernelhub.errors import (
    IncompatibleDevice,
    IntegrityError,
    InvalidReference,
    KernelHubError,
    LayerContractError,
    NoKernelForLayer,
    UntrustedKernel,
)
from kernelhub.hub.probe import visible_archs
from kernelhub.layers import contract
from kernelhub.layers.device import DEVICE_BACKENDS
from kernelhub.layers.fusion import Group, fuse
from kernelhub.layers.kernel import LayerKernel, Swap, load_layer
from kernelhub.layers.mapping import Row
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.outcome import Outcome, allow, where
from kernelhub.layers.plan import Decision, Request
from kernelhub.layers.repositories import Repository
from kernelhub.layers.survey import Site, class_name, device_type, site_class

if TYPE_CHECKING:
    from kernelhub.hub.client import Hub


@dataclass(frozen=True)
class Failure:
    """A kernel that cannot be used, in a case that `use_fallback` may allow; None: in one that it always allows."""

    repository: Repository
    case: KernelizeFallback | None
    error: KernelHubError | ImportError | OSError

    @property
    def reason(self) -> str:
        return getattr(self.error, "message", str(self.error)).partition("\n")[0] or type(self.error).__name__


@dataclass
class Loader:
    """Loads each kernel once, and decides once for all layers of a class on a device.

    `compared`: all that are registered for a layer are loaded, to be measured against each other; else the first that can
    be used is taken.
    """

    hub: Hub
    request: Request
    fallback: KernelizeFallback
    compared: bool = False
    restore: bool = False
    _kernels: dict[tuple[Any, str], LayerKernel | Failure] = field(default_factory=dict)
    _outcomes: dict[tuple[int, int, bool], tuple[Outcome, Decision]] = field(default_factory=dict)

    def outcomes(self, sites: list[Site], decisions: list[Decision]) -> list[Outcome]:
        """What comes of each site. Raises what `use_fallback` does not allow, saying at which layer.

        Modules that are fused come first; they, and the modules around them, then get no kernel of their own.
        """
        found: list[Outcome] = []
        fused: dict[int, str] = {}
        for site, decision in zip(sites, decisions, strict=True):
            if site.group is not None:
                found.append(self._outcome(site, decision))
                if found[-1].kernel is not None:
                    why = f"its {site.group.shown} are fused, which a kernel here would not know of"
                    fused.update(dict.fromkeys(site.group.around, why))
                    fused.update((id(part), "") for part in site.group.parts)
                continue
            if id(site.module) in fused:
                found.append(Outcome(class_name(site.module), None, None, fused[id(site.module)]))
                continue
            # By identity, which is cheaper than the value; the survey and the outcome keep both alive. A survey has one
            # AwareClass for each class.
            key = (id(site.aware), id(decision), site.training)
            known = self._outcomes.get(key)
            if known is None:
                known = self._outcomes[key] = self._outcome(site, decision), decision
            found.append(known[0])
        return found

    def _outcome(self, site: Site, decision: Decision) -> Outcome:
        name, device, row = site_class(site), decision.device, decision.row
        if row is None or device is None:
            if decision.case is not None and decision.case not in self.fallback:
                raise NoKernelForLayer(f"{where(site)}: {decision.reason}", hint=allow(decision.case))
            return Outcome(name, None, None, decision.reason)
        usable, failures = self._usable(site.module, row, decision, device)
        if usable and site.group is not None:
            usable, failures = self._fused(site.group, *usable[0])
        if not usable:
            self._check_allowed(site, failures)
            return Outcome(name, None, None, _said(failures))
        (kernel, swap), *others = usable
        return Outcome(name, kernel, swap, others=tuple(others))

    def _usable(
        self, module: nn.Module, row: Row, decision: Decision, device: torch.device
    ) -> tuple[list[tuple[LayerKernel, Swap]], list[Failure]]:
        """The registered kernels that can be used, in the order in which they are, and why the others cannot."""
        usable: list[tuple[LayerKernel, Swap]] = []
        failures: list[Failure] = []
        for repository in row.repositories:
            chosen = self._choose(module, repository, row, decision, device)
            if isinstance(chosen, Failure):
                failures.append(chosen)
                continue
            usable.append(chosen)
            if not self.compared:
                break
        lost = tuple(f"{failure.repository}: {failure.reason}" for failure in failures)
        return [(kernel, replace(swap, lost=lost)) for kernel, swap in usable] if lost else usable, failures

    def _fused(
        self, group: Group, kernel: LayerKernel, swap: Swap
    ) -> tuple[list[tuple[LayerKernel, Swap]], list[Failure]]:
        try:
            return [fuse(group, kernel, swap)], []
        except LayerContractError as error:
            return [], [Failure(kernel.repository, KernelizeFallback.CONTRACT, error)]
        except NoKernelForLayer as error:
            return [], [Failure(kernel.repository, KernelizeFallback.NO_COMPATIBLE_MODE, error)]

    def _check_allowed(self, site: Site, failures: list[Failure]) -> None:
        """Raises the first error that `use_fallback` does not cover."""
        for failure in failures:
            if failure.case is not None and failure.case not in self.fallback:
                if isinstance(failure.error, KernelHubError):
                    failure.error.add_context(f"while kernelizing {where(site)}")
                raise failure.error

    def _choose(
        self, module: nn.Module, repository: Repository, row: Row, decision: Decision, device: torch.device
    ) -> tuple[LayerKernel, Swap] | Failure:
        kernel = self._kernel(repository, device)
        if isinstance(kernel, Failure):
            return kernel
        try:
            self._check_device(kernel, device)
            notes = contract.check(kernel.cls, kernel.forward, type(module), str(repository))
        except IncompatibleDevice as error:
            return Failure(repository, KernelizeFallback.CANNOT_LOAD, error)
        except LayerContractError as error:
            return Failure(repository, KernelizeFallback.CONTRACT, error)
        unfit = self._unfit(kernel, row) or self._unsaid(kernel, decision) or self._idle(kernel, device)
        return unfit or (kernel, self._swap(kernel, module, device, notes))

    def _unsaid(self, kernel: LayerKernel, decision: Decision) -> Failure | None:
        """What the layer is, and the kernel would have to say that it allows."""
        if decision.distributed and not kernel.takes_dtensor:
            reason = "its weights are DTensors, and the kernel does not say that it takes them"
        elif decision.inside and not kernel.calls_children:
            reason = f"{decision.inside}, and the kernel does not say that it calls the layer's children"
        else:
            return None
        return Failure(kernel.repository, None, NoKernelForLayer(reason))

    def _idle(self, kernel: LayerKernel, device: torch.device) -> Failure | None:
        """A kernel that says that it would do nothing there but call the original."""
        if device_type(device) not in kernel.runs_original_on:
            return None
        reason = f"{kernel.repository} gains nothing on {device_type(device)}, where it runs the layer's own forward"
        return Failure(kernel.repository, None, NoKernelForLayer(reason))

    def _kernel(self, repository: Repository, device: torch.device) -> LayerKernel | Failure:
        backend = DEVICE_BACKENDS.get(device_type(device), device.type)
        key = (repository, backend)
        if key not in self._kernels:
            self._kernels[key] = self._load(repository, backend)
        return self._kernels[key]

    def _load(self, repository: Repository, backend: str) -> LayerKernel | Failure:
        try:
            self.hub.host.choose_backend(backend)
        except InvalidReference as error:
            return Failure(repository, KernelizeFallback.CANNOT_LOAD, error)
        try:
            return load_layer(repository, backend, self.hub)
        except (IntegrityError, UntrustedKernel):
            raise  # never a case for the original: what is here is not what was asked for
        except LayerContractError as error:
            return Failure(repository, KernelizeFallback.CONTRACT, error)
        except (NoKernelForLayer, IncompatibleDevice, ImportError, OSError) as error:
            return Failure(repository, KernelizeFallback.CANNOT_LOAD, error)

    def _check_device(self, kernel: LayerKernel, device: torch.device) -> None:
        """Raises `IncompatibleDevice` where the build does not cover the architecture of the layer's own device."""
        archs = kernel.loaded.metadata.backend.archs
        if device.type != "cuda" or not archs:
            return
        devices = visible_archs(BY_NAME[kernel.backend])
        index = torch.cuda.current_device() if device.index is None else device.index
        if index < len(devices) and not covers(archs, devices[index]):
            raise IncompatibleDevice(
                f"{kernel.repository} is built for {', '.join(archs)}; {device} has {devices[index]}",
                hint="Build it for this device, or leave the layer out with exclude=.",
            )

    def _unfit(self, kernel: LayerKernel, row: Row) -> Failure | None:
        """What the mode needs and the kernel does not have. Who registered it for that very mode is told by an error."""
        mode, lacks = self.request.mode, ""
        if Mode.TRAINING in mode and not kernel.has_backward:
            lacks = "it has no backward (has_backward = False)"
        elif Mode.TORCH_COMPILE in mode and not kernel.can_torch_compile:
            lacks = "it does not say that it supports torch.compile (can_torch_compile = True)"
        if not lacks:
            return None
        explicit = row.mode is not Mode.FALLBACK
        error = NoKernelForLayer(
            f"{kernel.repository} does not serve {mode}: {lacks}",
            hint=f"It is registered for {row.mode}." if explicit else None,
        )
        case = KernelizeFallback.CONTRACT if explicit else KernelizeFallback.NO_COMPATIBLE_MODE
        return Failure(kernel.repository, case, error)

    def _swap(self, kernel: LayerKernel, module: nn.Module, device: torch.device, notes: tuple[str, ...]) -> Swap:
        loaded = kernel.loaded
        return Swap(
            repository=kernel.repository,
            repo=kernel.repo,
            layer=kernel.repository.name,
            backend=kernel.backend,
            mode=self.request.mode,
            device=str(device),
            training=module.training,
            commit=loaded.repo_info.revision if loaded.repo_info else None,
            variant=str(loaded.variant) if loaded.variant else None,
            digest=loaded.digest,
            notes=notes,
            restore=self.restore,
        )


def _said(failures: list[Failure]) -> str:
    """Why no kernel can be used; of several, each by name."""
    if len(failures) == 1:
        return failures[0].reason
    return "; ".join(f"{failure.repository}: {failure.reason}" for failure in failures)
