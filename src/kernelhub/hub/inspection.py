"""Looking at a kernel without running it: what it is, who signed it, and what one of its variants hashes to.

Each is a prefix of the steps to loading it (`steps.py`), with what is trusted told apart from what is only looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernelhub.core.refs import KernelRef
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import KernelNotFound, UntrustedKernel, context
from kernelhub.hub.gate import SIGNED
from kernelhub.hub.request import Options
from kernelhub.hub.sources.base import LOCAL, SOURCE, Source
from kernelhub.hub.sources.project import ProjectSource
from kernelhub.hub.steps import Steps
from kernelhub.hub.store import Place


def describe(steps: Steps, ref: KernelRef, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """What the kernel is, and what this machine would run of it; of one that is not trusted nothing is fetched."""
    with context(f"while looking for {ref}"):
        found = steps.find(ref, sources, options)
        found, published = steps.gate.facts(found, options)
        trusted = options.policy.reason(published)
        variant = steps.select(found, options)[0]
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
        verified = steps.fetch(found, variant, options)
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


def verify(steps: Steps, ref: KernelRef, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """Who signed the kernel, and whether the variant, fetched and hashed, is what they signed."""
    with context(f"while verifying {ref}"):
        found, published, signatures = steps.gate.examine(steps.find(ref, sources, options), options)
        if published.revoked:
            options.policy.decide(published)
        variant = steps.select(found, options)[0]
        verified = steps.fetch(found, variant, options, rehash=True)
        signed_by = next((f"key {key}" for key, state in signatures if state == SIGNED), None)
        asked = (
            ""
            if options.refresh or options.offline
            else "; what is here may be older than the hub's (--refresh asks it)"
        )
        unsigned = None if signed_by else f"nobody who is trusted for it signed it{asked}"
        if signed_by is None and options.policy.identities_for(published):
            try:
                signed_by = steps.gate.identity(found, published, verified, options)
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


def digest_of(
    steps: Steps, ref: KernelRef, sources: Sequence[Source], options: Options, wanted: BuildVariant
) -> str | None:
    """The digest of one variant, fetched and hashed; None where it would have to be compiled."""
    variant = str(wanted)
    with context(f"while looking for {ref}"):
        found, published, _ = steps.gate.examine(steps.find(ref, sources, options), options)
        if published.revoked:
            options.policy.decide(published)
        built_here = isinstance(found.source, ProjectSource) and wanted.framework.kind != "noarch"
        if built_here or (variant not in found.listing.variants and SOURCE in found.listing.parts):
            there = steps.store.find(Place(found.source.key, found.repo, found.commit, wanted), rehash=True)
            return there.digest.text if there else None
        if variant not in found.listing.variants:
            names = ", ".join(sorted(found.listing.variants)) or "none"
            raise KernelNotFound(f"{found.source.name} has no {variant} of {found.repo} (there: {names})")
        return steps.fetch(found, wanted, options, rehash=True).digest.text
