"""A Sigstore of the tests' own: an authority, a certificate log and a signature log with keys made here, and its root."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
MINUTES = datetime.timedelta(minutes=10)
YEARS = datetime.timedelta(days=3650)

_SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_FULCIO = "1.3.6.1.4.1.57264.1."
_SHA256 = ec.ECDSA(hashes.SHA256())

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: Key) -> bytes:
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def log_id(key: Key) -> bytes:
    return hashlib.sha256(spki(key)).digest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _utf8(text: str) -> bytes:
    data = text.encode()
    size = bytes([len(data)]) if len(data) < 128 else bytes([0x81, len(data)])
    return b"\x0c" + size + data


def _octets(data: bytes) -> bytes:
    size = bytes([len(data)]) if len(data) < 128 else bytes([0x82]) + struct.pack("!H", len(data))
    return b"\x04" + size + data


@dataclass
class TestSigstore:
    """Issues certificates and logs signatures, as the public one does, with keys that nobody else trusts."""

    __test__ = False

    authority: Key = field(default_factory=new_key)
    certificates: Key = field(default_factory=new_key)
    signatures: Key = field(default_factory=new_key)

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        public = self.authority.public_key()
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.root = (
            x509.CertificateBuilder(name, name, public, 1, NOW - YEARS, NOW + YEARS)
            .add_extension(x509.BasicConstraints(True, 0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.authority, hashes.SHA256())
        )

    def trusted_root(self) -> str:
        """The root of trust, as `trusted_root.json` has it."""
        start = {"start": (NOW - YEARS).strftime("%Y-%m-%dT%H:%M:%SZ")}

        def log(key: Key, url: str) -> dict[str, Any]:
            public = {"rawBytes": b64(spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": start}
            return {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": {"keyId": b64(log_id(key))},
            }

        der = self.root.public_bytes(serialization.Encoding.DER)
        authority = {
            "subject": {"organization": "tests", "commonName": "tests"},
            "uri": "https://authority.test",
            "certChain": {"certificates": [{"rawBytes": b64(der)}]},
            "validFor": start,
        }
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self.signatures, "https://log.test")],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self.certificates, "https://certificates.test")],
                "timestampAuthorities": [],
            }
        )

    def certificate(self, key: Key, identity: str, issuer: str, source: str | None = None) -> x509.Certificate:
        """A certificate for ten minutes, with the certificate log's receipt in it."""
        name: x509.GeneralName = (
            x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        )
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.SubjectAlternativeName([name]), True),
            (x509.KeyUsage(True, False, False, False, False, False, False, False, False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key()), False),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(_FULCIO + "1"), issuer.encode()), False),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(_FULCIO + "8"), _utf8(issuer)), False),
        ]
        if source:
            extensions.append((x509.UnrecognizedExtension(x509.ObjectIdentifier(_FULCIO + "12"), _utf8(source)), False))
        builder = x509.CertificateBuilder(
            self.root.subject,
            x509.Name([]),
            key.public_key(),
            x509.random_serial_number(),
            NOW - MINUTES,
            NOW + MINUTES,
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        before = builder.sign(self.authority, hashes.SHA256()).tbs_certificate_bytes
        receipt = x509.UnrecognizedExtension(_SCT_LIST, self._receipt(before))
        return builder.add_extension(receipt, critical=False).sign(self.authority, hashes.SHA256())

    def _receipt(self, certificate: bytes) -> bytes:
        time = int(NOW.timestamp() * 1000)
        entry = log_id(self.authority) + struct.pack("!I", len(certificate))[1:] + certificate
        signed = struct.pack("!BBQH", 0, 0, time, 1) + entry + struct.pack("!H", 0)
        signature = self.certificates.sign(signed, _SHA256)
        receipt = struct.pack("!B32sQH", 0, log_id(self.certificates), time, 0)
        receipt += struct.pack("!BBH", 4, 3, len(signature)) + signature
        return _octets(struct.pack("!HH", len(receipt) + 2, len(receipt)) + receipt)

    def bundle(self, artifact: bytes, identity: str, issuer: str, source: str | None = None) -> dict[str, Any]:
        """What `metadata.json.sigstore` has for these bytes, signed as this identity."""
        key = new_key()
        certificate = self.certificate(key, identity, issuer, source)
        der = certificate.public_bytes(serialization.Encoding.DER)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        signature, digest = key.sign(artifact, _SHA256), hashlib.sha256(artifact).digest()
        body = json.dumps(
            {
                "apiVersion": "0.0.1",
                "kind": "hashedrekord",
                "spec": {
                    "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
                    "signature": {"content": b64(signature), "publicKey": {"content": b64(pem)}},
                },
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"certificate": {"rawBytes": b64(der)}, "tlogEntries": [self._entry(body)]},
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": b64(digest)},
                "signature": b64(signature),
            },
        }

    def _entry(self, body: bytes) -> dict[str, Any]:
        """The log's entry, alone in its tree, with the promise and the checkpoint that the log signs."""
        ident, time = log_id(self.signatures), int(NOW.timestamp())
        promised = {"body": b64(body), "integratedTime": time, "logID": ident.hex(), "logIndex": 0}
        promise = self.signatures.sign(json.dumps(promised, sort_keys=True, separators=(",", ":")).encode(), _SHA256)
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"log.test\n1\n{b64(root)}\n"
        signed = b64(ident[:4] + self.signatures.sign(note.encode(), _SHA256))
        return {
            "logIndex": "0",
            "logId": {"keyId": b64(ident)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(time),
            "inclusionPromise": {"signedEntryTimestamp": b64(promise)},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n— log.test {signed}\n"},
            },
            "canonicalizedBody": b64(body),
        }
