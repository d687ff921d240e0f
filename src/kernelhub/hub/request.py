"""What a call wants, and what was found for it: the values that the client's steps hand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kernelhub.core.lockfile import LockFile
from kernelhub.core.refs import KernelRef, RepoId, Revision
from kernelhub.core.trust import TrustPolicy
from kernelhub.hub.sources.base import LOCAL, Listing, Source


@dataclass(frozen=True)
class Found:
    """A repository at a commit, in the source that has it, with its variants.

    `signed` says that it may run because a key signed it, so that nothing but what was signed counts for it. `by_identity` says that nothing but a Sigstore signature may let it run: those lie in the variants, so it is fetched,
    and each variant is checked before it is used. Nothing is built from such a repository's source.
    """

    ref: KernelRef
    source: Source
    commit: str
    listing: Listing
    by_identity: bool = False
    signed: bool = False

    @property
    def repo(self) -> RepoId:
        return self.ref.repo

    @property
    def pinned(self) -> KernelRef:
        """The reference that names this very content."""
        return self.ref if self.commit == LOCAL else replace(self.ref, pin=Revision(self.commit))


@dataclass(frozen=True)
class Options:
    """How one call wants it: what it trusts, for which backend, and what it expects.

    With a `lock` each kernel, also those that it depends on, is taken at the commit that this names; `expected` maps the
    kernel's variants to the digests that it names for them. `above` are the kernels that led here, for cycles.
    With `accept_older` a version may become what it was before.
    """

    policy: TrustPolicy = field(default_factory=TrustPolicy)
    backend: str | None = None
    check_arch: bool = True
    refresh: bool = False
    offline: bool = False
    lock: LockFile | None = None
    expected: Mapping[str, str] = field(default_factory=dict)
    above: tuple[str, ...] = ()
    accept_older: bool = False
