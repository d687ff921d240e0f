"""Which commit a version is, and what is there: from the store where the hub was asked not long ago, or from the hub.

What a hub says of a version is believed for a while (`ref_ttl`), and only forwards: see `core/history.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from kernelhub.core.history import goes_back, remembered
from kernelhub.core.refs import Pin, RepoId, Revision
from kernelhub.core.trust import Origin, Published
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import (
    BuildFailed,
    HubUnavailable,
    InvalidMetadata,
    KernelHubWarning,
    KernelNotFound,
    RepositoryNotFound,
    Yanked,
)
from kernelhub.hub.request import Found, Options
from kernelhub.hub.revocations import RevocationLists, Warn
from kernelhub.hub.sources.base import LOCAL, UNAVAILABLE, Listing, Source
from kernelhub.hub.sources.project import ProjectSource
from kernelhub.hub.store import RefRecord, Store

if TYPE_CHECKING:
    from kernelhub.core.manifest import Manifest

_Answer = TypeVar("_Answer")

_CHECK_AGAIN = 86_400.0


@dataclass(frozen=True)
class Resolver:
    """Asks sources, and remembers in the store what they said. `ref_ttl` and what `clock` gives are seconds."""

    store: Store
    lists: RevocationLists
    clock: Callable[[], float]
    ref_ttl: float
    warn: Warn

    def ask(self, source: Source, options: Options, question: Callable[[], _Answer]) -> _Answer:
        """Ask a source, unless that would need the network and there is to be none."""
        if options.offline and source.origin is Origin.REMOTE:
            raise RepositoryNotFound(f"it is not in the store, and {source.name} is not asked offline")
        if source.origin is Origin.REMOTE:
            self._check_hub(source)
        return question()

    def commit(self, source: Source, repo: RepoId, pin: Pin, options: Options) -> str:
        """The commit: from the pin itself, from the store where the hub was asked not long ago, or from the hub."""

        def resolve() -> str:
            self._learn_revocations(source, repo, options)  # first: a hub that withholds them has not answered
            named = source.resolve(repo, pin)
            if named == LOCAL and source.origin in (Origin.REMOTE, Origin.CACHE):
                raise InvalidMetadata(f"{source.name} says that {repo}@{pin} is {LOCAL}, which is no commit")
            return named

        if isinstance(pin, Revision) and pin.commit:
            known = self.store.listing(source.key, repo, pin.commit)
            if known and not isinstance(source, ProjectSource):
                remote = source.origin is Origin.REMOTE
                if not remote or (options.refresh and not options.offline):  # a look into a folder costs little
                    self.ask(source, options, lambda: self._learn_revocations(source, repo, options))
                return pin.commit
            try:  # the same sources may be built with other tools by now, and then lie elsewhere
                return self.ask(source, options, resolve)
            except KernelNotFound:
                if known:
                    return pin.commit
                raise
        record = self.store.ref(source.key, repo, str(pin))
        if record and self._fresh(record, source, options):
            if record.commit is None:
                raise RepositoryNotFound(f"{source.name} has no {repo}")
            return record.commit
        try:
            named = self.ask(source, options, resolve)
            if named == LOCAL:
                return named
            kept = self._believed(source, repo, pin, record, named, options)
        except Yanked as error:
            if record is None or record.commit != error.commit:
                raise
            self.warn(f"{error.message}\n  It is here from before, and still used.", KernelHubWarning)
            return error.commit
        except (HubUnavailable, RepositoryNotFound) as error:
            # Gone, or hidden for want of a token: what is here stays in use, and no other source stands in for it.
            if record is None or record.commit is None:
                raise
            self.warn(f"{error}\n  Using {repo}@{pin} as it was known before ({record.commit[:12]}).", KernelHubWarning)
            return record.commit
        assert kept.commit is not None
        self.store.set_ref(source.key, repo, str(pin), kept)
        return kept.commit

    def listing(self, source: Source, repo: RepoId, commit: str, options: Options, *, again: bool = False) -> Listing:
        """The variants at a commit, and what else is there; `again` asks the source whatever the store has."""
        record = self.store.listing(source.key, repo, commit)
        known, parts = _details(record.get("variants")), _details(record.get("parts"))
        if known and parts is not None and not options.refresh and not again:
            return Listing(known, parts)
        listing = self.ask(source, options, lambda: source.listing(repo, commit))
        if commit != LOCAL:
            there = listing.document is not None
            if listing.document is not None:
                keys = options.policy.keys_for(Published(repo, source.origin, source.name))
                # First: the listing says that it is there.
                listing = replace(listing, document=self.store.set_document(source.key, listing.document, keys))
            self.store.set_listing(source.key, repo, commit, {**kept_of(listing), "manifest": there})
        return listing

    def remember_without(self, source: Source, repo: RepoId, pin: Pin) -> None:
        """A remote hub does not have what another source has: it need not be asked first each time."""
        if source.origin is Origin.REMOTE and self.store.ref(source.key, repo, str(pin)) is None:
            self.store.set_ref(source.key, repo, str(pin), RefRecord(None, self.clock()))

    def remember_failed(self, found: Found, variant: BuildVariant, error: BuildFailed) -> None:
        """What does not compile is not tried again by each new process, but by `refresh` or once anything differs."""
        reason = f"it did not compile here: {error.error}"
        variants = {
            **found.listing.variants,
            str(variant): {**found.listing.variants[str(variant)], UNAVAILABLE: reason},
        }
        source, repo, commit = found.source, found.repo, found.commit
        record = {**self.store.listing(source.key, repo, commit), **kept_of(replace(found.listing, variants=variants))}
        self.store.set_listing(source.key, repo, commit, record)

    def publisher_trusted(self, found: Found, options: Options) -> bool | None:
        """The hub's mark for the publisher, as it was when it was given for the commit; until then it is asked for."""
        source, repo, commit = found.source, found.repo, found.commit
        record = self.store.listing(source.key, repo, commit)
        if record.get("publisher_trusted") is not True:
            if options.offline and source.origin is Origin.REMOTE:
                return None
            trusted = source.publisher_trusted(repo)
            if not trusted:  # it may be given tomorrow, and one wrong answer must not count for ever
                return trusted
            record = {**record, **kept_of(found.listing), "publisher_trusted": trusted}
            self.store.set_listing(source.key, repo, commit, record)
        return True

    # Inside

    def _check_hub(self, source: Source) -> None:
        """Whether the place is a hub that this client can read: remembered for a day."""
        checked = self.store.checked(source.key)
        if checked is None or not 0 <= self.clock() - checked < _CHECK_AGAIN:
            source.check()
            self.store.set_checked(source.key, self.clock())

    def _fresh(self, record: RefRecord, source: Source, options: Options) -> bool:
        if source.origin is not Origin.REMOTE:  # a look into a folder costs less than being out of date
            return False
        if options.offline:
            return True
        return not options.refresh and not options.accept_older and 0 <= self.clock() - record.time < self.ref_ttl

    def _learn_revocations(self, source: Source, repo: RepoId, options: Options) -> None:
        keys = options.policy.keys_for(Published(repo, source.origin, source.name))
        self.lists.learn(source, keys, within=0.0 if options.refresh else self.ref_ttl)

    def _believed(
        self, source: Source, repo: RepoId, pin: Pin, record: RefRecord | None, named: str, options: Options
    ) -> RefRecord:
        """What to remember of what the hub named, now; the commit that it says is there."""
        kept = RefRecord(named, 0.0) if record is None else self._forward(source, repo, pin, record, named, options)
        assert kept.commit is not None
        if not self.store.listing(
            source.key, repo, kept.commit
        ):  # a ref that names nothing is not believed for an hour
            self.listing(source, repo, kept.commit, options)
        return replace(kept, time=self.clock())

    def _forward(
        self, source: Source, repo: RepoId, pin: Pin, record: RefRecord, named: str, options: Options
    ) -> RefRecord:
        """What to remember of what the hub named: where it goes back, what it was, with a warning that names both."""
        known = record.commit
        # A user's own sources go where they like; which of a cache's snapshots is the newest depends on the last download.
        if known is None or isinstance(source, ProjectSource) or source.origin is Origin.CACHE:
            return RefRecord(named, record.time)
        why = (
            goes_back(
                known, named, record.before, lambda commit: self._manifest(source, repo, commit, options, named=named)
            )
            if known != named
            else None
        )
        if why is None or options.accept_older:
            return RefRecord(named, record.time, remembered(record.before, known, named, back=why is not None))
        self.warn(
            f"{source.name} says that {repo}@{pin} is {named}; it was {known}, and {named[:12]} {why}.\n"
            f"  {known[:12]} is still used. To go back: kernelhub get {repo}@{pin} --accept-older",
            KernelHubWarning,
        )
        return record

    def _manifest(self, source: Source, repo: RepoId, commit: str, options: Options, *, named: str) -> Manifest | None:
        """A commit's manifest; None where the hub has no manifests, or not this one.

        That of the commit which the hub `named` has to be there: a hub that has manifests, and now not this one, has not
        answered. Otherwise one that gives it on the second try only would pass for one without.
        """
        document = self.store.document(source.key, repo, commit)
        if document is None:
            try:
                document = self.ask(source, options, lambda: source.listing(repo, commit)).document
            except (HubUnavailable, KernelNotFound, InvalidMetadata):
                if commit == named:
                    raise
                return None
        return document.manifest if document else None


def kept_of(listing: Listing) -> dict[str, Any]:
    """What the store keeps of a listing."""
    return {"variants": listing.variants, "parts": listing.parts}


def _details(value: Any) -> dict[str, dict[str, Any]] | None:
    """What a listing maps names to, where a file of the store has such a thing."""
    return value if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()) else None
