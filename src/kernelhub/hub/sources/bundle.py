"""What came in bundles, as a source that needs no network: a hub in a folder of the store, perhaps without all of its archives.

It says nothing of who published a kernel, so that a signature or the user's trust in its name has to let it run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelhub.core.refs import Pin, RepoId, Revision, is_commit
from kernelhub.core.trust import Origin
from kernelhub.errors import KernelNotFound, RepositoryNotFound
from kernelhub.hub.addresses import BUNDLES_ADDRESS
from kernelhub.hub.sources.base import UNAVAILABLE, Listing, Progress
from kernelhub.hub.sources.layout import LayoutSource, blob_path


@dataclass(frozen=True)
class BundleSource(LayoutSource):
    """The hub at `url`, a folder that bundles were installed into.

    Kernels from hubs without manifests were given one. With `claims` their own commit, as far as one can believe the bundle,
    leads to it, and nothing else does.
    """

    claims: bool = False

    @property
    def name(self) -> str:
        return BUNDLES_ADDRESS.name

    @property
    def key(self) -> str:
        return BUNDLES_ADDRESS.key

    @property
    def origin(self) -> Origin:
        return BUNDLES_ADDRESS.origin

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        """The commit. Raises `RepositoryNotFound` for all that no bundle brought: other sources may have it."""
        nothing = RepositoryNotFound(f"no installed bundle has {repo}@{pin}")
        commit = pin.commit if isinstance(pin, Revision) else None
        if self.claims and commit is None:
            raise nothing
        try:
            return self.ref(repo, commit).commit if self.claims and commit else super().resolve(repo, pin)
        except KernelNotFound as error:
            raise nothing from error

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        return {name: commit for name, commit in super().refs(repo).items() if not is_commit(name)}

    def listing(self, repo: RepoId, commit: str) -> Listing:
        """The variants; what the bundle left out cannot be had."""
        found = super().listing(repo, commit)
        variants = {
            name: details if self._has(details["archive"]) else {**details, UNAVAILABLE: "the bundle does not have it"}
            for name, details in found.variants.items()
        }
        parts = {name: details for name, details in found.parts.items() if self._has(details["archive"])}
        return replace(found, variants=variants, parts=parts)

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        if not self._has(str(details.get("archive"))):
            raise KernelNotFound(f"{self.name} have no {part} of {repo}")
        super().fetch_part(repo, commit, part, details, folder, progress)

    def _has(self, sha256: str) -> bool:
        return Path(self.url, *blob_path(sha256).split("/")).is_file()
