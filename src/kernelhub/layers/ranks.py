"""Processes of torch.distributed that decide together: the same kernels under the same layers, or an error on each.

They talk through the store of the process group and not through its collectives. A collective that one rank alone calls
meets the next one of the others, whatever that is for, and what waits in it cannot say for whom. Here a rank that does not
come is named, the group stays usable, and no device is touched, so it is the same for gloo and nccl.

The lowest rank of the group leads. It opens a session under a fresh name, so that a call which others did not join leaves
nothing that a later one could mistake for its own. In each step every rank tells the leader a value, or why it failed, and
the leader tells all of them what all said. A rank that raises between two steps says so at the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kernelhub.errors import InvalidReference, KernelHubError, RankFailed, RanksDisagree
from kernelhub.layers.kernel import LayerKernel, Swap
from kernelhub.layers.outcome import Outcome
from kernelhub.layers.survey import Site, Survey, class_name

if TYPE_CHECKING:
    from kernelhub.layers.plan import Request

GroupLike = Any  # a torch.distributed.ProcessGroup, None (the default one) or False (none)
_T = TypeVar("_T")

_log = logging.getLogger("kernelhub")
_one_at_a_time = threading.Lock()
_SAY_AFTER = 30.0  # seconds after which a rank that waits says for whom
_APART = "A model that only some ranks have: kernelize(..., group=False), or group= the ranks that have it."
_LONGER = "KERNELHUB_RANKS_TIMEOUT is how many seconds ranks wait for each other."


class Ranks:
    """Processes that decide together. This one is alone: it decides, and asks nobody."""

    rank = 0

    @property
    def alone(self) -> bool:
        return True

    def tell(self, step: str, value: Any) -> list[tuple[int, Any]]:  # noqa: ARG002 - sessions say it in errors
        """What each rank says in this step, by rank. Raises `RankFailed` where one failed, or does not come."""
        return [(self.rank, value)]

    def views(self, step: str, value: Any) -> list[tuple[tuple[int, ...], Any]]:
        """The different values that ranks have, each with its ranks; one where all agree.

        Only digests are sent where they do. Values are what JSON has.
        """
        text = json.dumps(value)
        digest = _digest(text)
        holders: dict[str, list[int]] = {}
        for rank, told in self.tell(step, digest):
            holders.setdefault(told, []).append(rank)
        if len(holders) == 1:
            return [(tuple(holders[digest]), value)]
        speakers = {ranks[0]: tuple(ranks) for ranks in holders.values()}
        said = self.tell(step, value if self.rank in speakers else None)
        return [(speakers[rank], told) for rank, told in said if rank in speakers]

    def any(self, step: str, value: bool) -> bool:
        """Whether it is so on any rank."""
        return any(told for _, told in self.tell(step, bool(value)))

    def first_at(self, step: str, place: str, work: Callable[[bool], _T]) -> _T:
        """`work(True)` on the first rank of each place; when these are done, `work(False)` on the others."""
        firsts: dict[str, int] = {}
        told = self.tell(step, place)
        for rank, at in told:
            firsts.setdefault(at, rank)
        if len(firsts) == len(told):
            return work(True)
        first = firsts[place] == self.rank
        done = work(True) if first else None
        self.tell(step, None)
        return done if first else work(False)  # type: ignore[return-value]


_ALONE = Ranks()


@contextmanager
def deciding(group: GroupLike, timeout: float) -> Iterator[Ranks]:
    """The ranks that decide together in the `with` block.

    `group` None are all ranks where torch.distributed is initialised, False is this process alone. `timeout` (seconds) is
    how long ranks wait for each other. Raises `InvalidReference` [ValueError] for what is no group of this process, and
    `RankFailed` [RuntimeError] where a rank does not come, or fails inside the block.
    """
    members = _members(group)
    if members is None:
        yield _ALONE
        return
    with _one_at_a_time, _Session(*members, timeout) as session:
        yield session


def _members(group: GroupLike) -> tuple[Any, tuple[int, ...], int] | None:
    """The store that the ranks of a group share, the ranks, and which of them this is; None where it is alone."""
    if group is False:
        return None
    dist = sys.modules.get("torch.distributed")
    ready = dist is not None and dist.is_available() and dist.is_initialized()
    if not ready:
        if group is None:
            return None
        raise InvalidReference(
            f"group={group!r}, and torch.distributed is not initialised", hint="Expected None, False or a ProcessGroup."
        )
    assert dist is not None
    if group is not None and not isinstance(group, dist.ProcessGroup):
        inside = group is not dist.GroupMember.NON_GROUP_MEMBER
        raise InvalidReference(
            f"group={group!r} is no process group" if inside else "this process is not in the group",
            hint="Expected None (all ranks), False (this process alone), or a ProcessGroup that has this process.",
        )
    ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    if len(ranks) < 2 or dist.get_backend(group) == "fake":  # one process that stands for many, in tests
        return None
    store = dist.distributed_c10d._get_default_store()
    if store is None:
        raise InvalidReference(
            f"ranks of the {dist.get_backend(group)} backend have no store to agree through",
            hint="kernelize(..., group=False) decides on each rank alone.",
        )
    return store, ranks, dist.get_rank()


@dataclass(frozen=True)
class _Failed:
    """What a rank that cannot go on says in place of a value."""

    reason: str


class _Session(Ranks):
    """One call that the ranks make together."""

    def __init__(self, store: Any, ranks: tuple[int, ...], rank: int, timeout: float) -> None:
        self.rank = rank
        self._store, self._ranks, self._timeout = store, ranks, timeout
        self._door = f"kernelhub/{_digest(repr(ranks))[:16]}"
        self._name = ""
        self._steps = 0
        self._over = False

    @property
    def alone(self) -> bool:
        return False

    @property
    def _leads(self) -> bool:
        return self.rank == self._ranks[0]

    def __enter__(self) -> _Session:
        try:
            self._open()
            self.tell("coming together", None)
        except BaseException as error:
            self._say_failed(error)
            raise
        finally:
            if self._leads:
                self._try_delete(self._door)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        self._say_failed(error)
        if isinstance(error, KernelHubError) and not isinstance(error, (RankFailed, RanksDisagree)):
            error.add_context(f"on rank {self.rank}")
        elif not isinstance(error, KernelHubError) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"on rank {self.rank}, while ranks kernelize together")

    def _open(self) -> None:
        if self._leads:
            self._name = uuid.uuid4().hex
            self._ask(self._store.set, self._door, self._name)
            return
        late = self._await([self._door], "coming together", self._timeout, self._ranks[:1])
        if late:
            self._over = True
            raise self._absent("coming together", self._ranks[:1], self._timeout)
        self._name = self._ask(self._store.get, self._door).decode()

    # A step

    def tell(self, step: str, value: Any) -> list[tuple[int, Any]]:
        self._steps += 1
        if self._leads:
            said = self._collect(step, value)
            self._ask(self._store.set, self._key("all"), _written(said))
        else:
            self._ask(self._store.set, self._key(self.rank), json.dumps({"value": value}))
            said = self._listen(step)
        failed = {rank: told.reason for rank, told in said if isinstance(told, _Failed)}
        if failed:
            self._over = True
            raise RankFailed(
                f"no rank kernelizes: {_named(failed)} failed ({step})", failed, hint="Its own error says more."
            )
        absent = tuple(sorted({*self._ranks} - {rank for rank, _ in said}))
        if absent:
            self._over = True
            raise self._absent(step, absent, self._timeout)
        return said

    def _collect(self, step: str, value: Any) -> list[tuple[int, Any]]:
        """What all ranks say; who does not come is missing. What was said before is known to all who came this far."""
        others = self._ranks[1:]
        keys = {rank: self._key(rank) for rank in others}
        late = set(self._await(list(keys.values()), step, self._timeout, others))
        said: list[tuple[int, Any]] = [(self.rank, value)]
        for rank, key in keys.items():
            if key not in late:
                said.append((rank, _read(self._ask(self._store.get, key))))
                self._try_delete(key)
        self._try_delete(self._key("all", self._steps - 1))
        return said

    def _listen(self, step: str) -> list[tuple[int, Any]]:
        # The leader may come as late as it may wait for the others, and then waits for them.
        timeout, key = 2 * self._timeout + 5, self._key("all")
        if self._await([key], step, timeout, self._ranks[:1]):
            self._over = True
            raise self._absent(step, self._ranks[:1], timeout)
        return [(rank, _read(json.dumps(told).encode())) for rank, told in json.loads(self._ask(self._store.get, key))]

    def _say_failed(self, error: BaseException) -> None:
        """Tell the others at the step to which they go next, unless they know. It waits for nobody."""
        if self._over or not self._name:
            return
        self._over = True
        self._steps += 1
        reason = _Failed(_first_line(error))
        try:
            if self._leads:
                self._store.set(self._key("all"), _written([(self.rank, reason)]))
            else:
                self._store.set(self._key(self.rank), json.dumps({"failed": reason.reason}))
        except Exception as unheard:  # noqa: BLE001 - this rank's own error is the one to raise
            _log.warning("the other ranks could not be told: %s", unheard)

    # The store

    def _key(self, who: int | str, step: int | None = None) -> str:
        return f"{self._door}/{self._name}/{self._steps if step is None else step}/{who}"

    def _await(self, keys: Sequence[str], step: str, timeout: float, ranks: Sequence[int]) -> list[str]:
        """Wait until all keys are there; those that are not there in time.

        It looks again and again: a wait inside the store holds the connection, which other threads of the process need
        too, and hears no Ctrl-C.
        """
        start = time.monotonic()
        pause, said = 0.001, False
        while not self._ask(self._store.check, list(keys)):
            waited = time.monotonic() - start
            if waited > timeout:
                return [key for key in keys if not self._ask(self._store.check, [key])]
            if waited > _SAY_AFTER and not said:
                said = True
                _log.warning(
                    "rank %d waits for %s to kernelize (%s); group=False decides alone",
                    self.rank,
                    _named(ranks) if len(ranks) == 1 else "others",
                    step,
                )
            time.sleep(min(pause, max(timeout - waited, 0.0)))
            pause = min(pause * 1.5, 0.1)
        return []

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(*args)
        except RuntimeError as error:
            self._over = True
            raise RankFailed(
                f"rank {self.rank} cannot reach the store that the ranks share: {_first_line(error)}",
                {},
                hint="The process that keeps it (rank 0, or torchrun) has ended.",
            ) from error

    def _try_delete(self, key: str) -> None:
        try:
            self._store.delete_key(key)
        except RuntimeError as error:  # some stores cannot; sessions have names of their own, so nothing is mistaken
            _log.debug("%s stays in the store: %s", key, error)

    def _absent(self, step: str, ranks: Sequence[int], timeout: float) -> RankFailed:
        reason = f"it did not come within {timeout:g} seconds"
        return RankFailed(
            f"no rank kernelizes: {_named(ranks)} did not come ({step})",
            dict.fromkeys(ranks, reason),
            hint=f"Every rank of the group must make the same call. {_APART} {_LONGER}",
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _written(said: Sequence[tuple[int, Any]]) -> str:
    return json.dumps(
        [(rank, {"failed": told.reason} if isinstance(told, _Failed) else {"value": told}) for rank, told in said]
    )


def _read(data: bytes) -> Any:
    told = json.loads(data)
    return _Failed(str(told["failed"])) if "failed" in told else told["value"]


def _named(ranks: Sequence[int] | Mapping[int, str]) -> str:
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else "")
    return f"rank {shown}" if len(listed) == 1 else f"ranks {shown}"


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# What is agreed


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
            differences.append(f"{_named(ours)} and {_named(theirs)} have them in another order")
        for name, missing in ((ours, here), (theirs, there)):
            differences += [f"only {_named(name)}: {line}" for line in missing[:5]]
            if len(missing) > 5:
                differences.append(f"only {_named(name)}: {len(missing) - 5} more")
    raise RanksDisagree(
        f"the ranks do not make the same call ({step})",
        differences,
        hint=f"Every rank of the group must kernelize the same model in the same way. {_APART}",
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
                return f"{repository} is {expected} on {_named(first)}, {digest} on {_named(who)}"
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
        return Outcome(outcome.name, None, None, f"{_named(who)}: {reason}", evidence)
    lists = [[tuple(kernel) for kernel in kernels] for _, (_, kernels) in sorted(entries)]
    everywhere = [kernel for kernel in lists[0] if all(kernel in other for other in lists[1:])]
    if not everywhere:
        has = ", ".join(f"{_named(who)} has {kernels[0][0]}" for who, (_, kernels) in sorted(entries))
        return Outcome(outcome.name, None, None, f"no kernel is on every rank: {has}", evidence)
    own = {_key(candidate[1]): candidate for candidate in _candidates(outcome)}
    (kernel, swap), *others = [own[key] for key in everywhere]
    return outcome._replace(kernel=kernel, swap=swap, others=tuple(others))
