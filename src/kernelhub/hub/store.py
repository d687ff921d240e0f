"""The local store: verified kernels, shared by processes, read-only once written.

```
<root>/kernels/<hub>/<org>--<name>/refs/<ref>                    what a hub said of a version, and when
                                  /<commit>/listing.json         what it has at a commit, and who published it
                                           /manifest.json        its manifest and signatures, where the hub has them
                                           /<variant>/           the files, read-only
                                           /<variant>.json       what was learnt of them when they arrived
<root>/verdicts/<kernel>/<key>.json                              what was found of a kernel, measured beside the original
<root>/kernels/<hub>/revocations/<key id>.json                   which list of the key the hub had, and when
<root>/revocations/<key id>.json                                 all that the key took back, in lists seen anywhere
<root>/locks/                                                    one lock per folder being written
```

A variant is written beside its place, verified there, and appears by one rename; readers take no lock. What a killed
process leaves behind begins with a dot, is never read, and goes with `prune`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from kernelhub.core.refs import RepoId, is_commit
from kernelhub.core.variants import BuildVariant, parse_variant
from kernelhub.errors import IntegrityError, InvalidMetadata, KernelHubError, StoreError
from kernelhub.hub.opening import open_file
from kernelhub.hub.store_files import (
    beside_of,
    check_owner,
    contents,
    inside,
    locked,
    locked_unless_busy,
    make_read_only,
    read_json,
    remove,
    remove_tree,
    rename_aside,
    target_of,
    write_file,
    write_json,
)
from kernelhub.hub.verify import Known, Verified, learn, scan, verify, verify_tree

_log = logging.getLogger("kernelhub")

# The most bytes of a verdict that are read.
MAX_VERDICT = 1 << 20

if TYPE_CHECKING:
    from kernelhub.core.manifest import ManifestDocument
    from kernelhub.core.revocations import Revocations
    from kernelhub.core.signatures import PublicKey

# A commit's manifest with its signatures, beside its variants; no variant is called so.
MANIFEST = "manifest.json"

# What may lie beside what is written while it is: whole variants, and small files of ours.
_LEFT_BEHIND = (
    "kernels/*/*--*/*/.*",
    "kernels/*/*--*/.*",
    "kernels/*/.*",
    "kernels/*/revocations/.*",
    "revocations/.*",
)


# The keys of sources whose variants are made here: their listings say nothing that cannot be had again.
_MADE_HERE = ("embedded", "projects")


@dataclass(frozen=True)
class RefRecord:
    """What a hub said of a ref: its commit, or that it does not have the repository (None), and when (seconds).

    `before` are the commits that it was earlier, the oldest first.
    """

    commit: str | None
    time: float
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeenList:
    """The number of a key's revocation list that a hub had when it was last asked (0: none), and when (seconds)."""

    number: int
    time: float


@dataclass(frozen=True)
class Place:
    """Where a variant lies in the store. `hub` is the source's key."""

    hub: str
    repo: RepoId
    commit: str
    variant: BuildVariant

    def __str__(self) -> str:
        return f"{self.repo} {self.commit[:12]} {self.variant}"


@dataclass(frozen=True)
class StoredVerdict:
    """What was found of a kernel. `kernel` is its name, `path` where it lay then, `time` when that was (seconds)."""

    file: Path
    kernel: str
    path: Path
    time: float


