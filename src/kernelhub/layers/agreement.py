"""What processes that decide together have to agree on: what is asked for, which kernels, and what proved to be faster.

How they talk is in `ranks.py`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelhub.errors import RanksDisagree
from kernelhub.layers.kernel import LayerKernel, Swap
from kernelhub.layers.outcome import Outcome
from kernelhub.layers.ranks import APART, Ranks, named
from kernelhub.layers.survey import Site, Survey, class_name

if TYPE_CHECKING:
    from kernelhub.layers.plan import Request


def place_of(folder: Path) -> str:
    """What processes have in common that share a store: the folder itself, on this machine as it is running now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
        there = f"{status.st_dev}:{status.st_ino}"
    except OSError:
        there = str(folder)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        boot = ""
    return f"{boot or socket.gethostname()} {there}"


def check_same(ranks: Ranks, step: str, lines: Callable[[], Sequence[str]]) -> None:
    """Whether all ranks have the same lines. Raises `RanksDisagree`, which shows those that are different."""
    if ranks.alone:
        return
    views = ranks.views(step, list(lines()))
    if len(views) == 1:
        return
    (ours, first), *others = views
    differences = []
    for theirs, other in others:
        here, there = _only(first, other), _only(other, first)
        if not here and not there:
            differences.append(f"{named(ours)} and {named(theirs)} have them in another order")
        for name, missing in ((ours, here), (theirs, there)):
            differences += [f"only {named(name)}: {line}" for line in missing[:5]]
            if len(missing) > 5:
                differences.append(f"only {named(name)}: {len(missing) - 5} more")
    raise RanksDisagree(
        f"the ranks do not make the same call ({step})",
        differences,
        hint=f"Every rank of the group must kernelize the same model in the same way. {APART}",
    )


