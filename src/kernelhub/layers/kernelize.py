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
from typing import TYPE_CHECKING, Any

from torch import nn

from kernelhub.errors import (
    KernelHubWarning,
    NoKernelForLayer,
)
from kernelhub.layers.agreement import agree, check_same, described, place_of, prove_together
from kernelhub.layers.evidence import Evidence
from kernelhub.layers.fitness import foreign_forward
from kernelhub.layers.fusion import as_one, passing, with_groups
from kernelhub.layers.kernel import Swap
from kernelhub.layers.loader import Loader
from kernelhub.layers.markers import take_back
from kernelhub.layers.mode import KernelizeFallback, Mode
from kernelhub.layers.outcome import Outcome, where
from kernelhub.layers.plan import DeviceLike, Request, Selection, Selector, decide, reasons
from kernelhub.layers.quarantine import forward_for, restores
from kernelhub.layers.ranks import GroupLike, deciding
from kernelhub.layers.report import Run, decided, remember, undo
from kernelhub.layers.survey import Site, Survey, survey
from kernelhub.layers.swap import USES, Transaction, functions_lock, has_users, in_effect
from kernelhub.layers.tables import UNMARKED
from kernelhub.settings import Settings
from kernelhub.warning import warn

if TYPE_CHECKING:
    from kernelhub.hub.store import Store
    from kernelhub.layers.proof import Demand
    from kernelhub.layers.tolerance import Tolerance

_log = logging.getLogger("kernelhub")

# What is missing where everything says "no kernel is registered".
_NOTHING_REGISTERED = (
    "Kernels are registered with use_kernel_mapping or register_kernel_mapping; default_mapping() of "
    "kernelhub.integrations.transformers has those of this package."
)

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
    paths (`*` is one segment, `**` any number, at the end at least one) or classes.

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
        _warn_of_paths(request.selector, found)
        options = {"use_fallback": fallback, "verify": verify, "only_if_faster": only_if_faster, "on_error": on_error}
        options["DISABLE_KERNEL_MAPPING"] = settings.mapping_disabled
        check_same(ranks, "what is asked for", lambda: described(request, found, options))
        if settings.mapping_disabled:
            _restore(model, Selector(None, None))
            remember(model, Run(mode, "kernels are switched off (DISABLE_KERNEL_MAPPING)", {}))
            _log.info("%s keeps its forwards: kernels are switched off (DISABLE_KERNEL_MAPPING)", type(model).__name__)
            return model
        from kernelhub.hub.client import default_hub

        hub = default_hub()
        decisions = decide(found, request)

        def load(first: bool) -> list[Outcome]:
            source = hub if first else hub.without_network()  # what the first of this machine fetched
            loader = Loader(source, request, fallback, compared=demand is not None, restore=restore)
            return loader.outcomes(found.sites, decisions)

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
            _say(model, outcomes, registered=bool(request.table))  # a warning may be an error
            remember(model, Run(mode, None, {**_kept(found.sites, outcomes), **told}, _evidence(found.sites, outcomes)))
    return model


def unkernelize(model: nn.Module, *, include: Selection = None, exclude: Selection = None) -> nn.Module:
    """Give the layers of `model` their original forwards back; returns the same model.

    What is left is the model as if it had never been kernelized. `include` and `exclude` as in `kernelize`.
    """
    selector = Selector(include, exclude)
    found = _restore(model, selector)
    _warn_of_paths(selector, found)
    if selector.idle:
        for module in found.tree.modules:
            take_back(module)
    return model


def _warn_of_paths(selector: Selector, found: Survey) -> None:
    """Say which patterns are at no module: what `exclude` misspells gets kernels, and what `include` misspells none."""
    for line in selector.unmatched(found):
        warn(line, KernelHubWarning)


def _restore(model: nn.Module, selector: Selector) -> Survey:
    """Give the layers that are selected their forwards back; what was found in the model before. Marks stay."""
    with functions_lock, Transaction() as transaction:
        found = survey(model)
        for path, module in found.marked:
            if selector.refuses(path, module) is None:
                transaction.take(module)
        for path, module in found.users:
            _leave_some(transaction, module, path, selector)
    if selector.idle:
        undo(model, held=bool(found.marked or found.users))
        for module in _kernelized_again(found):
            module.__dict__[_AGAIN] = False
    return found


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
    again, runs = _kernelized_again(found), decided(model)
    before = [(module, marker) for _, module in found.marked if (marker := in_effect(module))]
    stakes = [(module, uses) for _, module in found.users if (uses := module.__dict__.get(USES))]
    forwards = {id(function): in_effect(function) for _, uses in stakes for function, _ in uses.functions.values()}
    try:
        yield kernelize(model, **options)
    finally:
        _restore(model, Selector(None, None))
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
        for module, run in runs:
            remember(module, run)
        for module in again:
            module.__dict__[_AGAIN] = True


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


def _say(model: nn.Module, outcomes: list[Outcome], *, registered: bool) -> None:
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
        why = reasons(kept) if kept else UNMARKED
        hint = "" if registered or not kept else f"\n  {_NOTHING_REGISTERED}"
        warn(f"{type(model).__name__} was kernelized and runs no kernel: {why}{hint}", KernelHubWarning)
