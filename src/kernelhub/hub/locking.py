"""Kernels into a lock, and out of one again: what others can have too, with the digest of each of its variants.

What a lock is made of as a whole, and where one is found, is in `locks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kernelhub.core.lockfile import LockedKernel
from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import KernelRef, Revision, Version
from kernelhub.core.trust import Origin
from kernelhub.core.variants import BuildVariant, parse_variant
from kernelhub.errors import InvalidMetadata, KernelHubWarning, KernelNotFound, context
from kernelhub.hub.request import Found, Options
from kernelhub.hub.sources.base import SOURCE, Source
from kernelhub.hub.sources.project import ProjectSource, portable_commit
from kernelhub.hub.steps import Steps, as_locked, at_lock, shared
from kernelhub.hub.verify import Verified


def lock(
    steps: Steps, ref: KernelRef, sources: Sequence[Source], options: Options
) -> tuple[LockedKernel, tuple[KernelRef, ...]]:
    """The kernel as a lock names it, and the kernels that any of its variants depends on."""
    with context(f"while locking {ref}"):
        found = steps.gate.admit(steps.find(ref, shared(sources), options), options)
        digests, depends = _lockable(steps, found, options)
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


def gather(
    steps: Steps, kernel: LockedKernel, sources: Sequence[Source], options: Options, *, all_variants: bool
) -> tuple[Found, list[Verified]]:
    """A kernel of a lock as its hub has it, with its variants, fetched: all that the lock names, or this machine's."""
    with context(f"while fetching {kernel}"):
        ref, sources, options = at_lock(kernel.ref, sources, options)
        found = as_locked(steps.gate.admit(steps.find(ref, sources, options), options), options)
        if not all_variants:
            place, fit = steps.select_or_build(found, options)
            return found, [steps.fetch(found, fit[0], options)] if place is found else []
        names = sorted(options.expected or found.listing.variants)
        if missing := [name for name in names if name not in found.listing.variants]:
            raise KernelNotFound(f"{found.source.name} has no {', '.join(missing)} of {found.repo}")
        variants = [item for name in names if (item := _shareable(found, name)) is not None]
        return found, [steps.fetch(found, variant, options) for variant in variants]


def _lockable(steps: Steps, found: Found, options: Options) -> tuple[dict[str, str], tuple[KernelRef, ...]]:
    """The digest of each variant that others can have too, and the kernels that they depend on."""
    digests: dict[str, str] = {}
    depends: dict[KernelRef, None] = {}
    for name in sorted(found.listing.variants):
        if (variant := _shareable(found, name)) is None:
            continue
        try:
            with context(name):
                metadata, digests[name] = _declared(steps, found, variant, options)
        except InvalidMetadata as error:
            steps.warn(f"{error}\n  This variant of {found.repo} is left out of the lock.", KernelHubWarning)
            continue
        depends.update(dict.fromkeys(KernelRef(item.repo, item.pin) for item in metadata.kernel_depends))
    # What is built where no variant fits may depend on others. A hub that says that it has the source is asked for it;
    # of one that would have to look, only where there is nothing else.
    look = not digests or bool(found.listing.parts.get(SOURCE))
    tree = steps.source_tree(found, options) if look and not isinstance(found.source, ProjectSource) else found
    if tree and isinstance(tree.source, ProjectSource):
        items = tree.source.kernel_depends(found.repo)
        depends.update(dict.fromkeys(KernelRef(item.repo, item.pin) for item in items))
    return digests, tuple(depends)


def _declared(steps: Steps, found: Found, variant: BuildVariant, options: Options) -> tuple[Metadata, str]:
    """A variant's metadata, and the digest that it declares; one that declares none is fetched whole."""
    name = str(variant)
    if not (options.offline and found.source.origin is Origin.REMOTE):
        question = partial(found.source.metadata, found.repo, found.commit, name, found.listing.variants[name])
        text = steps.resolver.ask(found.source, options, question)
        metadata = None if text is None else Metadata.parse(text)
        if metadata is not None and metadata.digest is not None:
            return metadata, metadata.digest.text
    verified = steps.fetch(found, variant, options)
    return verified.metadata, verified.digest.text


def _shareable(found: Found, name: str) -> BuildVariant | None:
    """The variant, where it is the same on each machine: not one that is compiled here."""
    variant = parse_variant(name)
    if not isinstance(variant, BuildVariant):
        return None
    return None if isinstance(found.source, ProjectSource) and variant.framework.kind != "noarch" else variant
