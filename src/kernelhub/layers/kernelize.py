"""plan -> load -> contract -> proof -> swap -> report: kernels under a model's layers, all or none of them; and the way back.

Why only `forward`, and ahead of time: a forward that chooses by device or training mode breaks `torch.compile`; another
module in place of the layer has other members, and the original is lost; a wrapper around it changes every path in the
model. A forward on the instance changes none of these, and the class still has the original.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
    KernelHubWarning,
    LayerContractError,
    NoKernelForLayer,
    UntrustedKernel,
)
from kernelhub.hub.probe import visible_archs
from kernelhub.layers import contract
from kernelhub.layers.device import DEVICE_BACKENDS
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.fitness import foreign_forward
from kernelhub.layers.fusion import Group, as_one, fuse, passing, with_groups
from kernelhub.layers.kernel import LayerKernel, Swap, load_layer
from kernelhub.layers.mapping import Row
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.outcome import Outcome, allow, where
from kernelhub.layers.plan import Decision, DeviceLike, Request, Selection, Selector, decide, reasons
from kernelhub.layers.quarantine import forward_for, restores
from kernelhub.layers.ranks import GroupLike, agree, check_same, deciding, described, place_of, prove_together
from kernelhub.layers.report import Run, forget, remember
from kernelhub.layers.repositories import Repository
from kernelhub.layers.survey import Site, Survey, class_name, device_type, site_class, survey
from kernelhub.layers.swap import USES, Transaction, functions_lock, has_users, in_effect
from kernelhub.settings import Settings
from kernelhub.warning import warn

if TYPE_CHECKING:
    from kernelhub.hub.client import Hub
    from kernelhub.hub.store import Store
    from kernelhub.layers.proof import Demand
    from kernelhub.layers.tolerance import Tolerance

_log = logging.getLogger("kernelhub")

# transformers' models have this where `use_kernels` is on: their train() and eval() then kernelize them again, and so
# would bring back what was undone.
_AGAIN = "_use_kernels"


def kernelize(
    model: nn.Module,
    *,
    mode: Mode,
    device: DeviceLike = None,
    use_fallback: bool | KernelizeFallback = True,
    include: Selection = None,
    exclude: Selection = None,
    sample_inputs: Any = None,
    verify: bool | Tolerance = False,
    only_if_faster: bool = False,
    refresh: bool = False,
    on_error: str = "raise",
    group: GroupLike = None,
) -> nn.Module:
    """Let the kernel-aware layers of `model` run the kernels that are registered for them; returns the same model.

    Only `forward` is set, on instances: modules, names, parameters, hooks and the state dict stay as they are. A model that
    is kernelized already starts from its originals. If anything fails, the model is as it was before the call.

    `mode` is what the model will be used for, `device` where (None: each layer's own device). `use_fallback` names the
    cases in which a layer may keep its forward; in the others an error is raised. `include` and `exclude` are module
    paths (`*` is one segment, `**` any number) or classes.

    `verify` runs each kernel beside the original forward on what the layer is called with when the model runs on
    `sample_inputs` (a tensor, an args tuple, a kwargs dict, a function that runs the model, or a `Sample` of one), and
    keeps the original where they are not equal: within the tolerance of each dtype, within a `Tolerance`, or to the
    bit (`Tolerance.exact()`). `only_if_faster` times both, and keeps the kernel only where it wins; of several that are
    registered for a layer the fastest is taken. What was found is remembered in the store; `refresh` measures again.

    `on_error="restore"`: a kernel that raises when it is used is taken out of that layer, once and with a warning, and the
    original forward answers.

    Under torch.distributed all ranks decide together: the same kernels under the same layers, or none. `group` are the
    ranks that do: None all of them, a process group its own, False this process alone.

    Raises `InvalidReference` [ValueError] for arguments that cannot be, `NoKernelForLayer` [ValueError] and
    `LayerContractError` [TypeError] where a layer must not keep its forward, what loading raises where CANNOT_LOAD is not
    allowed, and `UntrustedKernel` and `IntegrityError` always; `RanksDisagree` and `RankFailed` [RuntimeError] where ranks
    have different models or kernels, where one of them raises, or does not come.
    """
    settings = Settings.from_env()
    with deciding(group, settings.ranks_timeout) as ranks:
        request = Request.of(mode, device, include, exclude)
        fallback = KernelizeFallback.of(use_fallback)
        demand = _demand(sample_inputs, verify, only_if_faster, refresh)
        restore = restores(on_error, mode)
        found = with_groups(survey(model), request.table)
        options = {"use_fallback": fallback, "verify": verify, "only_if_faster": only_if_faster, "on_error": on_error}
        options["DISABLE_KERNEL_MAPPING"] = settings.mapping_disabled
        check_same(ranks, "what is asked for", lambda: described(request, found, options))
        if settings.mapping_disabled:
            unkernelize(model)
            remember(model, Run(mode, "kernels are switched off (DISABLE_KERNEL_MAPPING)", {}))
            _log.info("%s keeps its forwards: kernels are switched off (DISABLE_KERNEL_MAPPING)", type(model).__name__)
            return model
        from kernelhub.hub.client import default_hub

        hub = default_hub()
        decisions = decide(found, request)

        def load(first: bool) -> list[Outcome]:
            source = hub if first else hub.without_network()  # what the first of this machine fetched
            resolver = _Resolver(source, request, fallback, compared=demand is not None, restore=restore)
            return resolver.outcomes(found.sites, decisions)

        outcomes = load(True) if ranks.alone else ranks.first_at("loading", place_of(hub.store.root), load)
        outcomes = agree(ranks, "loading", found.sites, outcomes)
        with functions_lock, Transaction() as transaction:
            for _, module in found.marked:
                transaction.take(module)
            for _, module in found.users:
                transaction.leave(module)
            if demand is not None:
                asked = demand
                outcomes = prove_together(
                    ranks,
                    found.sites,
                    outcomes,
                    lambda loaded: _prove(model, found.sites, loaded, asked, mode, fallback, hub.store),
                )
            _swap_layers(found.sites, outcomes, transaction)
            told = _swap_functions(found.sites, outcomes, transaction, fallback)
            check_same(ranks, "swapping", lambda: [f"{path}: {reason}" for path, reason in told.items()])
    remember(model, Run(mode, None, {**_kept(found.sites, outcomes), **told}, _evidence(found.sites, outcomes)))
    _say(model, outcomes)
    return model


def unkernelize(model: nn.Module, *, include: Selection = None, exclude: Selection = None) -> nn.Module:
    """Give the layers of `model` their original forwards back; returns the same model.

    What is left is the model as if it had never been kernelized. `include` and `exclude` as in `kernelize`.
    """
    selector, found = Selector(include, exclude), survey(model)
    with functions_lock, Transaction() as transaction:
        for path, module in found.marked:
            if selector.refuses(path, module) is None:
                transaction.take(module)
        for path, module in found.users:
            _leave_some(transaction, module, path, selector)
    if selector.idle:
        forget(model)
        for module in _kernelized_again(found):
            module.__dict__[_AGAIN] = False
    return model


def _demand(sample_inputs: Any, verify: bool | Tolerance, only_if_faster: bool, refresh: bool) -> Demand | None:
    """What is to be shown of the kernels. Nothing of that is imported for those who ask for nothing."""
    if sample_inputs is None and verify is False and only_if_faster is False and refresh is False:
        return None
    from kernelhub.layers.proof import Demand

    return Demand.of(sample_inputs, verify, only_if_faster, refresh)


def _prove(
    model: nn.Module,
    sites: list[Site],
    outcomes: list[Outcome],
    demand: Demand,
    mode: Mode,
    fallback: KernelizeFallback,
    store: Store,
) -> list[Outcome]:
    from kernelhub.layers.proof import prove
    from kernelhub.layers.verdicts import Memory

    return prove(
        model, list(map(as_one, sites)), outcomes, demand, mode, fallback, Memory(store, refresh=demand.refresh)
    )


@contextmanager
def kernelized(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """`kernelize(model, **options)` while the `with` block runs; then the model is what it was before."""
    found = survey(model)
    again = _kernelized_again(found)
    before = [(module, marker) for _, module in found.marked if (marker := in_effect(module))]
    stakes = [(module, uses) for _, module in found.users if (uses := module.__dict__.get(USES))]
    forwards = {id(function): in_effect(function) for _, uses in stakes for function, _ in uses.functions.values()}
    try:
        yield kernelize(model, **options)
    finally:
        unkernelize(model)
        with functions_lock, Transaction() as transaction:
            for module, marker in before:
                if foreign_forward(module) is None:
                    transaction.put(module, marker.swap, marker.function, marker.fusion)
            for module, uses in stakes:
                for function, swap in uses.functions.values():
                    held = forwards[id(function)]
                    if in_effect(function) is None and held is not None:
                        transaction.use(function, swap, held.function)
                transaction.join(module, uses.functions)
        for module in again:
            module.__dict__[_AGAIN] = True


@dataclass(frozen=True)
class _Failure:
    """A kernel that cannot be used, in a case that `use_fallback` may allow; None: in one that it always allows."""

    repository: Repository
    case: KernelizeFallback | None
    error: KernelHubError | ImportError | OSError

    @property
    def reason(self) -> str:
        return getattr(self.error, "message", str(self.error)).partition("\n")[0] or type(self.error).__name__


@dataclass
class _Resolver:
    """Loads each kernel once, and decides once for all layers of a class on a device.

    `compared`: all that are registered for a layer are loaded, to be measured against each other; else the first that can
    be used is taken.
    """

    hub: Hub
    request: Request
    fallback: KernelizeFallback
    compared: bool = False
    restore: bool = False
    _kernels: dict[tuple[Any, str], LayerKernel | _Failure] = field(default_factory=dict)
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
    ) -> tuple[list[tuple[LayerKernel, Swap]], list[_Failure]]:
        """The registered kernels that can be used, in the order in which they are, and why the others cannot."""
        usable: list[tuple[LayerKernel, Swap]] = []
        failures: list[_Failure] = []
        for repository in row.repositories:
            chosen = self._choose(module, repository, row, decision, device)
            if isinstance(chosen, _Failure):
                failures.append(chosen)
                continue
            usable.append(chosen)
            if not self.compared:
                break
        lost = tuple(f"{failure.repository}: {failure.reason}" for failure in failures)
        return [(kernel, replace(swap, lost=lost)) for kernel, swap in usable] if lost else usable, failures

    def _fused(
        self, group: Group, kernel: LayerKernel, swap: Swap
    ) -> tuple[list[tuple[LayerKernel, Swap]], list[_Failure]]:
        try:
            return [fuse(group, kernel, swap)], []
        except LayerContractError as error:
            return [], [_Failure(kernel.repository, KernelizeFallback.CONTRACT, error)]
        except NoKernelForLayer as error:
            return [], [_Failure(kernel.repository, KernelizeFallback.NO_COMPATIBLE_MODE, error)]

    def _check_allowed(self, site: Site, failures: list[_Failure]) -> None:
        """Raises the first error that `use_fallback` does not cover."""
        for failure in failures:
            if failure.case is not None and failure.case not in self.fallback:
                if isinstance(failure.error, KernelHubError):
                    failure.error.add_context(f"while kernelizing {where(site)}")
                raise failure.error

    def _choose(
        self, module: nn.Module, repository: Repository, row: Row, decision: Decision, device: torch.device
    ) -> tuple[LayerKernel, Swap] | _Failure:
        kernel = self._kernel(repository, device)
        if isinstance(kernel, _Failure):
            return kernel
        try:
            self._check_device(kernel, device)
            notes = contract.check(kernel.cls, kernel.forward, type(module), str(repository))
        except IncompatibleDevice as error:
            return _Failure(repository, KernelizeFallback.CANNOT_LOAD, error)
        except LayerContractError as error:
            return _Failure(repository, KernelizeFallback.CONTRACT, error)
        unfit = self._unfit(kernel, row) or self._undistributed(kernel, decision)
        return unfit or (kernel, self._swap(kernel, module, device, notes))

    def _undistributed(self, kernel: LayerKernel, decision: Decision) -> _Failure | None:
        if not decision.distributed or kernel.takes_dtensor:
            return None
        error = NoKernelForLayer("its weights are DTensors, and the kernel does not say that it takes them")
        return _Failure(kernel.repository, None, error)

    def _kernel(self, repository: Repository, device: torch.device) -> LayerKernel | _Failure:
        backend = DEVICE_BACKENDS.get(device_type(device), device.type)
        key = (repository, backend)
        if key not in self._kernels:
            self._kernels[key] = self._load(repository, backend)
        return self._kernels[key]

    def _load(self, repository: Repository, backend: str) -> LayerKernel | _Failure:
        try:
            self.hub.host.choose_backend(backend)
        except InvalidReference as error:
            return _Failure(repository, KernelizeFallback.CANNOT_LOAD, error)
        try:
            return load_layer(repository, backend, self.hub)
        except (IntegrityError, UntrustedKernel):
            raise  # never a case for the original: what is here is not what was asked for
        except LayerContractError as error:
            return _Failure(repository, KernelizeFallback.CONTRACT, error)
        except (NoKernelForLayer, IncompatibleDevice, ImportError, OSError) as error:
            return _Failure(repository, KernelizeFallback.CANNOT_LOAD, error)

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

    def _unfit(self, kernel: LayerKernel, row: Row) -> _Failure | None:
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
        return _Failure(kernel.repository, case, error)

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


def _said(failures: list[_Failure]) -> str:
    """Why no kernel can be used; of several, each by name."""
    if len(failures) == 1:
        return failures[0].reason
    return "; ".join(f"{failure.repository}: {failure.reason}" for failure in failures)


def _swap_layers(sites: list[Site], outcomes: list[Outcome], transaction: Transaction) -> None:
    for site, (_, kernel, swap, *_) in zip(sites, outcomes, strict=True):
        if kernel is None or swap is None or site.user is not None:
            continue
        if site.group is None:
            transaction.put(site.module, swap, forward_for(swap.restore, kernel.forward))
        else:
            for part in site.group.parts:
                first = part is site.module
                transaction.put(part, swap, kernel.forward if first else passing, site.group.fusion)


def _swap_functions(
    sites: list[Site], outcomes: list[Outcome], transaction: Transaction, fallback: KernelizeFallback
) -> dict[str, str]:
    """Functions are shared by all models: the first that asks decides, and the others are told, by path."""
    told: dict[str, str] = {}
    mine: set[int] = set()
    stakes: dict[int, tuple[nn.Module, dict[str, tuple[nn.Module, Swap]]]] = {}
    for site, (_, kernel, swap, *_) in zip(sites, outcomes, strict=True):
        if site.user is None:
            continue
        function, marker = site.module, in_effect(site.module)
        taken = marker is not None and (id(function) in mine or has_users(function))
        if marker is not None and taken:
            if swap is None or marker.swap.content != swap.content:
                told[site.path] = _tell(site, marker.swap, swap, fallback)
                continue
        elif kernel is not None and swap is not None:
            transaction.use(function, swap, forward_for(swap.restore, kernel.forward))
        elif marker is not None:
            transaction.take(function)  # whoever had it is gone
        if swap is not None:
            mine.add(id(function))
            user, functions = stakes.setdefault(id(site.user), (site.user, {}))
            functions[site.path.rpartition(".")[2]] = (function, swap)
    for user, functions in stakes.values():
        transaction.join(user, functions)
    return told


def _tell(site: Site, there: Swap, wanted: Swap | None, fallback: KernelizeFallback) -> str:
    asked = str(wanted.repository) if wanted else "its original"
    reason = (
        f"it is one function for the whole process, and runs {there.repository} already; here {asked} was asked for"
    )
    if fallback is KernelizeFallback.NONE:
        raise NoKernelForLayer(
            f"{where(site)}: {reason}", hint="unkernelize the other model first, or exclude the function here."
        )
    _log.warning("%s: %s", where(site), reason)
    return reason


def _kernelized_again(found: Survey) -> list[nn.Module]:
    """The modules that kernelize themselves when their mode changes."""
    return [module for module in found.tree.modules if module.__dict__.get(_AGAIN) is True]


def _leave_some(transaction: Transaction, module: nn.Module, path: str, selector: Selector) -> None:
    """End the module's stake in the functions that are selected, and keep the others."""
    uses = module.__dict__[USES]
    kept = {
        name: stake
        for name, stake in uses.functions.items()
        if selector.refuses(f"{path}.{name}" if path else name, stake[0]) is not None
    }
    if len(kept) == len(uses.functions):
        return
    forwards = {name: in_effect(function) for name, (function, _) in kept.items()}
    transaction.leave(module)
    for name, (function, swap) in kept.items():
        held = forwards[name]
        if in_effect(function) is None and held is not None:
            transaction.use(function, swap, held.function)
    if kept:
        transaction.join(module, kept)


def _kept(sites: list[Site], outcomes: list[Outcome]) -> dict[str, str]:
    """Why layers keep their forwards, by path."""
    if not any(outcome.reason for outcome in _distinct(outcomes).values()):
        return {}
    return {site.path: outcome.reason for site, outcome in zip(sites, outcomes, strict=True) if outcome.reason}


def _evidence(sites: list[Site], outcomes: list[Outcome]) -> dict[str, Evidence]:
    """What was measured of kernels that are not swapped in, by path."""
    if not any(outcome.evidence for outcome in _distinct(outcomes).values()):
        return {}
    return {
        site.path: outcome.evidence
        for site, outcome in zip(sites, outcomes, strict=True)
        if outcome.evidence is not None
    }


def _distinct(outcomes: list[Outcome]) -> dict[int, Outcome]:
    """The outcomes by identity: a few, shared by all layers."""
    return dict(zip(map(id, outcomes), outcomes, strict=True))


def _say(model: nn.Module, outcomes: list[Outcome]) -> None:
    """One line per class that runs a kernel; a warning where there is none at all."""
    swapped: Counter[tuple[str, str]] = Counter()
    kept: Counter[str] = Counter()
    distinct = _distinct(outcomes)
    for key, count in Counter(map(id, outcomes)).items():
        swap = distinct[key].swap
        if swap is None:
            kept[distinct[key].reason] += count
        else:
            swapped[distinct[key].name, f"{swap.repository} ({swap.variant or swap.digest})"] += count
    for (name, kernel), count in swapped.items():
        _log.info("%d x %s run %s", count, name, kernel)
    if not swapped:
        why = reasons(kept) if kept else "it has no kernel-aware layers"
        warn(f"{type(model).__name__} was kernelized and runs no kernel: {why}", KernelHubWarning)
