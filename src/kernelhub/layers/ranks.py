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
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from kernelhub.errors import InvalidReference, KernelHubError, RankFailed, RanksDisagree

GroupLike = Any  # a torch.distributed.ProcessGroup, None (the default one) or False (none)
_T = TypeVar("_T")

_log = logging.getLogger("kernelhub")
_one_at_a_time = threading.Lock()
_SAY_AFTER = 30.0  # seconds after which a rank that waits says for whom
APART = "A model that only some ranks have: kernelize(..., group=False), or group= the ranks that have it."
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
                f"no rank kernelizes: {named(failed)} failed ({step})", failed, hint="Its own error says more."
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
                    named(ranks) if len(ranks) == 1 else "others",
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
        reason = f"it did not come within {timeout:g} s"
        return RankFailed(
            f"no rank kernelizes: {named(ranks)} did not come ({step})",
            dict.fromkeys(ranks, reason),
            hint=f"Every rank of the group must make the same call. {APART} {_LONGER}",
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


def named(ranks: Sequence[int] | Mapping[int, str]) -> str:
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else "")
    return f"rank {shown}" if len(listed) == 1 else f"ranks {shown}"


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
