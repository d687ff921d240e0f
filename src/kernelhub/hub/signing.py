"""Ed25519: making keys, signing with them, and telling whether a signature is right.

A key is two files: the private one (PEM, PKCS #8, read by its owner only), and beside it with the ending `.pub` the
public one, whose one line is what others trust. Needs the package cryptography (extra `signatures`), 20 ms to import.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelhub.core.canonical import b64
from kernelhub.core.signatures import MAX_SIGNATURES, PublicKey, Signature
from kernelhub.errors import InvalidReference, MissingDependency
from kernelhub.hub.disk import writing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from kernelhub.core.manifest import ManifestDocument

PUBLIC_SUFFIX = ".pub"
# How a private key's file begins; PEM may have text before the key.
HEADER = b"kernelhub signing key "

_MAX_KEY_FILE = 16 * 1024


@dataclass(frozen=True)
class Signer:
    """A private key, to sign with."""

    public: PublicKey
    _private: Ed25519PrivateKey = field(repr=False, compare=False)

    def sign(self, payload: bytes) -> Signature:
        """The signature over the bytes."""
        return Signature(self.public.id, b64(self._private.sign(payload)))


def right_signers(payload: bytes, signatures: Iterable[Signature], keys: Sequence[PublicKey]) -> list[PublicKey]:
    """Those of the keys that signed the bytes."""
    by_id = {key.id: key for key in keys}
    found = {
        item.key: by_id[item.key] for item in signatures if item.key in by_id and _right(payload, item, by_id[item.key])
    }
    return list(found.values())


def merged(known: ManifestDocument, given: ManifestDocument, keys: Sequence[PublicKey]) -> ManifestDocument:
    """The manifest with the signatures that it was known with and those that were given: as many as there may be.

    Of more than that the right ones of the keys come first, so that others cannot take their places.
    """
    both = tuple(dict.fromkeys((*known.signatures, *given.signatures)))
    if len(both) > MAX_SIGNATURES:
        by_id = {key.id: key for key in keys}
        right = [item for item in both if item.key in by_id and _right(given.payload, item, by_id[item.key])]
        both = tuple(dict.fromkeys((*right, *both)))[:MAX_SIGNATURES]
    return replace(given, signatures=both)


def _right(payload: bytes, signature: Signature, key: PublicKey) -> bool:
    ed25519, exceptions = _library()
    try:
        value = base64.b64decode(signature.ed25519, validate=True)
        ed25519.Ed25519PublicKey.from_public_bytes(key.raw).verify(value, payload)
    except (binascii.Error, ValueError, exceptions.InvalidSignature):
        return False
    return True


def generate(path: Path) -> PublicKey:
    """Make a key: the private one in `path`, which only its owner can read, the public one in `path` with `.pub`.

    A folder that is not there is made, for the owner alone.

    Raises `InvalidReference` where either is there already: no key is ever overwritten.
    """
    ed25519, _ = _library()
    from cryptography.hazmat.primitives import serialization

    private = ed25519.Ed25519PrivateKey.generate()
    public = _public(private)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    if not path.name:
        raise InvalidReference(f"{path} is no name for a key", hint="Expected a file's, such as ~/keys/acme.")
    beside = path.with_name(path.name + PUBLIC_SUFFIX)
    if os.path.lexists(beside):
        raise InvalidReference(f"{beside} is there already", hint="Keys are never overwritten: take another name.")
    with writing(f"the key {path}"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _create(path, HEADER + public.id.encode() + b"\n" + pem, 0o600)
    _create(beside, f"{public} {public.id}\n".encode(), 0o644)
    return public


def load_signer(path: Path) -> Signer:
    """The private key in a file. Raises `InvalidReference` for what is none, or what others than its owner can read."""
    ed25519, _ = _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_KEY_FILE)
    except OSError as error:
        raise InvalidReference(
            f"cannot read the key {path}: {error.strerror}", hint="`kernelhub keygen` makes one."
        ) from error
    if data.startswith(b"ed25519:"):
        raise InvalidReference(
            f"{path} is a public key, which does not sign",
            hint=f"The private key has the name without {PUBLIC_SUFFIX}.",
        )
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidReference(
            f"the key {path} can be read by others than its owner", hint=f"chmod 600 {path}; who has read it can sign."
        )
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
        raise InvalidReference(
            f"{path} holds no private key that can be read: {error}",
            hint=f"Expected PEM without a password; the public key is {path.name}{PUBLIC_SUFFIX}, and does not sign.",
        ) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise InvalidReference(f"{path} is no Ed25519 key", hint="`kernelhub keygen` makes one.")
    return Signer(_public(private), private)


def _public(private: Any) -> PublicKey:
    return PublicKey(private.public_key().public_bytes_raw())


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet; it never has another mode, not for a moment."""
    with writing(f"the key {path}"):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        except FileExistsError:
            raise InvalidReference(
                f"{path} is there already", hint="Keys are never overwritten: take another name."
            ) from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingDependency(
            "signatures need the package cryptography", packages=["'kernelhub[signatures]'"]
        ) from None
    return ed25519, exceptions
