"""The client: from a reference to a module, step by step.

    find     which source has it, at which commit          -> Found
    trust    may it run?                                      (before a byte of it is fetched)
    select   which of its builds runs here                 -> BuildVariant
    fetch    a folder that is verified                     -> Verified
    check    what must hold before its code is imported
    load     a module                                      -> LoadedKernel

`has_kernel` stops after select, `install_kernel` after fetch: they are prefixes of `get_kernel` and cannot disagree with
it. Offline, locked, local and overridden kernels are other sources and other pins, on the same path.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kernelhub.core.backends import BY_NAME
from kernelhub.core.host import Host
from kernelhub.core.lockfile import DIGEST, MAX_BYTES, LockedKernel, LockFile
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import KernelRef, Pin, RepoId, Revision, Version
from kernelhub.core.select import rank
from kernelhub.core.trust import Origin, TrustPolicy
from kernelhub.core.variants import BuildVariant, VariantAccepted, VariantRejected, parse_variant
from kernelhub.errors import (
    BuildFailed,
    CompatibilityWarning,
    IncompatibleDevice,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelCycle,
    KernelHubWarning,
    KernelNotFound,
    NoCompatibleVariant,
    RepositoryNotFound,
    UntrustedKernel,
    context,
    printable,
)
from kernelhub.hub.checks import check_archs, check_level, check_python_depends
from kernelhub.hub.gate import SIGNED, Gate
from kernelhub.hub.importer import Importer, LoadedKernel, RepoInfo
from kernelhub.hub.probe import detect_host
from kernelhub.hub.progress import TerminalLine
from kernelhub.hub.request import Found, Options
from kernelhub.hub.resolve import Resolver
from kernelhub.hub.revocations import RevocationLists
from kernelhub.hub.sources.base import BENCHMARKS, LOCAL, SOURCE, UNAVAILABLE, Moved, Progress, Source
from kernelhub.hub.sources.defaults import building_of, default_sources
from kernelhub.hub.sources.local import LocalSource, local_source
from kernelhub.hub.sources.project import EMBEDDED_ORG, ProjectSource, portable_commit
from kernelhub.hub.store import Place, Store
from kernelhub.hub.telemetry import UserAgent
from kernelhub.hub.verify import Verified, verify
from kernelhub.settings import Settings

Trust = bool | Sequence[str]
_MAX_REDIRECTS = 4
_importer = Importer()


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
        self._warned: set[str] = set()
        self._offline: Hub | None = None
        lists = RevocationLists(self.store, clock, self._warn)
        self._resolver = Resolver(self.store, lists, clock, self.settings.ref_ttl, self._warn)
        self._gate = Gate(self._resolver, self.settings.sigstore_root)

    @property
    def host(self) -> Host:
        """The facts about this machine."""
        return self._host or detect_host()

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

    # What callers ask for

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
        loaded = self._memo[key] = self._load(ref, self.sources(user_agent), options)
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
        return self._install(ref, self.sources(user_agent), options).path

    def has(
        self, ref: KernelRef, *, backend: str | None = None, trust_remote_code: Trust = False, check_arch: bool = True
    ) -> bool:
        """Whether `load` would find a build for this machine. What it does not trust, or cannot reach, is an error."""
        options = Options(self._policy(trust_remote_code), backend, check_arch, offline=self.settings.offline)
        sources = self.sources()
        try:
            with context(f"while looking for {ref}"):
                found = self._gate.admit(self.find(ref, sources, options), options)
                place, variants = self._select_or_build(found, options)
                archs = check_arch and self.host.choose_backend(backend).name in ("cuda", "rocm")
                if archs or place.by_identity:  # what only the variant's own files say
                    metadata = self._fetch(place, variants[0], options).metadata
                    if archs:
                        self._check_archs(metadata, options)
        except (KernelNotFound, NoCompatibleVariant, IncompatibleDevice):
            return False
        return True

    def variants(self, ref: KernelRef, *, backend: str | None = None) -> list[VariantAccepted | VariantRejected]:
        """All builds of the kernel: those that run here, best first, then the others with the reason."""
        with context(f"while looking for {ref}"):
            found = self.find(ref, self.sources(), Options(backend=backend, offline=self.settings.offline))
            return self._ranked(found, backend)

    def describe(
        self, ref: KernelRef, *, backend: str | None = None, trust_remote_code: Trust = False
    ) -> dict[str, Any]:
        """What the kernel is and what this machine would run of it, as plain values; none of its code is imported.

        Of a kernel that is not trusted nothing is fetched: `trusted` is None then, `untrusted` says why, and what only its
        files say is missing.
        """
        options = Options(self._policy(trust_remote_code), backend, offline=self.settings.offline)
        with context(f"while looking for {ref}"):
            found = self.find(ref, self.sources(), options)
            found, published = self._gate.facts(found, options)
            trusted = options.policy.reason(published)
            variant = self._select(found, options)[0]
            facts: dict[str, Any] = {
                "kernel": str(found.repo),
                "hub": found.source.name,
                "commit": None if found.commit == LOCAL else found.commit,
                "variant": str(variant),
                "layers": sorted(found.listing.variants.get(str(variant), {}).get("layers", ())),
                "trusted": trusted,
            }
            if trusted is None:
                refusal = options.policy.refusal(published)
                return {**facts, "untrusted": refusal.message, "hint": refusal.hint}
            verified = self._fetch(found, variant, options)
        metadata = verified.metadata
        return {
            **facts,
            "version": metadata.version,
            "digest": verified.digest.text,
            "files": len(verified.digest.files),
            "license": metadata.license,
            "upstream": metadata.upstream,
            "source": metadata.source,
            "architectures": list(metadata.backend.archs),
            "python_depends": list(metadata.python_depends),
            "kernel_depends": [str(item) for item in metadata.kernel_depends],
            "path": str(verified.path),
        }

    def verify(self, ref: KernelRef, *, backend: str | None = None, refresh: bool = False) -> dict[str, Any]:
        """Who signed the kernel, and whether this machine's variant is what they signed, as plain values.

        The variant is fetched and every byte of it hashed; none of its code is imported, so nobody has to be trusted.
        `signed_by` is who of those that the user trusts signed it, `unsigned` why nobody did. Raises `IntegrityError`
        where the bytes are not what was published, and `UntrustedKernel` for what was revoked.
        """
        options = Options(self._policy(False), backend, False, refresh, self.settings.offline)
        with context(f"while verifying {ref}"):
            found, published, signatures = self._gate.examine(self.find(ref, self.sources(), options), options)
            if published.revoked:
                options.policy.decide(published)
            variant = self._select(found, options)[0]
            verified = self._fetch(found, variant, options, rehash=True)
            signed_by = next((f"key {key}" for key, state in signatures if state == SIGNED), None)
            unsigned = None if signed_by else "nobody who is trusted for it signed it"
            if signed_by is None and options.policy.identities_for(published):
                try:
                    signed_by = self._gate.identity(found, published, verified, options)
                    unsigned = None
                except UntrustedKernel as error:
                    unsigned = error.message
            return {
                "kernel": str(found.repo),
                "hub": found.source.name,
                "commit": None if found.commit == LOCAL else found.commit,
                "published": found.listing.document.manifest.time if found.listing.document else None,
                "signatures": [{"key": key, "state": state} for key, state in signatures],
                "variant": str(variant),
                "digest": verified.digest.text,
                "files": len(verified.digest.files),
                "signed_by": signed_by,
                "unsigned": unsigned,
                "path": str(verified.path),
            }

    def digest_of(self, ref: KernelRef, variant: str) -> str | None:
        """The digest of one variant of a kernel, whether or not it runs here; None where it would have to be compiled.

        It is fetched and every byte of it hashed; none of its code is imported, so nobody has to be trusted. Raises
        `KernelNotFound`, `IntegrityError` where the bytes are not what was published, `UntrustedKernel` for what was revoked.
        """
        options, wanted = Options(self._policy(False), offline=self.settings.offline), BuildVariant.parse(variant)
        with context(f"while looking for {ref}"):
            found, published, _ = self._gate.examine(self.find(ref, self.sources(), options), options)
            if published.revoked:
                options.policy.decide(published)
            built_here = isinstance(found.source, ProjectSource) and wanted.framework.kind != "noarch"
            if built_here or (variant not in found.listing.variants and SOURCE in found.listing.parts):
                there = self.store.find(Place(found.source.key, found.repo, found.commit, wanted), rehash=True)
                return there.digest.text if there else None
            if variant not in found.listing.variants:
                names = ", ".join(sorted(found.listing.variants)) or "none"
                raise KernelNotFound(f"{found.source.name} has no {variant} of {found.repo} (there: {names})")
            return self._fetch(found, wanted, options, rehash=True).digest.text

    def benchmarks(self, ref: KernelRef, *, trust_remote_code: Trust = False) -> Path:
        """The folder of the repository's benchmark scripts, as they were published.

        Raises `UntrustedKernel` before any is fetched, and `KernelNotFound` where there are none.
        """
        options = Options(self._policy(trust_remote_code), offline=self.settings.offline)
        with context(f"while looking for the benchmarks of {ref}"):
            found = self._gate.admit(self.find(ref, self.sources(), options), options)
            if found.by_identity:
                raise UntrustedKernel(
                    f"the benchmarks of {found.repo} are not signed: Sigstore bundles cover builds only",
                    hint=f'If you trust them, pass trust_remote_code=["{found.repo}"].',
                )
            if isinstance(found.source, ProjectSource):
                folder: Path | None = found.source.project(found.repo) / BENCHMARKS
            else:
                folder = self._part(found, BENCHMARKS, options)
            if folder is None or not folder.is_dir():
                raise KernelNotFound(f"{found.source.name} has no benchmarks of {found.repo}")
            return folder

    def versions(self, repo: RepoId) -> tuple[Source, Mapping[str, str]]:
        """The refs that the first source which has the repository names, with their commits."""
        for source in self._order(KernelRef(repo), self.sources(), self.settings.offline):
            try:
                return source, source.refs(repo)
            except RepositoryNotFound:
                continue
        raise self._nowhere(KernelRef(repo), self.sources())

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
        return self._load(KernelRef(repo, Revision("main")), (source, *self.sources(user_agent)), options)

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
        return self._load(KernelRef(repo, pin), self.sources(user_agent), options)

    def lock(self, ref: KernelRef, *, trust_remote_code: Trust = False) -> tuple[LockedKernel, tuple[KernelRef, ...]]:
        """The kernel as a lock names it, and the kernels that any of its variants depends on.

        The hub is asked now. Of a variant no more than its metadata is fetched, unless that has no digest. What would be
        compiled here has none that others could compare, and is left out.
        """
        offline = self.settings.offline
        options = Options(self._policy(trust_remote_code), refresh=not offline, offline=offline)
        with context(f"while locking {ref}"):
            found = self._gate.admit(self.find(ref, _shared(self.sources()), options), options)
            digests, depends = self._lockable(found, options)
        kernel = LockedKernel(
            repo=found.repo,
            commit=portable_commit(found.commit) if isinstance(found.source, ProjectSource) else found.commit,
            version=ref.pin if isinstance(ref.pin, Version) else None,
            hub=found.source.name,
            variants=digests,
            depends=tuple(sorted({item.repo for item in depends})),
            revision=ref.pin.ref if isinstance(ref.pin, Revision) else None,
            asked=ref.repo if ref.repo != found.repo else None,
        )
        return kernel, depends

    def download(
        self, kernel: LockedKernel, lock: LockFile, *, all_variants: bool = False, trust_remote_code: Trust = False
    ) -> list[Verified]:
        """Fetch a kernel of a lock: the variant for this machine and what that depends on, or every variant it names."""
        if all_variants:
            return self.gather(kernel, lock, all_variants=True, trust_remote_code=trust_remote_code)[1]
        options = Options(self._policy(trust_remote_code), None, False, offline=self.settings.offline, lock=lock)
        return [self._install(kernel.ref, self.sources(), options)]

    def gather(
        self, kernel: LockedKernel, lock: LockFile, *, all_variants: bool = False, trust_remote_code: Trust = False
    ) -> tuple[Found, list[Verified]]:
        """A kernel of a lock as its hub has it, with the variants, fetched: all that the lock names, or this machine's.

        None for this machine is one that would be built here from the source.
        """
        options = Options(self._policy(trust_remote_code), None, False, offline=self.settings.offline, lock=lock)
        with context(f"while fetching {kernel}"):
            ref, sources, options = _locked(kernel.ref, self.sources(), options)
            found = _named(self._gate.admit(self.find(ref, sources, options), options), options)
            if not all_variants:
                place, fit = self._select_or_build(found, options)
                return found, [self._fetch(found, fit[0], options)] if place is found else []
            names = sorted(options.expected or found.listing.variants)
            if missing := [name for name in names if name not in found.listing.variants]:
                raise KernelNotFound(f"{found.source.name} has no {', '.join(missing)} of {found.repo}")
            variants = [item for name in names if (item := _shareable(found, name)) is not None]
            return found, [self._fetch(found, variant, options) for variant in variants]

    def sources(self, agent: UserAgent = None) -> tuple[Source, ...]:
        """Where kernels come from, in the order in which they are asked."""
        if self._sources is not None:
            return self._sources
        key = agent if agent is None or isinstance(agent, str) else tuple(sorted(agent.items()))
        if key not in self._by_agent:
            self._by_agent[key] = tuple(default_sources(self.settings, agent))
        return self._by_agent[key]

    # The steps

    def find(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Found:
        """The first source that has the repository, its commit for the pin, and the variants there."""
        for _ in range(_MAX_REDIRECTS):
            try:
                return self._find(ref, sources, options)
            except Moved as moved:
                ref = replace(moved.destination, pin=moved.destination.pin or ref.pin)
        raise KernelNotFound(f"{ref} is the last of {_MAX_REDIRECTS} redirects in a row")

    def _find(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Found:
        assert ref.pin is not None
        without: list[Source] = []
        denied: RepositoryNotFound | None = None
        asked = self._order(ref, sources, options.offline)
        for source in asked:
            try:
                commit = self._resolver.commit(source, ref.repo, ref.pin, options)
                found = Found(ref, source, commit, self._resolver.listing(source, ref.repo, commit, options))
            except RepositoryNotFound as error:
                without.append(source)
                denied = error if error.hint or denied is None else denied
                continue
            for one in without:
                self._resolver.remember_without(one, ref.repo, ref.pin)
            return found
        raise self._nowhere(ref, asked, denied)

    def _ranked(self, found: Found, backend: str | None) -> list[VariantAccepted | VariantRejected]:
        """The variants, best first, then those that do not run here; what the source cannot give is among the latter."""
        ranked = rank(found.listing.variants, self.host, self.host.choose_backend(backend))
        accepted: list[VariantAccepted | VariantRejected] = []
        rejected: list[VariantAccepted | VariantRejected] = []
        for item in ranked:
            reason = found.listing.variants[item.variant.variant_str].get(UNAVAILABLE)
            if isinstance(item, VariantAccepted) and isinstance(reason, str):
                rejected.append(VariantRejected(item.variant, reason))
            else:
                (accepted if isinstance(item, VariantAccepted) else rejected).append(item)
        return accepted + sorted(rejected, key=lambda item: item.variant.variant_str)

    def _select(self, found: Found, options: Options) -> list[BuildVariant]:
        """The variants that run here, the best first; there is at least one, or `NoCompatibleVariant` is raised."""
        ranked = self._ranked(found, options.backend)
        if accepted := [item.variant for item in ranked if isinstance(item, VariantAccepted)]:
            return accepted
        rejected = [(item.variant.variant_str, item.reason) for item in ranked if isinstance(item, VariantRejected)]
        raise NoCompatibleVariant(str(found.ref), str(self.host), rejected)

    def _select_or_build(self, found: Found, options: Options) -> tuple[Found, list[BuildVariant]]:
        """Where to fetch from, and what runs here: the repository's builds, else what can be built from its source."""
        if self.settings.build == "always" and not options.expected and (tree := self._source_tree(found, options)):
            return tree, self._select(tree, options)
        try:
            return found, self._select(found, options)
        except NoCompatibleVariant:
            tree = None if self.settings.build == "never" else self._source_tree(found, options)
            if tree is None:
                raise
            return tree, self._select(tree, options)

    def _source_tree(self, found: Found, options: Options) -> Found | None:
        """The source that the repository brings, as a project in the store; None where it brings none."""
        folder = None if found.by_identity else self._part(found, SOURCE, options)
        if folder is None:
            return None
        source = ProjectSource.of(folder, found.repo, building_of(self.settings))
        commit = source.resolve(found.repo, Revision("main"))
        return Found(found.ref, source, commit, source.listing(found.repo, commit))

    def _part(self, found: Found, part: str, options: Options) -> Path | None:
        """The folder, verified, of what the repository brings beside its variants; None where it does not."""
        details = found.listing.parts.get(part)
        if details is None:
            return None

        def write(into: Path) -> None:
            fetch = found.source.fetch_part
            self._resolver.ask(
                found.source, options, partial(fetch, found.repo, found.commit, part, details, into, self.progress)
            )

        try:
            return self.store.add_part(found.source.key, found.repo, found.commit, part, write)
        except KernelNotFound:
            return None

    def _fetch(self, found: Found, variant: BuildVariant, options: Options, *, rehash: bool = False) -> Verified:
        """The variant's folder, verified now: where the user has it, from the store, or from the hub into the store.

        Every byte is hashed with `rehash`, and where a signature is why it may run: the store's notes are not signed.
        """
        name = str(variant)
        if (folder := found.source.locate(found.repo, name)) is not None:
            return self._expected(verify(folder), found, variant, options)
        place = Place(found.source.key, found.repo, found.commit, variant)
        try:
            verified = self.store.find(place, rehash=rehash or found.signed or found.by_identity)
        except (IntegrityError, InvalidMetadata) as error:
            if options.offline and found.source.origin is Origin.REMOTE:
                error.hint = "It cannot be fetched again offline."
                raise
            self._warn(f"{error}\n  It is set aside and fetched again.", KernelHubWarning)
            self.store.set_aside(place)
            verified = None
        if verified is None:
            details = found.listing.variants[name]
            verified = self._resolver.ask(
                found.source,
                options,
                lambda: self.store.add(
                    place,
                    lambda into: found.source.fetch(found.repo, found.commit, name, details, into, self.progress),
                ),
            )
        return self._expected(verified, found, variant, options)

    def _expected(self, verified: Verified, found: Found, variant: BuildVariant, options: Options) -> Verified:
        """The variant, where it is for the backend that its folder's name says, is what was signed, and has the digest
        that a lock names.
        """
        self._gate.check_variant(found, variant, verified, options)
        backend = verified.metadata.backend.type
        if variant.backend not in (None, backend):
            raise InvalidMetadata(f"{variant}: its metadata.json says that it is for {BY_NAME[backend].title}")
        expected = options.expected.get(str(variant))
        if expected is not None and expected != verified.digest.text:
            if expected.startswith(DIGEST):
                raise IntegrityError(f"{variant} has the digest {verified.digest.text}, the lock file says {expected}")
            from kernelhub.hub.locks import check_hash

            check_hash(verified.path, str(variant), expected)
        return verified

    def _lockable(self, found: Found, options: Options) -> tuple[dict[str, str], tuple[KernelRef, ...]]:
        """The digest of each variant that others can have too, and the kernels that they depend on."""
        digests: dict[str, str] = {}
        depends: dict[KernelRef, None] = {}
        for name in sorted(found.listing.variants):
            if (variant := _shareable(found, name)) is None:
                continue
            try:
                with context(name):
                    metadata, digests[name] = self._declared(found, variant, options)
            except InvalidMetadata as error:
                self._warn(f"{error}\n  This variant of {found.repo} is left out of the lock.", KernelHubWarning)
                continue
            depends.update(dict.fromkeys(KernelRef(item.repo, item.pin) for item in metadata.kernel_depends))
        # What is built where no variant fits may depend on others. A hub that says that it has the source is asked for it;
        # of one that would have to look, only where there is nothing else.
        look = not digests or bool(found.listing.parts.get(SOURCE))
        tree = self._source_tree(found, options) if look and not isinstance(found.source, ProjectSource) else found
        if tree and isinstance(tree.source, ProjectSource):
            items = tree.source.kernel_depends(found.repo)
            depends.update(dict.fromkeys(KernelRef(item.repo, item.pin) for item in items))
        return digests, tuple(depends)

    def _declared(self, found: Found, variant: BuildVariant, options: Options) -> tuple[Metadata, str]:
        """A variant's metadata, and the digest that it declares; one that declares none is fetched whole."""
        name = str(variant)
        if not (options.offline and found.source.origin is Origin.REMOTE):
            question = partial(found.source.metadata, found.repo, found.commit, name, found.listing.variants[name])
            text = self._resolver.ask(found.source, options, question)
            metadata = None if text is None else Metadata.parse(text)
            if metadata is not None and metadata.digest is not None:
                return metadata, metadata.digest.text
        verified = self._fetch(found, variant, options)
        return verified.metadata, verified.digest.text

    def _install(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Verified:
        ref, own, options = _locked(ref, sources, options)
        with context(f"while fetching {ref}"):
            verified = self._obtain(ref, own, options)[2]
        for item in verified.metadata.kernel_depends:
            self._install(KernelRef(item.repo, item.pin), sources, _below(options, str(ref.repo), item.repo))
        return verified

    def _obtain(
        self, ref: KernelRef, sources: Sequence[Source], options: Options
    ) -> tuple[Found, BuildVariant, Verified]:
        found = _named(self._gate.admit(self.find(ref, sources, options), options), options)
        place, variants = self._select_or_build(found, options)
        for variant, other in zip(variants, [*variants[1:], None], strict=True):
            try:
                return found, variant, self._fetch(place, variant, options)
            except BuildFailed as error:
                if other is None:
                    raise
                if error.in_source:
                    self._resolver.remember_failed(place, variant, error)
                self._warn(
                    f"{found.repo}: {variant} does not compile: {error.error}\n"
                    f"  {other} serves instead. `kernelhub get {found.repo}` with KERNELHUB_BUILD=always says more.",
                    KernelHubWarning,
                )
        raise AssertionError("there is at least one variant")

    def _load(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> LoadedKernel:
        ref, own, options = _locked(ref, sources, options)
        with context(f"while loading {ref}"):
            found, variant, verified = self._obtain(ref, own, options)
            self._check(verified.metadata, options)
        needed: dict[RepoId, LoadedKernel] = {}
        for item in verified.metadata.kernel_depends:
            below = _below(options, str(ref.repo), item.repo)
            needed[item.repo] = self._load(KernelRef(item.repo, item.pin), sources, below)
        modules = {repo: kernel.module for repo, kernel in needed.items()}
        depends = {digest for kernel in needed.values() for digest in (kernel.digest, *kernel.depends)}
        info = None if found.commit == LOCAL else RepoInfo(str(found.repo), found.commit)
        with context(f"while loading {ref}"):
            return _importer.load(verified, variant, info, modules, tuple(sorted(depends)))

    def _check(self, metadata: Metadata, options: Options) -> None:
        """What must hold before any of the kernel's code is imported."""
        check_level(metadata)
        check_python_depends(metadata)
        if options.check_arch:
            self._check_archs(metadata, options)

    def _check_archs(self, metadata: Metadata, options: Options) -> None:
        for text in check_archs(metadata, self.host.choose_backend(options.backend)):
            self._warn(text, CompatibilityWarning)

    # Inside

    def _order(self, ref: KernelRef, sources: Sequence[Source], offline: bool) -> list[Source]:
        """The sources to ask.

        For the organisation of the embedded hub only that one, and what the user put over it. A commit names its content,
        so where a source's is in the store already, no other is asked. Offline, what other tools fetched comes last.
        """
        if ref.repo.org == EMBEDDED_ORG:
            return [source for source in sources if isinstance(source, (ProjectSource, LocalSource))]
        order = [*sources, *self._caches()] if offline else list(sources)
        if isinstance(ref.pin, Revision) and (commit := ref.pin.commit):
            order.sort(key=lambda source: not self.store.listing(source.key, ref.repo, commit))
        return order

    def _caches(self) -> list[Source]:
        """What other tools fetched from the hubs that are not asked now."""
        if self._sources is not None:
            return []
        from kernelhub.hub.sources.huggingface_cache import HuggingFaceCacheSource

        return [HuggingFaceCacheSource()]

    def _nowhere(
        self, ref: KernelRef, asked: Sequence[Source], denied: RepositoryNotFound | None = None
    ) -> KernelNotFound:
        names = ", ".join(dict.fromkeys(source.name for source in asked)) or "no source at all"
        hint = "It is not in the store, and hubs are not asked offline." if self.settings.offline else None
        return KernelNotFound(
            f"{ref} was not found (looked in {names})", hint=hint or (denied.hint if denied else None)
        )

    def _policy(self, trust_remote_code: Trust) -> TrustPolicy:
        settings = self.settings
        return TrustPolicy.of(
            trust_remote_code,
            settings.trust,
            keys=settings.trusted_keys,
            identities=settings.trusted_identities,
            require_signature=settings.require_signature,
        )

    def _warn(self, text: str, category: type[Warning]) -> None:
        """Warn once a process and text, at the caller's own line."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(printable(text), category, stacklevel=2)


def read_lock(lockfile: Path) -> LockFile:
    """A lock file's value. Raises `InvalidReference` where there is none, `InvalidMetadata` where it is malformed."""
    try:
        with lockfile.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidReference(f"cannot read the lock file {lockfile}: {error.strerror}") from error
    with context(str(lockfile)):
        return LockFile.parse(data)


def open_store() -> Store:
    """The local store that the environment names."""
    settings = Settings.from_env()
    return Store(settings.cache_folder, settings.verify_always)


def loaded_kernels() -> list[LoadedKernel]:
    """The kernels that were loaded in this process, in order."""
    return _importer.loaded()


def _shared(sources: Sequence[Source]) -> list[Source]:
    """The sources that others can have too: not what the user put over them on this machine."""
    return [
        source
        for source in sources
        if not isinstance(source, LocalSource)
        and not (isinstance(source, ProjectSource) and source.origin is Origin.FOLDER)
    ]


def _locked(ref: KernelRef, sources: Sequence[Source], options: Options) -> tuple[KernelRef, Sequence[Source], Options]:
    """The kernel at the commit that the lock names, where there is one, and the hub that it came from first, after what
    lies here already (a cache, which says of what it lacks that others may have it).

    The hub is no more than a place to look: only those that the user has are asked, and the bytes are compared.
    """
    if options.lock is None:
        return ref, sources, options
    kernel = options.lock.find(ref.repo, ref.pin)
    order = sorted(_shared(sources), key=lambda item: item.origin is not Origin.CACHE and item.name != kernel.hub)
    return kernel.ref, order, replace(options, expected=kernel.variants)


def _named(found: Found, options: Options) -> Found:
    """What was found, without the variants that a lock does not name. What is built here has no digest in a lock."""
    if not options.expected or isinstance(found.source, ProjectSource):
        return found
    variants = {
        name: details if name in options.expected else {**details, UNAVAILABLE: "the lock file does not name it"}
        for name, details in found.listing.variants.items()
    }
    return replace(found, listing=replace(found.listing, variants=variants))


def _shareable(found: Found, name: str) -> BuildVariant | None:
    """The variant, where it is the same on each machine: not one that is compiled here."""
    variant = parse_variant(name)
    if not isinstance(variant, BuildVariant):
        return None
    return None if isinstance(found.source, ProjectSource) and variant.framework.kind != "noarch" else variant


def _below(options: Options, repo: str, dependency: RepoId) -> Options:
    above = (*options.above, repo)
    if str(dependency) in above:
        raise KernelCycle((*above[above.index(str(dependency)) :], str(dependency)))
    return replace(options, above=above, expected={})


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
