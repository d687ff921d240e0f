"""May this kernel's code run? Facts about where it comes from in, a decision out.

There is one gate, `TrustPolicy.decide`, and every way to a kernel goes through it before a byte of code is imported.
`hub/gate.py` collects the facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kernelhub.core.refs import RepoId
from kernelhub.errors import InvalidReference, UntrustedKernel

if TYPE_CHECKING:  # most deployments have no keys, and each of these takes a millisecond or two to import
    from kernelhub.core.revocations import Revocations
    from kernelhub.core.signatures import PublicKey


class Origin(Enum):
    """What kind of place a kernel comes from; only a `REMOTE` one needs the network.

    A `CACHE` is what another tool fetched from a remote hub, or what came in a bundle: it lies on this disk, and is not the
    user's own.
    """

    EMBEDDED = "embedded"
    FOLDER = "folder"
    REMOTE = "remote"
    CACHE = "cache"


@dataclass(frozen=True)
class Published:
    """Who published a kernel: the facts that trust is decided on.

    `hub` is what the user calls the place. `publisher_trusted` is the hub's own mark for the publisher; None where the
    hub has no such marks. `signers` are the ids of the keys, of those that the user trusts for this kernel, whose
    signatures over it are right, and `identity` is whom Sigstore says it was signed by, where the user trusts them for
    this kernel. `revocations` are the lists of the keys that the user trusts for this kernel. `claimed` is the commit of
    another hub that it is said to be.
    """

    repo: RepoId
    origin: Origin
    hub: str
    publisher_trusted: bool | None = None
    commit: str | None = None
    signers: tuple[str, ...] = ()
    identity: str | None = None
    revocations: tuple[Revocations, ...] = ()
    claimed: str | None = None

    @property
    def revoked(self) -> str | None:
        """Why the commit no longer counts, where a list says so."""
        for item in self.revocations:
            for commit in (self.commit, self.claimed):
                if commit is not None and commit in item.commits:
                    return f"key {item.key} revoked it ({item.commits[commit] or 'no reason given'})"
        return None

    @property
    def counting_signers(self) -> list[str]:
        """The signers that no list revokes. A key that is revoked may still revoke: leaving lists out opens a way in."""
        revoked = {key for item in self.revocations for key in item.keys}
        return [key for key in self.signers if key not in revoked]


@dataclass(frozen=True)
class Pattern:
    """Which repositories: `org/name`, or `org/*` for all of a publisher; `https://hub/org/name` on one hub only."""

    org: str
    name: str
    hub: str | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern. Raises `InvalidReference`."""
        *hub, org, name = text.rsplit("/", 2) if isinstance(text, str) and "/" in text else ("", "")
        where = hub[0].rstrip("/") if hub else None
        try:
            RepoId.parse(f"{org}/any" if name == "*" else f"{org}/{name}")
            if where is not None and "://" not in where and not where.startswith("/"):
                raise InvalidReference(f"{where!r} is not a hub's address")
        except InvalidReference:
            raise InvalidReference(
                f"{text!r} does not name what to trust",
                hint='Expected "org/name", or "org/*" for all of a publisher; with a hub\'s address before it on that '
                'hub only, such as "https://kernels.example.org/org/*".',
            ) from None
        return cls(org, name, where)

    def holds(self, published: Published) -> bool:
        repo = published.repo
        return self.org == repo.org and self.name in ("*", repo.name) and self.hub in (None, published.hub)

    def __str__(self) -> str:
        return f"{self.hub}/{self.org}/{self.name}" if self.hub else f"{self.org}/{self.name}"


@dataclass(frozen=True)
class TrustedKey:
    """A key whose signatures the user trusts: over all kernels, or over those of a pattern."""

    key: PublicKey
    pattern: Pattern | None = None

    @classmethod
    def parse(cls, text: str) -> TrustedKey:
        """Read `ed25519:<base64>` or `<pattern>=ed25519:<base64>`. Raises `InvalidReference`."""
        from kernelhub.core.signatures import ALGORITHM, PublicKey

        before, algorithm, value = text.strip().partition(f"{ALGORITHM}:")
        key = PublicKey.parse(algorithm + value)
        if before and not before.endswith("="):
            raise InvalidReference(f"{text!r:.200} is not a trusted key", hint='Expected "org/*=ed25519:...".')
        return cls(key, Pattern.parse(before[:-1].strip()) if before else None)

    def __str__(self) -> str:
        return f"{self.pattern}={self.key}" if self.pattern else str(self.key)


@dataclass(frozen=True)
class TrustedIdentity:
    """Whose Sigstore signature the user trusts over the kernels of a pattern, as the certificate names them.

    `identity` is the name that it was issued to, such as a workflow's address with its ref, and `issuer` who vouched for
    that name. A workflow may be called from any repository: `source` is the one that it must have run for.
    """

    pattern: Pattern
    identity: str
    issuer: str
    source: str | None = None

    @classmethod
    def parse(cls, text: str) -> TrustedIdentity:
        """Read `<pattern>=<identity>|<issuer>`, perhaps with `|<source>`. Raises `InvalidReference`."""
        pattern, equals, rest = text.strip().partition("=") if isinstance(text, str) else ("", "", "")
        parts = [part.strip() for part in rest.split("|")]
        if not equals or len(parts) not in (2, 3) or not all(parts):
            raise InvalidReference(
                f"{text!r:.300} is not a trusted identity",
                hint='Expected "org/*=identity|issuer", or with the source repository "org/*=identity|issuer|source".',
            )
        return cls(Pattern.parse(pattern.strip()), parts[0], parts[1], parts[2] if len(parts) == 3 else None)

    def __str__(self) -> str:
        return f"{self.pattern}=" + "|".join(part for part in (self.identity, self.issuer, self.source) if part)