@dataclass(frozen=True)
class Store:
    """The store in the folder `root`; `verify_always` hashes large files each time, whatever their stamps say."""

    root: Path
    verify_always: bool = False

    # What hubs said

    def ref(self, hub: str, repo: RepoId, ref: str) -> RefRecord | None:
        """What the hub said of the ref, when it was last asked."""
        raw = read_json(self._repo(hub, repo) / "refs" / _file_name(ref))
        commit, time = raw.get("commit"), _seconds(raw.get("time"))
        if time is None or not (commit is None or (isinstance(commit, str) and is_commit(commit))):
            return None
        before = raw.get("before", [])
        known = isinstance(before, list) and all(isinstance(item, str) and is_commit(item) for item in before)
        return RefRecord(commit, time, tuple(before) if known else ())

    def set_ref(self, hub: str, repo: RepoId, ref: str, record: RefRecord) -> None:
        """Remember what the hub said. A store that cannot be written does not, and the hub is asked again."""
        path = self._repo(hub, repo) / "refs" / _file_name(ref)
        write_json(path, {"commit": record.commit, "time": record.time, "before": list(record.before)})

    def checked(self, hub: str) -> float | None:
        """When the hub was last found to be one that this client can read (seconds); None where it never was."""
        return _seconds(read_json(self.root / "kernels" / hub / "checked.json").get("time"))

    def set_checked(self, hub: str, time: float) -> None:
        write_json(self.root / "kernels" / hub / "checked.json", {"time": time})

    def listing(self, hub: str, repo: RepoId, commit: str) -> dict[str, Any]:
        """What was kept of a commit; empty where nothing was."""
        return read_json(self._commit(hub, repo, commit) / "listing.json")

    def set_listing(self, hub: str, repo: RepoId, commit: str, value: Mapping[str, Any]) -> None:
        write_json(self._commit(hub, repo, commit) / "listing.json", value)

    def document(self, hub: str, repo: RepoId, commit: str) -> ManifestDocument | None:
        """The commit's manifest with its signatures, where the hub had one; it is what the commit names."""
        try:
            data = contents(self._commit(hub, repo, commit) / MANIFEST)
            from kernelhub.core.manifest import ManifestDocument

            return ManifestDocument.parse(data).checked(repo, commit)
        except (OSError, InvalidMetadata, IntegrityError):
            return None

    def set_document(self, hub: str, document: ManifestDocument, keys: Sequence[PublicKey] = ()) -> ManifestDocument:
        """Keep a manifest with its signatures, and those that it was kept with: what a hub no longer shows still holds.

        Of too many those of the `keys` stay, which are those that the user trusts for it. Gives back what is kept.
        """
        from kernelhub.hub.signing import merged

        manifest = document.manifest
        known = self.document(hub, manifest.repo, manifest.commit)
        document = merged(known, document, keys) if known else document
        write_file(self._commit(hub, manifest.repo, manifest.commit) / MANIFEST, document.to_bytes())
        return document

    # Revocation lists, whichever hub they came from

    def revocations(self, key_id: str) -> Revocations | None:
        """What was kept of a key's lists; None where nothing was. Raises `IntegrityError` for what is damaged."""
        from kernelhub.core.revocations import RevocationsDocument

        path = self.root / _list_path(key_id)
        try:
            data = contents(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        try:
            return RevocationsDocument.parse(data, key_id).revocations
        except InvalidMetadata as error:
            raise IntegrityError(
                f"{path} is damaged: {error}", hint="Delete it and load again with the network: the hub has it."
            ) from error

    def set_revocations(self, found: Revocations, *, must: bool = False) -> None:
        """Keep what a key took back, with what other processes kept of it.

        A store that cannot be written keeps nothing; `StoreError` where it `must`.
        """
        from kernelhub.core.revocations import RevocationsDocument

        path = self.root / _list_path(found.key)
        with nullcontext() if must else suppress(StoreError), locked(self.root, path):
            known = self.revocations(found.key)
            whole = found if known is None else known.merged(found)
            if whole != known:
                write_file(path, RevocationsDocument(whole).to_bytes(), must=must)

    def revocations_seen(self, hub: str, key_id: str) -> SeenList | None:
        """Which list of a key the hub had when it was last asked."""
        raw = read_json(self.root / "kernels" / hub / _list_path(key_id))
        number, time = raw.get("number"), _seconds(raw.get("time"))
        return SeenList(number, time) if isinstance(number, int) and time is not None else None

    def set_revocations_seen(self, hub: str, key_id: str, number: int, time: float) -> None:
        write_json(self.root / "kernels" / hub / _list_path(key_id), {"number": number, "time": time})

    # Variants

    def find(self, place: Place, *, rehash: bool = False) -> Verified | None:
        """The verified folder of a variant, or None where it is not here. Raises `IntegrityError` where it is altered.

        `rehash` hashes large files too, whatever the store's notes of them say.
        """
        folder = self.path(place)
        if not folder.is_dir():
            return None
        check_owner(self.root, folder)
        try:
            return verify(folder, self._known(folder), rehash=rehash or self.verify_always)
        except OSError as error:
            if isinstance(error, KernelHubError):
                raise
            raise StoreError(f"cannot read {folder}: {error.strerror or error}") from error

    def add(self, place: Place, write: Callable[[Path], None]) -> Verified:
        """The variant's folder, written by `write` into an empty folder unless another process was first.

        What was written is verified before it appears. Raises what `write` raises, `IntegrityError`, or `StoreError`
        where the store cannot be written; in each case nothing is left.
        """
        folder = self.path(place)
        with locked(self.root, folder):
            try:
                found = self.find(place)
            except (IntegrityError, InvalidMetadata):
                rename_aside(folder)
                found = None
            if found is None:
                self._appear(folder, write, lambda beside: verify(beside))
                found = self.find(place)
        if found is None:
            raise StoreError(f"{folder} vanished while it was written", hint="Is another process pruning the store?")
        return found

    def add_part(self, hub: str, repo: RepoId, commit: str, part: str, write: Callable[[Path], None]) -> Path:
        """The folder of what a repository brings beside its variants, written by `write` unless it is here as fetched."""
        folder = self._commit(hub, repo, commit) / part
        if self._is_whole(folder):  # before the lock: a store that cannot be written serves what it has
            return folder
        with locked(self.root, folder):
            if not self._is_whole(folder):
                if folder.is_dir():
                    rename_aside(folder)
                self._appear(folder, write, scan)
        return folder

    def _is_whole(self, folder: Path) -> bool:
        if not folder.is_dir():
            return False
        check_owner(self.root, folder)
        try:
            verify_tree(folder, self._known(folder))
        except (IntegrityError, OSError):
            return False
        return True

    def set_aside(self, place: Place) -> None:
        """Take a folder that does not verify out of the way; `prune` removes it."""
        folder = self.path(place)
        with locked(self.root, folder):
            if folder.is_dir():
                rename_aside(folder)

    def path(self, place: Place) -> Path:
        return self._commit(place.hub, place.repo, place.commit) / str(place.variant)

    def size(self, place: Place) -> int:
        """The bytes of a variant's files."""
        return sum(path.stat().st_size for path in self.path(place).rglob("*") if path.is_file())

    # What was found of kernels

    def verdict(self, kernel: str, name: str) -> dict[str, Any] | None:
        """What was kept under the name for the kernel with this digest; None where nothing was that can be read."""
        path = self._verdict(kernel, name)
        try:
            return _read_record(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            _log.warning("%s is no verdict, and not read: %s", path, error)
            return None

    def set_verdict(self, kernel: str, name: str, record: Mapping[str, Any]) -> None:
        """Keep what was found. Raises `StoreError` where the store cannot be written."""
        path = self._verdict(kernel, name)
        with locked(self.root, path.parent):
            write_json(path, record, must=True)

    def verdicts(self) -> Iterator[StoredVerdict]:
        """Every verdict in the store; a file that is none counts as one of a kernel that is not here any more."""
        for file in inside(self.root, "verdicts/*/[!.]*"):
            try:
                record = _read_record(file)
                found = StoredVerdict(file, str(record["name"]), Path(str(record["path"])), float(record["time"]))
            except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
                found = StoredVerdict(file, "", file / "gone", 0.0)
            yield found

    def prune_verdicts(self, selected: Callable[[StoredVerdict], bool]) -> Iterator[tuple[Path, int]]:
        """Remove the verdicts `selected`, those of kernels that are gone, and what was left behind."""
        for found in list(self.verdicts()):
            if not found.path.is_dir() or selected(found):
                with locked(self.root, found.file.parent):
                    yield found.file, remove(found.file)
        for left in inside(self.root, "verdicts/*/.*"):
            with locked(self.root, left.parent):
                yield left, remove(left)
        for folder in sorted((self.root / "verdicts").glob("*/")):
            if not any(folder.iterdir()):
                with locked(self.root, folder), suppress(OSError):  # somebody may be writing into it just now
                    folder.rmdir()

    # Keeping house

    def places(self) -> Iterator[Place]:
        """Every variant in the store."""
        for folder, repo in self._folders():
            variant = parse_variant(folder.name)
            if isinstance(variant, BuildVariant):
                yield Place(folder.parts[-4], repo, folder.parts[-2], variant)

    def verify_all(self) -> Iterator[tuple[Place, KernelHubError | None]]:
        """Each variant with what is wrong with it, every byte hashed."""
        for place in self.places():
            try:
                verify(self.path(place), self._known(self.path(place)), rehash=True)
                yield place, None
            except KernelHubError as error:
                yield place, error

    def prune(self, selected: Callable[[RepoId], bool]) -> Iterator[tuple[Path, int]]:
        """Remove what was left behind, and everything of the repositories `selected`; yields each folder and its bytes.

        A folder that is removed is renamed first: a reader sees all of it or nothing, whenever this is interrupted. What
        another process is writing stays. Raises `StoreError` where the store cannot be written.
        """
        for folder, repo in list(self._folders()):
            if selected(repo):
                with locked(self.root, folder):
                    if folder.is_dir():  # another process may prune too
                        rename_aside(folder)
                    _record(folder).unlink(missing_ok=True)
        for hub in _MADE_HERE:  # what did not compile is tried again
            for path in inside(self.root, f"kernels/{hub}/*--*/*/listing.json"):
                path.unlink(missing_ok=True)
        for left in inside(self.root, "build/*"):
            if left.name.endswith(".failed") or (left.name.startswith(".") and self._is_old(left)):
                yield left, remove(left)
        for pattern in _LEFT_BEHIND:
            for left in inside(self.root, pattern):
                with locked_unless_busy(self.root, target_of(left)) as is_left:
                    if is_left:
                        yield left, remove(left)

    def _is_old(self, work: Path) -> bool:
        """Whether a compiler's folder was left a day ago; one at work writes into it."""
        try:
            newest = max(path.lstat().st_mtime for path in (work, *work.rglob("*")))
        except OSError:  # it goes just now
            return False
        return time.time() - newest > 86_400.0

    def _folders(self) -> Iterator[tuple[Path, RepoId]]:
        """The folders of every commit, variants and source trees, with the repository they are of."""
        for folder in inside(self.root, "kernels/*/*--*/*/[!.]*/"):
            repo = _repo_of(folder.parts[-3])
            if repo and is_commit(folder.parts[-2]):
                yield folder, repo

    def refs(self) -> Iterator[tuple[str, RepoId, str, RefRecord]]:
        """Every ref that is remembered: hub, repository, ref, record."""
        for path in sorted((self.root / "kernels").glob("*/*--*/refs/[!.]*")):
            repo, ref = _repo_of(path.parts[-3]), unquote(path.name)
            record = self.ref(path.parts[-4], repo, ref) if repo else None
            if repo and record:
                yield path.parts[-4], repo, ref, record

    # Inside

    def _repo(self, hub: str, repo: RepoId) -> Path:
        return self.root / "kernels" / hub / f"{repo.org}--{repo.name}"

    def _commit(self, hub: str, repo: RepoId, commit: str) -> Path:
        return self._repo(hub, repo) / commit

    def _known(self, folder: Path) -> Known:
        raw = read_json(_record(folder))
        files, stamps = raw.get("files"), raw.get("stamps")
        if not isinstance(files, dict) or not isinstance(stamps, dict) or not _lists(stamps.values()):
            raise IntegrityError(f"{folder} has no record of what was fetched")
        return Known(files, {path: tuple(value) for path, value in stamps.items()})

    def _appear(self, folder: Path, write: Callable[[Path], None], check: Callable[[Path], object]) -> None:
        """Let `folder` appear whole: written beside its place, checked, recorded, renamed. Else nothing is left."""
        beside = beside_of(folder, "tmp")
        try:
            beside.mkdir(parents=True)
            write(beside)
            check(beside)
            make_read_only(beside)
            known = learn(beside)  # after the modes are set: that changes the times which stamps hold
            write_json(_record(folder), {"files": known.files, "stamps": known.stamps}, must=True)
            try:
                beside.rename(folder)
            except OSError:
                if not folder.is_dir():  # where files cannot be locked, another process may have been as fast
                    raise
        finally:
            remove_tree(beside)

    def _verdict(self, kernel: str, name: str) -> Path:
        return self.root / "verdicts" / hashlib.sha256(kernel.encode()).hexdigest()[:32] / f"{name}.json"


def _read_record(path: Path) -> dict[str, Any]:
    """A verdict's file. Raises `OSError`, `ValueError` or `RecursionError` for what is none."""
    with open_file(path) as file:
        data = file.read(MAX_VERDICT + 1)
    if len(data) > MAX_VERDICT:
        raise ValueError(f"it has more than {MAX_VERDICT:,} bytes")
    raw = json.loads(data)
    if not isinstance(raw, dict):
        raise ValueError("it is no object")
    return raw


def _list_path(key_id: str) -> str:
    from kernelhub.core.revocations import path_of

    return path_of(key_id)


def _lists(values: Iterable[object]) -> bool:
    return all(isinstance(value, list) for value in values)


def _repo_of(name: str) -> RepoId | None:
    """`"org--name"` -> org/name; None for a folder that is not ours."""
    org, _, repo = name.partition("--")
    try:
        return RepoId.parse(f"{org}/{repo}")
    except KernelHubError:
        return None


def _file_name(ref: str) -> str:
    """The name of a ref's file; names that are too long for a file system become a hash."""
    quoted = quote(ref, safe="")
    return quoted if len(quoted) <= 150 else "long-" + hashlib.sha256(ref.encode()).hexdigest()


def _seconds(value: object) -> float | None:
    """A time as our files have it; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        return None
    return float(value)


def _record(folder: Path) -> Path:
    """What was learnt of a folder lies beside it."""
    return folder.with_name(f"{folder.name}.json")
