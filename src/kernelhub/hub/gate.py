"""The gate: the facts that trust is decided on, collected; `core/trust.py` decides.

Each fact is looked for only where those before it do not decide. What is trusted for a signature is taken from what was
signed, not from the store's notes of it, so that a store which somebody else can write is no way around the signature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import Revision, version_of
from kernelhub.core.trust import Origin, Published
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import HubUnavailable, IntegrityError, KernelHubWarning, UntrustedKernel, Violation
from kernelhub.hub.request import Found, Options
from kernelhub.hub.resolve import Resolver
from kernelhub.hub.sources.base import LOCAL, UNAVAILABLE, Listing
from kernelhub.hub.verify import METADATA, Verified

if TYPE_CHECKING:
    from kernelhub.core.manifest import ManifestDocument

# What a signature by a key that is trusted is worth.
SIGNED, REVOKED, WRONG = "right", "right, but the key is revoked", "WRONG: it is not over this commit"


@dataclass(frozen=True)
class Gate:
    """Decides for a client what may run."""

    resolver: Resolver
    sigstore_root: Path | None = None

    def admit(self, found: Found, options: Options) -> Found:
        """What was found, where it may run or a variant's own signature may let it. Raises `UntrustedKernel`."""
        admitted, published = self.facts(found, options)
        if options.policy.reason(published) is None and self._may_be_signed(published, options):
            return replace(admitted, by_identity=True)
        options.policy.decide(published)
        return admitted

    def facts(self, found: Found, options: Options) -> tuple[Found, Published]:
        """What is known of who published it; and what was found, as it was signed where a signature decides."""
        policy = options.policy
        commit, asked = _commit(found), found.ref.pin.commit if isinstance(found.ref.pin, Revision) else None
        published = Published(
            found.repo,
            found.source.origin,
            found.source.name,
            commit=commit,
            claimed=asked if asked != commit else None,
        )
        if published.origin is not Origin.EMBEDDED:
            published = replace(published, revocations=self.resolver.lists.known(policy.keys_for(published)))
        if published.revoked or policy.reason(published) is not None:
            return found, published
        document, signers = self.signers(found, published, options)
        if signers:
            published = replace(published, signers=tuple(signers))
        if document is not None and published.counting_signers:
            version = document.manifest.version
            if version_of(found.ref.pin) not in (None, version):
                raise IntegrityError(
                    f"{found.source.name} says that {found.ref} is {found.commit}: a version {version}"
                )
            return replace(found, listing=_as_signed(document, found), signed=True), published
        if policy.require_signature:
            return found, published
        return found, replace(published, publisher_trusted=self.resolver.publisher_trusted(found, options))

    def signers(
        self, found: Found, published: Published, options: Options
    ) -> tuple[ManifestDocument | None, list[str]]:
        """The manifest, and the keys that are trusted for the kernel and signed it.

        Signatures may be added later: where the store's copy has none that counts, the hub is asked for its own.
        """
        keys = options.policy.keys_for(published)
        if not keys:
            return None, []
        document = found.listing.document or self._stored(found)
        signers = _signers(document, options, published)
        if not signers and found.listing.document is None and self._may_ask(found, options):
            try:
                listing = self.resolver.listing(found.source, found.repo, found.commit, options, again=True)
            except HubUnavailable as error:
                self.resolver.warn(
                    f"{error}\n  Whether {found.repo} has been signed meanwhile is not known.", KernelHubWarning
                )
                return document, signers
            document = listing.document
            signers = _signers(document, options, published)
        return document, signers

    def examine(self, found: Found, options: Options) -> tuple[Found, Published, list[tuple[str, str]]]:
        """What was found as its manifest has it, who published it, and each signature: the key, and what it is worth."""
        policy = options.policy
        signed, published = self.facts(found, options)
        document = signed.listing.document or self._stored(found)
        if document is None:
            return found, published, []
        from kernelhub.hub.signing import right_signers

        keys = policy.keys_for(published)
        right = {key.id for key in right_signers(document.payload, document.signatures, keys)}
        counting = set(replace(published, signers=tuple(right)).counting_signers)
        known = {key.id for key in keys}
        states = [
            (
                key,
                SIGNED
                if key in counting
                else REVOKED
                if key in right
                else WRONG
                if key in known
                else "not checked: the key is not trusted for this kernel",
            )
            for key in dict.fromkeys(item.key for item in document.signatures)
        ]
        return replace(found, listing=_as_signed(document, found)), published, states

    def check_variant(self, found: Found, variant: BuildVariant, verified: Verified, options: Options) -> None:
        """That the variant is what was signed. Raises `IntegrityError`, or `UntrustedKernel` where nobody signed it."""
        document = found.listing.document
        if found.signed and verified.metadata.digest is None:
            raise UntrustedKernel(
                f"{found.ref} is signed, and its {METADATA} has no digest: in the store nothing that is signed covers its files",
                hint="Ask its publisher to publish it again: `kernelhub publish` adds the digest.",
            )
        if document is not None:
            signed = document.manifest.variants.get(str(variant))
            # What was read when it was verified, not the file again: that may be another one by now.
            if signed is None or Metadata.parse(signed.metadata).raw != verified.metadata.raw:
                raise IntegrityError(
                    f"{verified.path} is not what the commit {found.commit} names",
                    [Violation("different", METADATA)],
                    hint="Delete it and load again: somebody else than kernelhub wrote to the store.",
                )
        if found.by_identity:
            published = self.facts(found, options)[1]
            identity = self.identity(found, published, verified, options)
            options.policy.decide(replace(published, identity=identity))

    def identity(self, found: Found, published: Published, verified: Verified, options: Options) -> str:
        """Who of those that are trusted signed the variant with Sigstore. Raises `UntrustedKernel` where nobody did."""
        from kernelhub.hub.identity import signed_by

        return signed_by(verified, found.ref, options.policy.identities_for(published), self.sigstore_root)

    def _may_be_signed(self, published: Published, options: Options) -> bool:
        return not published.revoked and bool(options.policy.identities_for(published))

    def _stored(self, found: Found) -> ManifestDocument | None:
        return (
            None if found.commit == LOCAL else self.resolver.store.document(found.source.key, found.repo, found.commit)
        )

    def _may_ask(self, found: Found, options: Options) -> bool:
        """Whether the hub has manifests, as it had when the commit was first asked for, and is there to be asked."""
        kept = self.resolver.store.listing(found.source.key, found.repo, found.commit)
        return kept.get("manifest") is True and not (options.offline and found.source.origin is Origin.REMOTE)


def _signers(document: ManifestDocument | None, options: Options, published: Published) -> list[str]:
    if document is None or not document.signatures:
        return []
    from kernelhub.hub.signing import right_signers

    keys = options.policy.keys_for(published)
    return [key.id for key in right_signers(document.payload, document.signatures, keys)]


def _as_signed(document: ManifestDocument, found: Found) -> Listing:
    """What was signed; a variant that the source says it cannot give is still one that cannot be had."""
    signed, given = Listing.of(document), found.listing.variants
    variants = {
        name: {**details, UNAVAILABLE: given[name][UNAVAILABLE]} if UNAVAILABLE in given.get(name, {}) else details
        for name, details in signed.variants.items()
    }
    return replace(signed, variants=variants)


def _commit(found: Found) -> str | None:
    return None if found.commit == LOCAL else found.commit
