"""The client: what callers ask for, each a prefix of the steps from a reference to a module (`steps.py`).

`has` stops after a variant is selected, `install` after it is fetched: they cannot disagree with `load`. What is looked
at without being run is in `inspection.py`, what goes into locks and out of them in `locking.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelhub.core.host import Host
from kernelhub.core.lockfile import MAX_BYTES, LockedKernel, LockFile
from kernelhub.core.refs import KernelRef, Pin, RepoId, Revision
from kernelhub.core.trust import TrustPolicy
from kernelhub.core.variants import BuildVariant, VariantAccepted, VariantRejected
from kernelhub.errors import (
    IncompatibleDevice,
    InvalidReference,
    KernelNotFound,
    NoCompatibleVariant,
    RepositoryNotFound,
    UntrustedKernel,
    context,
)
from kernelhub.hub.gate import Gate
from kernelhub.hub.importer import LoadedKernel
from kernelhub.hub.progress import TerminalLine
from kernelhub.hub.request import Options
from kernelhub.hub.resolve import Resolver
from kernelhub.hub.revocations import RevocationLists
from kernelhub.hub.sources.base import BENCHMARKS, Progress, Source
from kernelhub.hub.sources.defaults import building_of, default_sources
from kernelhub.hub.sources.local import local_source
from kernelhub.hub.sources.project import ProjectSource
from kernelhub.hub.steps import Steps, importer
from kernelhub.hub.store import Store
from kernelhub.hub.telemetry import UserAgent
from kernelhub.settings import Settings
from kernelhub.warning import once

if TYPE_CHECKING:
    from kernelhub.hub.request import Found
    from kernelhub.hub.verify import Verified

Trust = bool | Sequence[str]


class Hub:
    """A client with its settings, sources and store. The functions of `kernelhub` use one of these, `default_hub()`."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        sources: Sequence[Source] | None = None,
        host: Host | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = Settings.from_env() if settings is None else settings
        self.store = Store(self.settings.cache_folder, self.settings.verify_always)
        self.progress: Progress = progress or TerminalLine()
        self._sources = None if sources is None else tuple(sources)
        self._by_agent: dict[object, tuple[Source, ...]] = {}
        self._host = host
        self._clock = clock
        self._memo: dict[tuple[Any, ...], LoadedKernel] = {}
        self._offline: Hub | None = None
        warn = once()
        resolver = Resolver(self.store, RevocationLists(self.store, clock, warn), clock, self.settings.ref_ttl, warn)
        gate = Gate(resolver, self.settings.sigstore_root)
        self._steps = Steps(
            self.settings, self.store, resolver, gate, self.progress, warn, host, other_caches=sources is None
        )

    @property
    def host(self) -> Host:
        """The facts about this machine."""
        return self._steps.host

    def without_network(self) -> Hub:
        """This client as it is offline: what is in the store, and what the user has in folders."""
        if self.settings.offline:
            return self
        if self._offline is None:
            settings = replace(self.settings, offline=True)
            self._offline = Hub(
                settings, sources=self._sources, host=self._host, progress=self.progress, clock=self._clock
            )
        return self._offline

    # To run it

    def load(
        self,
        ref: KernelRef,
        *,
        backend: str | None = None,
        trust_remote_code: Trust = False,
        user_agent: UserAgent = None,
        check_arch: bool = True,
        refresh: bool = False,
    ) -> LoadedKernel:
        """The kernel, imported. The second time in a process it is found in a table, and nothing is asked or read."""
        key = (ref, backend, _hashable(trust_remote_code), check_arch)
        if not refresh and key in self._memo:
            return self._memo[key]
        options = Options(self._policy(trust_remote_code), backend, check_arch, refresh, self.settings.offline)
        loaded = self._memo[key] = self._steps.load(ref, self.sources(user_agent), options)
        return loaded

    def install(
        self,
        ref: KernelRef,
        *,
        backend: str | None = None,
        trust_remote_code: Trust = False,
        user_agent: UserAgent = None,
        local_files_only: bool = False,
        refresh: bool = False,
        accept_older: bool = False,
    ) -> Path:
        """The verified folder of the variant for this machine; the kernels that it depends on are fetched too.

        `accept_older` asks the hub now, and lets versions become what they were before.
        """
        offline = self.settings.offline or local_files_only
        options = Options(self._policy(trust_remote_code), backend, False, refresh, offline, accept_older=accept_older)
        return self._steps.install(ref, self.sources(user_agent), options).path

    def has(
        self, ref: KernelRef, *, backend: str | None = None, trust_remote_code: Trust = False, check_arch: bool = True
    ) -> bool:
        """Whether `load` would find a build for this machine. What it does not trust, or cannot reach, is an error."""
        options = Options(self._policy(trust_remote_code), backend, check_arch, offline=self.settings.offline)
        steps, sources = self._steps, self.sources()
        try:
            with context(f"while looking for {ref}"):
                found = steps.gate.admit(steps.find(ref, sources, options), options)
                place, variants = steps.select_or_build(found, options)
                archs = check_arch and steps.host.choose_backend(backend).name in ("cuda", "rocm")
                if archs or place.by_identity:  # what only the variant's own files say
                    metadata = steps.fetch(place, variants[0], options).metadata
                    if archs:
                        steps.check_archs(metadata, options)
        except (KernelNotFound, NoCompatibleVariant, IncompatibleDevice):
            return False
        return True

    def load_local(
        self,
        path: Path,
        *,
        backend: str | None = None,
        trust_remote_code: Trust = False,
        user_agent: UserAgent = None,
    ) -> LoadedKernel:
        """The kernel in a folder of the user's. Trust is for the kernels that it depends on."""
        source, repo = local_source(path, building=building_of(self.settings))
        options = Options(self._policy(trust_remote_code), backend, offline=self.settings.offline)
        return self._steps.load(KernelRef(repo, Revision("main")), (source, *self.sources(user_agent)), options)

    def load_locked(
        self,
        repo: RepoId,
        *,
        lockfile: Path | LockFile,
        pin: Pin | None = None,
        backend: str | None = None,
        trust_remote_code: Trust = False,
        user_agent: UserAgent = None,
        check_arch: bool = True,
        local_files_only: bool = False,
    ) -> LoadedKernel:
        """The kernel, and those that it depends on, at the commits and with the digests that a lock names.

        `pin` tells two entries of one repository apart.
        """
        lock = lockfile if isinstance(lockfile, LockFile) else read_lock(lockfile)
        offline = self.settings.offline or local_files_only
        options = Options(self._policy(trust_remote_code), backend, check_arch, offline=offline, lock=lock)
        return self._steps.load(KernelRef(repo, pin), self.sources(user_agent), options)

    # To look at it

    def variants(self, ref: KernelRef, *, backend: str | None = None) -> list[VariantAccepted | VariantRejected]:
        """All builds of the kernel: those that run here, best first, then the others with the reason."""
        with context(f"while looking for {ref}"):
            found = self._steps.find(ref, self.sources(), Options(backend=backend, offline=self.settings.offline))
            return self._steps.ranked(found, backend)

    def describe(
        self, ref: KernelRef, *, backend: str | None = None, trust_remote_code: Trust = False
    ) -> dict[str, Any]:
        """What the kernel is and what this machine would run of it, as plain values; none of its code is imported.

        Of a kernel that is not trusted nothing is fetched: `trusted` is None then, `untrusted` says why, and what only its
        files say is missing.
        """
        from kernelhub.hub.inspection import describe

        options = Options(self._policy(trust_remote_code), backend, offline=self.settings.offline)
        return describe(self._steps, ref, self.sources(), options)

    def verify(self, ref: KernelRef, *, backend: str | None = None, refresh: bool = False) -> dict[str, Any]:
        """Who signed the kernel, and whether this machine's variant is what they signed, as plain values.

        The variant is fetched and every byte of it hashed; none of its code is imported, so nobody has to be trusted.
        `signed_by` is who of those that the user trusts signed it, `unsigned` why nobody did. Raises `IntegrityError`
        where the bytes are not what was published, and `UntrustedKernel` for what was revoked.
        """
        from kernelhub.hub.inspection import verify

        options = Options(self._policy(False), backend, False, refresh, self.settings.offline)
        return verify(self._steps, ref, self.sources(), options)

    def digest_of(self, ref: KernelRef, variant: str) -> str | None:
        """The digest of one variant of a kernel, whether or not it runs here; None where it would have to be compiled.

        It is fetched and every byte of it hashed; none of its code is imported, so nobody has to be trusted. Raises
        `KernelNotFound`, `IntegrityError` where the bytes are not what was published, `UntrustedKernel` for what was revoked.
        """
        from kernelhub.hub.inspection import digest_of

        options = Options(self._policy(False), offline=self.settings.offline)
        return digest_of(self._steps, ref, self.sources(), options, BuildVariant.parse(variant))

    def benchmarks(self, ref: KernelRef, *, trust_remote_code: Trust = False) -> Path:
        """The folder of the repository's benchmark scripts, as they were published.

        Raises `UntrustedKernel` before any is fetched, and `KernelNotFound` where there are none.
        """
        options = Options(self._policy(trust_remote_code), offline=self.settings.offline)
        with context(f"while looking for the benchmarks of {ref}"):
            found = self._steps.gate.admit(self._steps.find(ref, self.sources(), options), options)
            if found.by_identity:
                raise UntrustedKernel(
                    f"the benchmarks of {found.repo} are not signed: Sigstore bundles cover builds only",
                    hint=f'If you trust them, pass trust_remote_code=["{found.repo}"].',
                )
            if isinstance(found.source, ProjectSource):
                folder: Path | None = found.source.project(found.repo) / BENCHMARKS
            else:
                folder = self._steps.part(found, BENCHMARKS, options)
            if folder is None or not folder.is_dir():
                raise KernelNotFound(f"{found.source.name} has no benchmarks of {found.repo}")
            return folder

    def versions(self, repo: RepoId) -> tuple[Source, Mapping[str, str]]:
        """The refs that the first source which has the repository names, with their commits."""
        asked, denied = self._steps.order(KernelRef(repo), self.sources(), self.settings.offline), None
        for source in asked:
            try:
                return source, source.refs(repo)
            except RepositoryNotFound as error:
                denied = error if error.hint or denied is None else denied
        raise self._steps.nowhere(KernelRef(repo), asked, denied)

    # Locks

    def lock(self, ref: KernelRef, *, trust_remote_code: Trust = False) -> tuple[LockedKernel, tuple[KernelRef, ...]]:
        """The kernel as a lock names it, and the kernels that any of its variants depends on.

        The hub is asked now. Of a variant no more than its metadata is fetched, unless that has no digest. What would be
        compiled here has none that others could compare, and is left out.
        """
        from kernelhub.hub.locking import lock

        offline = self.settings.offline
        options = Options(self._policy(trust_remote_code), refresh=not offline, offline=offline)
        return lock(self._steps, ref, self.sources(), options)

    def download(
        self, kernel: LockedKernel, lock: LockFile, *, all_variants: bool = False, trust_remote_code: Trust = False
    ) -> list[Verified]:
        """Fetch a kernel of a lock: the variant for this machine and what that depends on, or every variant it names."""
        if all_variants:
            return self.gather(kernel, lock, all_variants=True, trust_remote_code=trust_remote_code)[1]
        options = Options(self._policy(trust_remote_code), None, False, offline=self.settings.offline, lock=lock)
        return [self._steps.install(kernel.ref, self.sources(), options)]

    def gather(
        self, kernel: LockedKernel, lock: LockFile, *, all_variants: bool = False, trust_remote_code: Trust = False
    ) -> tuple[Found, list[Verified]]:
        """A kernel of a lock as its hub has it, with the variants, fetched: all that the lock names, or this machine's.

        None for this machine is one that would be built here from the source.
        """
        from kernelhub.hub.locking import gather

        options = Options(self._policy(trust_remote_code), None, False, offline=self.settings.offline, lock=lock)
        return gather(self._steps, kernel, self.sources(), options, all_variants=all_variants)

    # What it asks, and whom it trusts

    def sources(self, agent: UserAgent = None) -> tuple[Source, ...]:
        """Where kernels come from, in the order in which they are asked."""
        if self._sources is not None:
            return self._sources
        key = agent if agent is None or isinstance(agent, str) else tuple(sorted(agent.items()))
        if key not in self._by_agent:
            self._by_agent[key] = tuple(default_sources(self.settings, agent))
        return self._by_agent[key]

    def _policy(self, trust_remote_code: Trust) -> TrustPolicy:
        settings = self.settings
        return TrustPolicy.of(
            trust_remote_code,
            settings.trust,
            keys=settings.trusted_keys,
            identities=settings.trusted_identities,
            require_signature=settings.require_signature,
        )


def read_lock(lockfile: Path) -> LockFile:
    """A lock file's value. Raises `InvalidReference` where there is none, `InvalidMetadata` where it is malformed."""
    try:
        with lockfile.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidReference(
            f"cannot read the lock file {lockfile}: {error.strerror}", hint="`kernelhub lock` writes it."
        ) from error
    with context(str(lockfile)):
        return LockFile.parse(data)


def open_store() -> Store:
    """The local store that the environment names."""
    settings = Settings.from_env()
    return Store(settings.cache_folder, settings.verify_always)


def loaded_kernels() -> list[LoadedKernel]:
    """The kernels that were loaded in this process, in order."""
    return importer.loaded()


def _hashable(trust: object) -> object:
    return (type(trust), *map(repr, trust)) if isinstance(trust, (list, tuple, set, frozenset, dict)) else trust


_default: Hub | None = None
_default_lock = threading.Lock()


def default_hub() -> Hub:
    """The client that the module's functions use: made from the environment when it is first needed."""
    global _default
    if _default is None:
        with _default_lock:
            if _default is None:
                _default = Hub()
    return _default


def set_default_hub(hub: Hub | None) -> None:
    """Use another client from now on; None makes a new one from the environment when it is next needed."""
    global _default
    _default = hub
