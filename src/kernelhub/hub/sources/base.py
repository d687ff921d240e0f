"""What a source of kernels answers, and the values it answers with.

A source is asked, each only when the answer is not in the store: which commit is this version or revision, what is there
at this commit, does the hub trust who published it, what did this key revoke, and give me one variant's files. It raises

- `RepositoryNotFound` where it does not have the repository (the next source is asked),
- `KernelNotFound` where it has the repository and not this version, revision or variant,
- `HubUnavailable` where it did not answer; never an empty answer instead,
- `InvalidMetadata` or `IntegrityError` where what it sent is malformed or is not what it said,
- `Moved` where the repository says that it lives elsewhere now.

A source holds no state of a call and is used by several threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kernelhub.core.refs import KernelRef, Pin, RepoId
from kernelhub.core.trust import Origin

if TYPE_CHECKING:
    from kernelhub.core.manifest import ManifestDocument

# The commit of what lies in the user's own folder now: it names no content, so nothing of it is kept in the store.
LOCAL = "0" * 40


# The key of a variant's details under which a source says why the variant cannot be had, as a user reads it.
UNAVAILABLE = "unavailable"

# What a repository may bring beside its variants: the tree that the kernel is built from, and its benchmark scripts.
SOURCE, BENCHMARKS = "source", "benchmarks"


@dataclass(frozen=True)
class Listing:
    """What a hub has of a repository at one commit; the store keeps it, so it is asked once.

    `variants` maps the name of each variant's folder to what the source needs to fetch it (JSON values, perhaps empty).
    A name here may be anything that the hub sent: it is a path only after `BuildVariant.parse` accepted it. `parts` has
    what is needed to fetch `SOURCE` and `BENCHMARKS`, for those that the repository may bring. `document` is the commit's
    manifest with its signatures, checked against the commit, where the hub has manifests.
    """

    variants: Mapping[str, Mapping[str, Any]] = field(hash=False)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    document: ManifestDocument | None = field(default=None, hash=False, repr=False)

    @classmethod
    def of(cls, document: ManifestDocument) -> Listing:
        """What a manifest names."""
        manifest = document.manifest
        parts = {SOURCE: manifest.source, BENCHMARKS: manifest.benchmarks}
        return cls(
            {name: variant.to_json() for name, variant in manifest.variants.items()},
            {part: {"archive": archive} for part, archive in parts.items() if archive},
            document,
        )


class Moved(Exception):
    """The repository lives at `destination` now; that one's trust counts."""

    def __init__(self, destination: KernelRef) -> None:
        super().__init__(f"moved to {destination}")
        self.destination = destination


class Progress(Protocol):
    """Who wants to know how far a transfer is: bytes to come, and bytes that came; and what takes seconds, in words."""

    def expect(self, size: int) -> None: ...

    def advance(self, size: int) -> None: ...

    def note(self, text: str) -> None: ...


class NoProgress:
    """Nobody wants to know."""

    def expect(self, size: int) -> None:
        pass

    def advance(self, size: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Source(Protocol):
    """A place that has kernels.

    `name` is what users call it (a URL, a path, "the embedded hub"), `key` its folder in the store (one safe path
    segment, different for different places), `origin` what kind of place it is.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def origin(self) -> Origin: ...

    def check(self) -> None:
        """Raise where the place is no hub, or one of a layout that is unknown here; asked of remote ones once a day."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        """The commit (40 hex digits) of a version or revision."""

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        """The branches and tags, by name, with their commits."""

    def listing(self, repo: RepoId, commit: str) -> Listing:
        """The variants at a commit."""

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        """The variant's metadata.json without its other files; None where only the whole variant can be had.

        `details` is `Listing.variants[variant]`.
        """

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        """Whether the hub marks the publisher as trusted; None where it has no such marks."""

    def revocations(self, key_id: str) -> bytes | None:
        """The revocation list of a key, as it lies in the hub and unchecked; None where there is none."""

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        """Write the variant's files into the empty `folder`, each checked against what the hub says of it.

        `details` is `Listing.variants[variant]`. Nothing is ever written outside `folder`, whatever the hub sends.
        """

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        """Write `SOURCE` or `BENCHMARKS` into the empty `folder`; `details` is `Listing.parts[part]`.

        Raises `KernelNotFound` where there is none after all.
        """

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        """The folder where the variant lies already, where the source is the user's own folder of builds.

        Such a variant is verified and loaded where it lies; None means that it is fetched into the store.
        """
