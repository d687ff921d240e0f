"""The steps from a reference to a module, in order; each is given what the one before it found.

    find     which source has it, at which commit          -> Found
    admit    may it run? (`gate.py`)                          (before a byte of it is fetched)
    select   which of its builds runs here                 -> BuildVariant
    fetch    a folder that is verified                     -> Verified
    check    what must hold before its code is imported
    load     a module                                      -> LoadedKernel

`install` stops after fetch, and `load` goes on from there. Offline, locked, local and overridden kernels are other
sources and other pins, on the same path.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kernelhub.core.backends import BY_NAME
from kernelhub.core.host import Host
from kernelhub.core.lockfile import DIGEST
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import KernelRef, RepoId, Revision
from kernelhub.core.select import rank
from kernelhub.core.trust import Origin
from kernelhub.core.variants import BuildVariant, VariantAccepted, VariantRejected
from kernelhub.errors import (
    BuildFailed,
    CompatibilityWarning,
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    KernelCycle,
    KernelHubWarning,
    KernelNotFound,
    NoCompatibleVariant,
    RepositoryNotFound,
    context,
)
from kernelhub.hub.checks import check_archs, check_level, check_python_depends
from kernelhub.hub.gate import Gate
from kernelhub.hub.importer import Importer, LoadedKernel, RepoInfo
from kernelhub.hub.probe import detect_host
from kernelhub.hub.request import Found, Options
from kernelhub.hub.resolve import Resolver
from kernelhub.hub.revocations import Warn
from kernelhub.hub.sources.base import LOCAL, SOURCE, UNAVAILABLE, Moved, Progress, Source
from kernelhub.hub.sources.defaults import building_of
from kernelhub.hub.sources.deferred import Deferred
from kernelhub.hub.sources.local import LocalSource
from kernelhub.hub.sources.project import EMBEDDED_ORG, ProjectSource
from kernelhub.hub.store import Place, Store
from kernelhub.hub.verify import Verified, verify
from kernelhub.settings import Settings

_MAX_REDIRECTS = 4

# One for the process: what it imported is the process's, whichever client asked.
importer = Importer()


@dataclass(frozen=True)
class Steps:
    """What the steps of one client share. `other_caches`: offline, what other tools fetched is looked at too."""

    settings: Settings
    store: Store
    resolver: Resolver
    gate: Gate
    progress: Progress
    warn: Warn
    given_host: Host | None = None
    other_caches: bool = True

    @property
    def host(self) -> Host:
        """The facts about this machine."""
        return self.given_host or detect_host()

    # Find

    def find(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Found:
        """The first source that has the repository, its commit for the pin, and the variants there."""
        for _ in range(_MAX_REDIRECTS):
            try:
                return self._find(ref, sources, options)
            except Moved as moved:
                ref = replace(moved.destination, pin=moved.destination.pin or ref.pin)
        raise KernelNotFound(f"{ref} is the last of {_MAX_REDIRECTS} redirects in a row")

    def _find(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Found:
        """Where one source says that the kernel moved, that is raised."""
        assert ref.pin is not None
        without: list[Source] = []
        denied: RepositoryNotFound | None = None
        asked = self.order(ref, sources, options.offline)
        for source in asked:
            try:
                commit = self.resolver.commit(source, ref.repo, ref.pin, options)
                found = Found(ref, source, commit, self.resolver.listing(source, ref.repo, commit, options))
            except RepositoryNotFound as error:
                without.append(source)
                denied = error if error.hint or denied is None else denied
                continue
            except HubUnavailable as error:
                if without:  # perhaps a name was misspelt
                    looked = f"{' and '.join(one.name for one in without)} has no {ref.repo}."
                    error.hint = f"{looked} {error.hint}" if error.hint else looked
                raise
            for one in without:
                self.resolver.remember_without(one, ref.repo, ref.pin)
            return found
        raise self.nowhere(ref, asked, denied)

    def order(self, ref: KernelRef, sources: Sequence[Source], offline: bool) -> list[Source]:
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
        if not self.other_caches:
            return []
        from kernelhub.hub.sources.huggingface_cache import HuggingFaceCacheSource

        return [HuggingFaceCacheSource()]

    def nowhere(
        self, ref: KernelRef, asked: Sequence[Source], denied: RepositoryNotFound | None = None
    ) -> KernelNotFound:
        """None of the sources that were asked has it."""
        names = ", ".join(dict.fromkeys(source.name for source in asked)) or "no source at all"
        hint = denied.hint if denied else None
        if self.settings.offline and ref.repo.org != EMBEDDED_ORG:
            hint = "It is not in the store, and hubs are not asked offline."
        return KernelNotFound(f"{ref} was not found (looked in {names})", hint=hint)

    # Select

    def ranked(self, found: Found, backend: str | None) -> list[VariantAccepted | VariantRejected]:
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

    def select(self, found: Found, options: Options) -> list[BuildVariant]:
        """The variants that run here, the best first; there is at least one, or `NoCompatibleVariant` is raised."""
        ranked = self.ranked(found, options.backend)
        if accepted := [item.variant for item in ranked if isinstance(item, VariantAccepted)]:
            return accepted
        rejected = [(item.variant.variant_str, item.reason) for item in ranked if isinstance(item, VariantRejected)]
        raise NoCompatibleVariant(str(found.ref), str(self.host), rejected)

    def select_or_build(self, found: Found, options: Options) -> tuple[Found, list[BuildVariant]]:
        """Where to fetch from, and what runs here: the repository's builds, else what can be built from its source."""
        if self.settings.build == "always" and not options.expected and (tree := self.source_tree(found, options)):
            return tree, self.select(tree, options)
        try:
            return found, self.select(found, options)
        except NoCompatibleVariant:
            tree = None if self.settings.build == "never" else self.source_tree(found, options)
            if tree is None:
                raise
            return tree, self.select(tree, options)

    def source_tree(self, found: Found, options: Options) -> Found | None:
        """The source that the repository brings, as a project in the store; None where it brings none."""
        folder = None if found.by_identity else self.part(found, SOURCE, options)
        if folder is None:
            return None
        source = ProjectSource.of(folder, found.repo, building_of(self.settings))
        commit = source.resolve(found.repo, Revision("main"))
        return Found(found.ref, source, commit, source.listing(found.repo, commit))

    def part(self, found: Found, part: str, options: Options) -> Path | None:
        """The folder, verified, of what the repository brings beside its variants; None where it does not."""
        details = found.listing.parts.get(part)
        if details is None:
            return None

        def write(into: Path) -> None:
            fetch = found.source.fetch_part
            self.resolver.ask(
                found.source, options, partial(fetch, found.repo, found.commit, part, details, into, self.progress)
            )

        try:
            return self.store.add_part(found.source.key, found.repo, found.commit, part, write)
        except KernelNotFound:
            return None

    # Fetch

    def fetch(self, found: Found, variant: BuildVariant, options: Options, *, rehash: bool = False) -> Verified:
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
            self.warn(f"{error}\n  It is set aside and fetched again.", KernelHubWarning)
            self.store.set_aside(place)
            verified = None
        if verified is None:
            details = found.listing.variants[name]
            verified = self.resolver.ask(
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
        self.gate.check_variant(found, variant, verified, options)
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

    def obtain(
        self, ref: KernelRef, sources: Sequence[Source], options: Options
    ) -> tuple[Found, BuildVariant, Verified]:
        """What was found and may run, and the best of its variants that can be had, verified."""
        found = as_locked(self.gate.admit(self.find(ref, sources, options), options), options)
        place, variants = self.select_or_build(found, options)
        for variant, other in zip(variants, [*variants[1:], None], strict=True):
            try:
                return found, variant, self.fetch(place, variant, options)
            except BuildFailed as error:
                if other is None:
                    raise
                if error.in_source:
                    self.resolver.remember_failed(place, variant, error)
                own = isinstance(found.source, ProjectSource) and found.source.origin is Origin.FOLDER
                command = f"kernelhub build {shlex.quote(found.source.name)}" if own else f"kernelhub get {ref}"
                self.warn(
                    f"{found.repo}: {variant} does not compile: {error.error}\n"
                    f"  {other} serves instead. `{'' if own else 'KERNELHUB_BUILD=always '}{command}` says more.",
                    KernelHubWarning,
                )
        raise AssertionError("there is at least one variant")

    def install(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> Verified:
        """The kernel's variant for this machine, verified; what it depends on is fetched too."""
        ref, own, options = at_lock(ref, sources, options)
        with context(f"while fetching {ref}"):
            verified = self.obtain(ref, own, options)[2]
        for item in verified.metadata.kernel_depends:
            self.install(KernelRef(item.repo, item.pin), sources, _below(options, str(ref.repo), item.repo))
        return verified

    # Check and load

    def load(self, ref: KernelRef, sources: Sequence[Source], options: Options) -> LoadedKernel:
        """The kernel, imported, after those that it depends on."""
        ref, own, options = at_lock(ref, sources, options)
        with context(f"while loading {ref}"):
            found, variant, verified = self.obtain(ref, own, options)
            self._check(verified.metadata, options)
        needed: dict[RepoId, LoadedKernel] = {}
        for item in verified.metadata.kernel_depends:
            below = _below(options, str(ref.repo), item.repo)
            needed[item.repo] = self.load(KernelRef(item.repo, item.pin), sources, below)
        modules = {repo: kernel.module for repo, kernel in needed.items()}
        depends = {digest for kernel in needed.values() for digest in (kernel.digest, *kernel.depends)}
        info = None if found.commit == LOCAL else RepoInfo(str(found.repo), found.commit)
        with context(f"while loading {ref}"):
            return importer.load(verified, variant, info, modules, tuple(sorted(depends)))

    def _check(self, metadata: Metadata, options: Options) -> None:
        """What must hold before any of the kernel's code is imported."""
        check_level(metadata)
        check_python_depends(metadata)
        if options.check_arch:
            self.check_archs(metadata, options)

    def check_archs(self, metadata: Metadata, options: Options) -> None:
        """Warns of devices here that the build is not for. Raises `IncompatibleDevice` where the current one is not."""
        for text in check_archs(metadata, self.host.choose_backend(options.backend)):
            self.warn(text, CompatibilityWarning)


def shared(sources: Sequence[Source]) -> list[Source]:
    """The sources that others can have too: not what the user put over them on this machine."""
    return [
        source
        for source in sources
        if not isinstance(source, LocalSource)
        and not (isinstance(source, ProjectSource) and source.origin is Origin.FOLDER)
    ]


def at_lock(ref: KernelRef, sources: Sequence[Source], options: Options) -> tuple[KernelRef, Sequence[Source], Options]:
    """The kernel at the commit that the lock names, where there is one, and the hub that it came from first, after what
    lies here already (a cache, which says of what it lacks that others may have it).

    The hub is no more than a place to look: only those that the user has are asked, and the bytes are compared. Where the
    lock has nothing to compare them with, what only claims to be the commit stays last.
    """
    if options.lock is None:
        return ref, sources, options
    kernel = options.lock.find(ref.repo, ref.pin)

    def place(source: Source) -> int:
        if isinstance(source, Deferred) and source.address.claims and not kernel.variants:
            return 3
        return 0 if source.origin is Origin.CACHE else 1 if source.name == kernel.hub else 2

    return kernel.ref, sorted(shared(sources), key=place), replace(options, expected=kernel.variants)


def as_locked(found: Found, options: Options) -> Found:
    """What was found, without the variants that a lock does not name. What is built here has no digest in a lock."""
    if not options.expected or isinstance(found.source, ProjectSource):
        return found
    variants = {
        name: details if name in options.expected else {**details, UNAVAILABLE: "the lock file does not name it"}
        for name, details in found.listing.variants.items()
    }
    return replace(found, listing=replace(found.listing, variants=variants))


def _below(options: Options, repo: str, dependency: RepoId) -> Options:
    """How a kernel's dependency is wanted. Raises `KernelCycle` where that led here."""
    above = (*options.above, repo)
    if str(dependency) in above:
        raise KernelCycle((*above[above.index(str(dependency)) :], str(dependency)))
    return replace(options, above=above, expected={})