@dataclass(frozen=True)
class TrustPolicy:
    """What the user trusts: everything (`all_repositories`), what matches a pattern, what a key or an identity signed.

    Folders that the user named and the kernels inside this package are always trusted: they are the user's own disk.
    With `require_signature` only a signature counts, and for folders too; the kernels inside this package have none.
    """

    all_repositories: bool = False
    patterns: frozenset[Pattern] = frozenset()
    keys: tuple[TrustedKey, ...] = ()
    identities: tuple[TrustedIdentity, ...] = ()
    require_signature: bool = False

    @classmethod
    def of(
        cls,
        trust_remote_code: bool | Iterable[str],
        patterns: Iterable[str] = (),
        *,
        keys: Sequence[TrustedKey] = (),
        identities: Sequence[TrustedIdentity] = (),
        require_signature: bool = False,
    ) -> TrustPolicy:
        """The policy of a call: its `trust_remote_code`, over what the settings trust and require."""
        if isinstance(trust_remote_code, str):
            raise InvalidReference(
                f"trust_remote_code must be True, False or a list of repositories, got the text {trust_remote_code!r}",
                hint=f"Use trust_remote_code=[{trust_remote_code!r}].",
            )
        if not isinstance(trust_remote_code, (bool, Iterable)) or isinstance(trust_remote_code, (bytes, Mapping)):
            raise InvalidReference(
                f"trust_remote_code must be True, False or a list of repositories, got {trust_remote_code!r:.200}",
                hint='Such as trust_remote_code=["org/name"].',
            )
        everything = trust_remote_code is True
        named = () if isinstance(trust_remote_code, bool) else tuple(trust_remote_code)
        found = frozenset(Pattern.parse(item) for item in (*named, *patterns))
        return cls(everything, found, tuple(keys), tuple(identities), require_signature)

    def keys_for(self, published: Published) -> list[PublicKey]:
        """The keys whose signatures count for the kernel."""
        return [item.key for item in self.keys if item.pattern is None or item.pattern.holds(published)]

    def identities_for(self, published: Published) -> list[TrustedIdentity]:
        """The identities whose Sigstore signatures count for the kernel."""
        return [item for item in self.identities if item.pattern.holds(published)]

    def decide(self, published: Published) -> str:
        """The reason why the kernel may run. Raises `UntrustedKernel` where there is none."""
        reason = self.reason(published)
        if reason is None:
            raise self.refusal(published)
        return reason

    def reason(self, published: Published) -> str | None:
        """Why the kernel may run; None where it may not."""
        if published.origin is Origin.EMBEDDED:
            return "it is part of kernelhub"
        if published.revoked:
            return None
        if signers := published.counting_signers:
            return f"it is signed by key {signers[0]}, which the user trusts"
        if published.identity:
            return f"it is signed by {published.identity}, whom the user trusts"
        if self.require_signature:
            return None
        if published.origin is Origin.FOLDER:
            return f"it lies in {published.hub}, which the user named"
        if self.all_repositories:
            return "trust_remote_code=True"
        for pattern in sorted(self.patterns, key=str):
            if pattern.holds(published):
                return f"the user trusts {pattern}"
        if published.publisher_trusted:
            return f"{published.hub} marks {published.repo.org} as a trusted publisher"
        return None

    def refusal(self, published: Published) -> UntrustedKernel:
        """The error for a kernel that may not run: who published it, why not, and what would let it."""
        repo, hub = published.repo, published.hub
        if published.revoked:
            return UntrustedKernel(
                f"{repo} at {published.commit} no longer counts: {published.revoked}",
                hint="Take another version or commit. To run it all the same, stop trusting that key.",
            )
        what = f"{repo} would run code published by {repo.org!r} in {hub}"
        if self.require_signature:
            return UntrustedKernel(
                f"{what}; a signature is required (require_signature), and {self._signed(published)}",
                hint="Trust the key that signs it (KERNELHUB_TRUSTED_KEYS), or have it signed: `kernelhub sign`.",
            )
        narrow = f"{hub}/{repo}" if published.origin is Origin.REMOTE else str(repo)
        wider = f'["{repo}"] trusts that name on every hub, True every repository' if narrow != str(repo) else ""
        return UntrustedKernel(
            f"{what}, whom {_not_marked(published)}"
            + (f", and {self._signed(published)}" if self.keys or self.identities else ""),
            hint=f'If you trust it, pass trust_remote_code=["{narrow}"] ({wider or "True trusts every repository"}); '
            f"with a command: --trust {narrow}.",
        )

    def _signed(self, published: Published) -> str:
        if published.signers:
            return f"the key that signed it is revoked ({', '.join(published.signers)})"
        if not self.keys_for(published) and not self.identities_for(published):
            return "no key or identity is trusted for it"
        return "nobody who is trusted for it signed it"


def _not_marked(published: Published) -> str:
    if published.publisher_trusted is None:
        return f"nothing vouches for: {published.hub} does not mark trusted publishers"
    return f"{published.hub} does not mark as a trusted publisher"
