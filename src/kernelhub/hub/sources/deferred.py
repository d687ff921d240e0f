"""A source that is made when it is first asked: what is in the store already needs no code that talks to hubs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kernelhub.core.refs import Pin, RepoId
from kernelhub.core.trust import Origin
from kernelhub.hub.addresses import Address
from kernelhub.hub.sources.base import Listing, Progress, Source


@dataclass(frozen=True)
class Deferred:
    """The source that `make` makes, at `address`."""

    address: Address
    make: Callable[[], Source]

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def key(self) -> str:
        return self.address.key

    @property
    def origin(self) -> Origin:
        return self.address.origin

    @cached_property
    def source(self) -> Source:
        return self.make()

    def check(self) -> None:
        self.source.check()

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        return self.source.resolve(repo, pin)

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        return self.source.refs(repo)

    def listing(self, repo: RepoId, commit: str) -> Listing:
        return self.source.listing(repo, commit)

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        return self.source.metadata(repo, commit, variant, details)

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return self.source.publisher_trusted(repo)

    def revocations(self, key_id: str) -> bytes | None:
        return self.source.revocations(key_id)

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        self.source.fetch(repo, commit, variant, details, folder, progress)

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        self.source.fetch_part(repo, commit, part, details, folder, progress)

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        """Sources at an address have nothing in a folder of the user's: their variants are fetched."""
        return None
