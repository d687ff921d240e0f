"""Sigstore: a build's `metadata.json.sigstore` says who signed its metadata.json, which holds the digest of every file.

Builders on GitHub sign with no key of their own: a certificate names the workflow that ran, for minutes only, and a public
log has the signature from that time. The package sigstore (extra `sigstore`) checks all of it, offline, against the root
of trust that it brings, or against one that the settings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kernelhub.core.metadata import Metadata
from kernelhub.core.refs import KernelRef, version_of
from kernelhub.core.trust import TrustedIdentity
from kernelhub.errors import IntegrityError, InvalidReference, MissingDependency, UntrustedKernel, Violation
from kernelhub.hub.verify import METADATA, Verified

BUNDLE = "metadata.json.sigstore"

# Bundles have 5 to 20 KB; one with a timestamp, certificates and a long proof 50.
_MAX_BUNDLE = 1024 * 1024


def signed_by(verified: Verified, ref: KernelRef, identities: Sequence[TrustedIdentity], root: Path | None) -> str:
    """The first of the identities that signed the variant; `root` is a trusted root's file, None the public one.

    Raises `UntrustedKernel` where none did, which says why. A signature covers the metadata, and that the digest, the
    name and the version, but not the organisation: whom to trust for which repository is what `identities` say.
    """
    artifact = (verified.path / METADATA).read_bytes()
    metadata = Metadata.parse(artifact)
    if metadata.raw != verified.metadata.raw:
        raise IntegrityError(f"{verified.path} was changed after it was verified", [Violation("different", METADATA)])
    asked = version_of(ref.pin)
    version = metadata.version if asked is None else asked
    if metadata.digest is None:
        raise _untrusted(ref, f"its {METADATA} has no digest, so that a signature over it covers none of its files")
    if (_plain(metadata.name), metadata.version) != (_plain(ref.repo.name), version):
        raise _untrusted(ref, f"what is signed is version {metadata.version} of {metadata.name}")
    try:
        with (verified.path / BUNDLE).open("rb") as file:
            data = file.read(_MAX_BUNDLE)
    except FileNotFoundError:
        raise _untrusted(ref, f"it has no Sigstore bundle ({BUNDLE})") from None
    return _check(ref, artifact, data, identities, root)


def _check(
    ref: KernelRef, artifact: bytes, data: bytes, identities: Sequence[TrustedIdentity], root: Path | None
) -> str:
    verifier = _verifier(root)
    from sigstore.errors import VerificationError
    from sigstore.models import Bundle

    try:
        bundle = Bundle.from_json(data)
    except Exception as error:
        raise _untrusted(ref, f"its {BUNDLE} is no Sigstore bundle: {error}") from error
    reasons = []
    for identity in identities:
        try:
            verifier.verify_artifact(artifact, bundle, _policy(identity))
        except VerificationError as error:
            reasons.append(f"{identity.identity}: {' '.join(str(error).split())}")
        except Exception as error:  # noqa: BLE001 - hostile bytes: whatever the library makes of them, they are not right
            reasons.append(f"{identity.identity}: {type(error).__name__}: {error}")
        else:
            return f"{identity.identity} ({identity.issuer})"
    raise _untrusted(ref, "its Sigstore bundle is not one of those who are trusted for it: " + "; ".join(reasons))


def _policy(identity: TrustedIdentity) -> Any:
    from sigstore.verify import policy

    rules: list[Any] = [policy.Identity(identity=identity.identity, issuer=identity.issuer)]
    if identity.source:
        rules.append(policy.OIDCSourceRepositoryURI(identity.source))
    return policy.AllOf(rules)


@cache
def _verifier(root: Path | None) -> Any:
    try:
        from sigstore.models import TrustedRoot
        from sigstore.verify import Verifier
    except ImportError:
        raise MissingDependency(
            "Sigstore signatures need the package sigstore", packages=["'kernelhub[sigstore]'"]
        ) from None
    if root is None:
        return Verifier.production(offline=True)
    try:
        return Verifier(trusted_root=TrustedRoot.from_file(str(root)))
    except Exception as error:
        raise InvalidReference(
            f"{root} is no trusted root of Sigstore: {error}", hint="Expected a trusted_root.json."
        ) from error


def _untrusted(ref: KernelRef, reason: str) -> UntrustedKernel:
    return UntrustedKernel(
        f"{ref} would run code that nobody who is trusted for it signed: {reason}",
        hint="The identities that are trusted are those of trusted_identities in the settings.",
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
