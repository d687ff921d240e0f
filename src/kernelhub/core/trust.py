"""May this kernel's code run? Facts about where it comes from in, a decision out.

There is one gate, `TrustPolicy.decide`, and every way to a kernel goes through it before a byte of code is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kernelhub.core.refs import RepoId
from kernelhub.errors import InvalidReference, UntrustedKernel


class Origin(Enum):
    """What kind of place a kernel comes from; only a `REMOTE` one needs the network.

    A `CACHE` is what another tool fetched from a remote hub: it lies on this disk, and is not the user's own.
    """

    EMBEDDED = "embedded"
    FOLDER = "folder"
    REMOTE = "remote"
    CACHE = "cache"


@dataclass(frozen=True)
class Published:
    """Who published a kernel: the facts that trust is decided on.

    `hub` is what the user calls the place. `publisher_trusted` is the hub's own mark for the publisher; None where the
    hub has no such marks.
    """

    repo: RepoId
    origin: Origin
    hub: str
    publisher_trusted: bool | None = None


@dataclass(frozen=True)
class TrustPolicy:
    """What the user trusts: everything (`all_repositories`), or what matches a pattern, `org/name` or `org/*`.

    Folders that the user named and the kernels inside this package are always trusted: they are the user's own disk.
    """

    all_repositories: bool = False
    patterns: frozenset[str] = frozenset()

    @classmethod
    def of(cls, trust_remote_code: bool | Iterable[str], patterns: Iterable[str] = ()) -> TrustPolicy:
        """The policy of a call: its `trust_remote_code`, over the patterns of the settings."""
        if isinstance(trust_remote_code, bool):
            return cls(trust_remote_code, frozenset(map(_pattern, patterns)))
        if isinstance(trust_remote_code, str):
            raise InvalidReference(
                f"trust_remote_code must be True, False or a list of repositories, got the text {trust_remote_code!r}",
                hint=f"Use trust_remote_code=[{trust_remote_code!r}].",
            )
        return cls(False, frozenset(_pattern(item) for item in (*trust_remote_code, *patterns)))

    def decide(self, published: Published) -> str:
        """The reason why the kernel may run. Raises `UntrustedKernel` where there is none."""
        reason = self.reason(published)
        if reason is None:
            raise UntrustedKernel(
                f"{published.repo} would run code published by {published.repo.org!r}, whom {_not_trusted(published)}",
                hint=f'If you trust it, pass trust_remote_code=["{published.repo}"] (True trusts every repository); '
                f"with a command: --trust {published.repo}.",
            )
        return reason

    def reason(self, published: Published) -> str | None:
        """Why the kernel may run; None where it may not."""
        repo = published.repo
        if published.origin is Origin.EMBEDDED:
            return "it is part of kernelhub"
        if published.origin is Origin.FOLDER:
            return f"it lies in {published.hub}, which the user named"
        if self.all_repositories:
            return "trust_remote_code=True"
        for pattern in (str(repo), f"{repo.org}/*"):
            if pattern in self.patterns:
                return f"the user trusts {pattern}"
        if published.publisher_trusted:
            return f"{published.hub} marks {repo.org} as a trusted publisher"
        return None


def _not_trusted(published: Published) -> str:
    if published.publisher_trusted is None:
        return f"nothing vouches for: {published.hub} does not mark trusted publishers"
    return f"{published.hub} does not mark as a trusted publisher"


def _pattern(text: str) -> str:
    org, _, name = text.partition("/")
    try:
        RepoId.parse(f"{org}/any" if name == "*" else text)
    except InvalidReference:
        raise InvalidReference(
            f"{text!r} does not name what to trust", hint='Expected "org/name", or "org/*" for all of a publisher.'
        ) from None
    return text