def _only(lines: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [line for line in lines if line not in known]


def described(request: Request, found: Survey, options: Mapping[str, object]) -> list[str]:
    """What `kernelize` was asked for, and of which layers, a line each, as ranks compare it."""
    asked = [f"{name}={value}" for name, value in options.items()]
    asked += [f"mode={request.mode}", f"device={request.device.type if request.device else None}"]
    layers = [
        f"{site.path or 'the model'} ({class_name(site.module)}, {site.aware.layer_name})" for site in found.sites
    ]
    names = sorted({site.aware.layer_name for site in found.sites})
    rows = [f"{name}: {row.device}, {row.mode}: {row.named}" for name in names for row in request.table.get(name, ())]
    return [*asked, *layers, *sorted(rows)]


_Key = tuple[str, str, str]  # repository, layer, digest
_Views = Sequence[tuple[tuple[int, ...], list[Any]]]


def agree(ranks: Ranks, step: str, sites: Sequence[Site], outcomes: list[Outcome]) -> list[Outcome]:
    """What all ranks can run: a layer keeps its forward on all of them where one has no kernel for it.

    Of several kernels for a layer those are left that every rank has. Raises `RanksDisagree` where a repository is other
    code on another rank.
    """
    return _agree(ranks, step, sites, outcomes)[0]


def prove_together(
    ranks: Ranks, sites: Sequence[Site], outcomes: list[Outcome], prove: Callable[[list[Outcome]], list[Outcome]]
) -> list[Outcome]:
    """The outcomes after `prove`, agreed: a kernel stays where it is equal, and faster, on every rank.

    Where ranks found different kernels to be the fastest, the lowest rank's choice is looked at again on all of them.
    `outcomes` have the same kernels on all ranks (see `agree`).
    """
    proven = prove(outcomes)
    if ranks.alone:
        return proven
    agreed, open_ = _agree(ranks, "comparing kernels", sites, proven)
    if not open_:
        return agreed
    rest = [
        _only_kernel(outcome, open_[index]) if index in open_ else Outcome(outcome.name, None, None)
        for index, outcome in enumerate(outcomes)
    ]
    second, _ = _agree(ranks, "comparing one kernel", sites, prove(rest))
    return [second[index] if index in open_ else outcome for index, outcome in enumerate(agreed)]


def _agree(
    ranks: Ranks, step: str, sites: Sequence[Site], outcomes: list[Outcome]
) -> tuple[list[Outcome], dict[int, _Key]]:
    """The outcomes that all can have; and where each has one kernel and not the same, the lowest rank's, by site."""
    if ranks.alone:
        return outcomes, {}
    known: dict[int, list[Any]] = {}
    views = ranks.views(step, [known.setdefault(id(outcome), _view(outcome)) for outcome in outcomes])
    if len(views) == 1:
        return outcomes, {}
    differences: list[str] = []
    open_: dict[int, _Key] = {}
    agreed = []
    for index, (site, outcome) in enumerate(zip(sites, outcomes, strict=True)):
        entries = [(who, view[index]) for who, view in views]
        if different := _other_code(entries):
            differences.append(f"{site.path or 'the model'}: {different}")
        elif choice := _open_choice(entries):
            open_[index] = choice
        agreed.append(_common(outcome, entries))
    if differences:
        raise RanksDisagree(
            "the ranks have different kernels",
            differences,
            hint="Name one commit on all ranks (revision=, a lock file), and let them run on devices of one kind.",
        )
    return agreed, open_


def _view(outcome: Outcome) -> list[Any]:
    """What other ranks need to know of an outcome: its kernels, or why there is none."""
    return [outcome.reason, [list(_key(swap)) for _, swap in _candidates(outcome)]]


def _key(swap: Swap) -> _Key:
    return str(swap.repository), swap.layer, swap.digest


def _candidates(outcome: Outcome) -> list[tuple[LayerKernel, Swap]]:
    if outcome.kernel is None or outcome.swap is None:
        return []
    return [(outcome.kernel, outcome.swap), *outcome.others]


def _only_kernel(outcome: Outcome, key: _Key) -> Outcome:
    kernel, swap = next(candidate for candidate in _candidates(outcome) if _key(candidate[1]) == key)
    return outcome._replace(kernel=kernel, swap=swap, others=())


def _other_code(entries: _Views) -> str:
    """Where one repository is different code on two ranks: which, and what each has."""
    known: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for who, (_, kernels) in entries:
        for repository, layer, digest in kernels:
            first, expected = known.setdefault((repository, layer), (who, digest))
            if expected != digest:
                return f"{repository} is {expected} on {named(first)}, {digest} on {named(who)}"
    return ""


def _open_choice(entries: _Views) -> _Key | None:
    kernels = [own for _, (_, own) in sorted(entries)]
    if all(len(own) == 1 for own in kernels) and any(own != kernels[0] for own in kernels):
        repository, layer, digest = kernels[0][0]
        return repository, layer, digest
    return None


def _common(outcome: Outcome, entries: _Views) -> Outcome:
    """The outcome that all ranks can have."""
    without = [(who, reason) for who, (reason, kernels) in entries if not kernels]
    if len(without) == len(entries):
        return outcome
    evidence = outcome.swap.evidence if outcome.swap is not None else outcome.evidence
    if without:
        who, reason = min(without)
        return Outcome(outcome.name, None, None, f"{named(who)}: {reason}", evidence)
    lists = [[tuple(kernel) for kernel in kernels] for _, (_, kernels) in sorted(entries)]
    everywhere = [kernel for kernel in lists[0] if all(kernel in other for other in lists[1:])]
    if not everywhere:
        has = ", ".join(f"{named(who)} has {kernels[0][0]}" for who, (_, kernels) in sorted(entries))
        return Outcome(outcome.name, None, None, f"no kernel is on every rank: {has}", evidence)
    own = {_key(candidate[1]): candidate for candidate in _candidates(outcome)}
    (kernel, swap), *others = [own[key] for key in everywhere]
    return outcome._replace(kernel=kernel, swap=swap, others=tuple(others))
