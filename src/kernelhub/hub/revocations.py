"""Revocation lists: learnt from hubs and kept, so that they count offline too; and written into hubs.

What a key revoked counts wherever it came from: a commit's name is a hash of what it is, so it is the same on each hub.
What any list of the key said is kept, whatever another list, newer, older or of another hub, does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernelhub.core.trust import Origin
from kernelhub.errors import HubUnavailable, IntegrityError, InvalidReference, KernelHubWarning, context
from kernelhub.hub.addresses import shown
from kernelhub.hub.sources.base import Source
from kernelhub.hub.store import Store

if TYPE_CHECKING:
    from kernelhub.core.revocations import Revocations, RevocationsDocument
    from kernelhub.core.signatures import PublicKey
    from kernelhub.hub.files import WritableFiles
    from kernelhub.hub.signing import Signer

# How often to write a list again where somebody else writes it at the same time.
_TRIES = 5

Warn = Callable[[str, type[Warning]], None]


@dataclass(frozen=True)
class RevocationLists:
    """The lists that this client knows: those of the store, and those learnt since where it cannot be written."""

    store: Store
    clock: Callable[[], float]
    warn: Warn
    _learnt: dict[str, Revocations] = field(default_factory=dict)

    def known(self, keys: Sequence[PublicKey]) -> tuple[Revocations, ...]:
        """All that each key took back in lists that were seen here. Raises `IntegrityError` for what is damaged."""
        return tuple(item for key in keys if (item := self._known(key)) is not None)

    def learn(self, source: Source, keys: Sequence[PublicKey], *, within: float) -> None:
        """Ask a hub for the lists of the keys, each unless it was asked less than `within` seconds ago.

        Raises `InvalidMetadata` or `IntegrityError` for a list that is malformed or not signed by its key.
        """
        if not keys:
            return
        from kernelhub.core.revocations import path_of

        for key in keys:
            seen = self.store.revocations_seen(source.key, key.id)
            now = self.clock()
            if source.origin is Origin.REMOTE and seen is not None and 0 <= now - seen.time < within:
                continue
            data = source.revocations(key.id)
            with context(f"{source.name}: {path_of(key.id)}"):
                found = None if data is None else checked(data, key)
            number = found.revocations.number if found else 0
            if seen is not None and number < seen.number:
                self.warn(
                    f"{source.name} had revocation list {seen.number} of key {key.id}, and has "
                    f"{f'number {number}' if found else 'none'} now\n  What the key ever took back still counts.",
                    KernelHubWarning,
                )
                number = seen.number
            if found is not None:
                self.keep(key, found)
            self.store.set_revocations_seen(source.key, key.id, number, now)

    def _known(self, key: PublicKey) -> Revocations | None:
        learnt, stored = self._learnt.get(key.id), self.store.revocations(key.id)
        return learnt.merged(stored) if learnt and stored else learnt or stored

    def keep(self, key: PublicKey, found: RevocationsDocument, *, must: bool = False) -> None:
        """Have it count that a right list of the key said this. Where the store cannot be written only here, unless it `must`.

        Raises `IntegrityError` where a store has no room for all of it.
        """
        from kernelhub.core.revocations import MAX_BYTES, RevocationsDocument

        known = self._known(key)
        whole = found.revocations if known is None else known.merged(found.revocations)
        if whole == known:
            return
        if len(RevocationsDocument(whole).to_bytes()) > MAX_BYTES:
            raise IntegrityError(
                f"key {key.id} revoked more than fits {MAX_BYTES:,} bytes, in lists that do not know of each other",
                hint="Stop trusting the key, or ask whoever has it.",
            )
        self._learnt[key.id] = whole
        self.store.set_revocations(whole, must=must)


def checked(data: bytes, key: PublicKey) -> RevocationsDocument:
    """The list in a file, which the key signed. Raises `InvalidMetadata` or `IntegrityError`."""
    from kernelhub.core.revocations import RevocationsDocument
    from kernelhub.hub.signing import right_signers

    document = RevocationsDocument.parse(data, key.id)
    if not right_signers(document.revocations.payload, document.signatures, [key]):
        raise IntegrityError(f"the revocation list is not signed by its key {key.id}")
    return document


def revoke(
    hub_url: str, signer: Signer, *, time: str, keys: Mapping[str, str], commits: Mapping[str, str]
) -> Revocations:
    """Add keys (by id) and commits, each with a reason, to the signer's list in a hub that can be written.

    Raises `InvalidReference` where there is nothing to add, and as `publish` does.
    """
    from kernelhub.core.revocations import RevocationsDocument, path_of
    from kernelhub.hub.publish import writable_hub

    if not keys and not commits:
        raise InvalidReference("there is nothing to revoke", hint="Name commits (--commit) or keys (--key).")
    path = path_of(signer.public.id)
    with context(f"revoking in {shown(hub_url)}"):
        files = writable_hub(hub_url)
        for _ in range(_TRIES):
            before = _read(files, path, signer.public)
            if keys.keys() <= before.keys.keys() and commits.keys() <= before.commits.keys():
                return before
            after = before.added(time, keys=keys, commits=commits)
            data = RevocationsDocument(after, (signer.sign(after.payload),)).to_bytes()
            checked(data, signer.public)  # what cannot be read back would stop every client that trusts the key
            files.replace(path, data)
        raise HubUnavailable(f"{path} is written by others again and again", hub=files.name)


def _read(files: WritableFiles, path: str, key: PublicKey) -> Revocations:
    from kernelhub.core.revocations import MAX_BYTES, Revocations

    data = files.read(path, MAX_BYTES)
    return Revocations(key.id) if data is None else checked(data, key).revocations
