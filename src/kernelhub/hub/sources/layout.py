"""A hub in a folder: on this machine, on a web host or in an object store, the same bytes everywhere.

A cold load asks for three files, however many the kernel has: the ref, the manifest, the archive. `hub.json` is not
among them: `LayoutSource.check` asks for it, and the client calls that once a day for each hub.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from kernelhub.core import revocations
from kernelhub.core.manifest import MAX_BYTES, Manifest, ManifestDocument, ManifestVariant, RefFile, parse_hub_file
from kernelhub.core.refs import Pin, RepoId, Revision, is_commit
from kernelhub.core.trust import Origin
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelNotFound,
    RepositoryNotFound,
    Violation,
    Yanked,
    context,
)
from kernelhub.hub.addresses import Address, hub_address
from kernelhub.hub.files import Files, open_files
from kernelhub.hub.sources.base import Listing, Progress

_SMALL = 64 * 1024  # bytes of a ref or a hub.json, which have a hundred
_MAX_SOURCE = 256 * 1024 * 1024  # bytes of a packed source tree, whose size no manifest says
_IN_MEMORY = 32 * 1024 * 1024  # larger archives wait on disk while they are checked
_PART_OF_COMMIT = re.compile(r"[0-9a-f]{7,39}", re.ASCII)


@dataclass(frozen=True)
class LayoutSource:
    """The hub at a path, `file://`, `http(s)://`, `s3://` or another address that fsspec knows.

    `user_agent` is asked before each request over HTTP, and sent exactly. Nothing is imported, read or asked until a
    method needs it; then `InvalidReference` is raised for what is no address, and `MissingDependency` where a package
    for it is not installed.
    """

    url: str
    user_agent: Callable[[], str]

    @cached_property
    def files(self) -> Files:
        return open_files(self.url, self.user_agent)

    @cached_property
    def address(self) -> Address:
        return hub_address(self.url)

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def key(self) -> str:
        return self.address.key

    @property
    def origin(self) -> Origin:
        return self.address.origin

    def check(self) -> None:
        """Look whether this is a hub at all, of a layout that is known here: one small file.

        Raises `HubUnavailable` where there is no `hub.json`, `InvalidMetadata` where it is another layout's.
        """
        self.files.check_root()
        data = self.files.read("hub.json", _SMALL)
        if data is None:
            raise HubUnavailable(
                f"{self.name} is not a hub: it has no hub.json",
                hub=self.name,
                request="GET hub.json",
                hint="Is the address right? `kernelhub publish` makes a hub in an empty folder or bucket.",
            )
        with context(self.name):
            parse_hub_file(data)

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        """The commit of a version or revision.

        Raises `Yanked`, a `KernelNotFound` with the commit and the reason, for a version that was withdrawn; what names
        the commit itself is still answered.
        """
        if isinstance(pin, Revision) and pin.commit:
            if self._document_or_none(repo, pin.commit) is None:
                self._not_found(repo, pin.ref)
            return pin.commit
        ref = self.ref(repo, pin.ref)
        if ref.yanked is not None:
            raise Yanked(
                f"{repo}@{pin} was withdrawn from {self.name}: {ref.yanked[:300] or 'no reason given'}",
                commit=ref.commit,
                reason=ref.yanked,
                hint=f'Take another version, or this commit by its name: "{repo}@{ref.commit}".',
            )
        return ref.commit

    def ref(self, repo: RepoId, name: str) -> RefFile:
        """A ref as it is, yanked or not. Raises `KernelNotFound`, or `RepositoryNotFound`."""
        data = self.files.read(f"{repo}/refs/{name}", _SMALL)
        if data is None:
            self._not_found(repo, name)
        with context(f"{self.name}: {repo}/refs/{name}"):
            return RefFile.parse(data)

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        """The refs with their commits, the yanked ones too; on a web host that shows its folders' contents only."""
        names = self._ref_names(repo)
        if not names:
            self._not_found(repo, None)
        return {name: self.ref(repo, name).commit for name in names}

    def listing(self, repo: RepoId, commit: str) -> Listing:
        """The variants, with all that `fetch` needs: archive, size, metadata's text, layers."""
        return Listing.of(self.document(repo, commit))

    def manifest(self, repo: RepoId, commit: str) -> Manifest:
        """The commit's manifest, checked: it has this hash and answers for this repository, else `IntegrityError`."""
        return self.document(repo, commit).manifest

    def document(self, repo: RepoId, commit: str) -> ManifestDocument:
        """The commit's manifest with its signatures; the manifest is checked, the signatures are not."""
        document = self._document_or_none(repo, commit)
        if document is None:
            path = f"{repo}/commits/{commit}.json"
            raise HubUnavailable(
                f"{self.name} lacks {path}, so it is not a whole copy of a hub", hub=self.name, request=f"GET {path}"
            )
        return document

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        return ManifestVariant.parse(details, f"{repo} at {commit}: {variant}").metadata.encode()

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        return None

    def revocations(self, key_id: str) -> bytes | None:
        return self.files.read(revocations.path_of(key_id), revocations.MAX_BYTES)

    def fetch(
        self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        wanted = ManifestVariant.parse(details, f"{repo} at {commit}: {variant}")
        progress.expect(wanted.size)
        self._unpack(wanted.archive, wanted.size, folder, progress)
        with context(f"{self.name}: {blob_path(wanted.archive)}"):
            _check_metadata(folder, wanted)

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        archive = details.get("archive")
        if not isinstance(archive, str) or not re.fullmatch("[0-9a-f]{64}", archive):
            raise InvalidMetadata(f"{repo} at {commit}: its {part} is {archive!r}, not the hash of an archive")
        self._unpack(archive, None, folder, progress)

    def download_archive(self, sha256: str, size: int | None, into: BinaryIO, progress: Progress) -> None:
        """Write the archive of this hash (and size, where it is known) into a file, which is read back and checked."""
        path = blob_path(sha256)
        with context(f"{self.name}: {path}"):
            if not self.files.download(path, _MAX_SOURCE if size is None else size, into, progress):
                raise HubUnavailable(
                    "the archive is not there, so this is not a whole copy of a hub",
                    hub=self.name,
                    request=f"GET {path}",
                    status=404,
                )
            _check_archive(into, sha256, size)

    def _unpack(self, sha256: str, size: int | None, folder: Path, progress: Progress) -> None:
        """Fetch the archive of this hash (and size, where it is known) and unpack it, once it is that archive."""
        # In the folder, where a name is needed for it at all, so that nothing is ever left anywhere else.
        with (
            tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder)) as spooled,
            context(f"{self.name}: {blob_path(sha256)}"),
        ):
            file = cast("BinaryIO", spooled)
            self.download_archive(sha256, size, file, progress)
            from kernelhub.hub.archive import unpack  # here: a kernel that is in the store needs no zstandard

            file.seek(0)
            unpack(file, folder)

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def _document_or_none(self, repo: RepoId, commit: str) -> ManifestDocument | None:
        if not is_commit(commit):
            raise InvalidReference(f"{commit!r} is not a commit", hint="Expected 40 hex digits.")
        data = self.files.read(f"{repo}/commits/{commit}.json", MAX_BYTES)
        if data is None:
            return None
        with context(f"{self.name}: {repo}/commits/{commit}.json"):
            return ManifestDocument.parse(data).checked(repo, commit)

    def _ref_names(self, repo: RepoId) -> list[str] | None:
        return self.files.names(f"{repo}/refs")

    def _not_found(self, repo: RepoId, ref: str | None) -> NoReturn:
        """Say what it is that is not there: the version, the repository, or the hub."""
        names = self._ref_names(repo)
        if names and ref is not None:
            short = " A commit is named by all of its 40 hex digits." if _PART_OF_COMMIT.fullmatch(ref) else ""
            raise KernelNotFound(f"{self.name} has {repo}, and not {ref}", hint=f"It has {', '.join(names)}.{short}")
        self.check()
        if names is None and ref is None:
            raise RepositoryNotFound(
                f"{self.name} shows no versions of {repo}",
                hint="A web host that does not list its folders cannot say which versions it has: ask for one.",
            )
        raise RepositoryNotFound(f"{self.name} does not have {repo}" + (f"@{ref}" if names is None else ""))


def blob_path(sha256: str) -> str:
    """Where the blob of this hash lies in a hub."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def _check_archive(file: BinaryIO, sha256: str, size: int | None) -> None:
    """Whether these are the bytes that the manifest names, before anything is made of them."""
    found, state = file.seek(0, 2), hashlib.sha256()
    if size is not None and found != size:
        text = f"more than {size:,}" if found > size else f"{found:,}"
        raise IntegrityError(f"the archive has {text} bytes; its manifest says {size:,}")
    file.seek(0)
    while data := file.read(1024 * 1024):
        state.update(data)
    if state.hexdigest() != sha256:
        raise IntegrityError(f"the archive is not what its manifest names: its SHA-256 is {state.hexdigest()}")


def _check_metadata(folder: Path, wanted: ManifestVariant) -> None:
    path = folder / "metadata.json"
    if not path.is_file():
        raise IntegrityError("the archive has no metadata.json", [Violation("missing", "metadata.json")])
    if path.read_bytes() != wanted.metadata.encode():
        raise IntegrityError(
            "the archive's metadata.json is not the one in the manifest", [Violation("different", "metadata.json")]
        )
