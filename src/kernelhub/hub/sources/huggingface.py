"""The Hugging Face Hub, and servers that speak its protocol.

A cold load of a variant with N files sends: the refs, the tree of `build`, the tree of the one variant (more pages for
every 1,000 entries), and N bodies, each checked against the size and hash that the tree gave. Trust asks for the
organisation's overview. Nothing asks HEAD, lists the whole repository, or uses an ETag.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kernelhub.core.metadata import MAX_BYTES as MAX_METADATA
from kernelhub.core.paths import Tree, clashing, is_bytecode, safe_path
from kernelhub.core.refs import KernelRef, Pin, RepoId, Revision, Version, is_commit, is_revision, parse_pin
from kernelhub.core.trust import Origin
from kernelhub.errors import (
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelNotFound,
    RepositoryNotFound,
    Violation,
)
from kernelhub.hub.addresses import Address, endpoint_address
from kernelhub.hub.disk import writing
from kernelhub.hub.http import EntryNotFound, HttpClient
from kernelhub.hub.patience import Patience
from kernelhub.hub.sources.base import BENCHMARKS, SOURCE, Listing, Moved, NoProgress, Progress
from kernelhub.hub.transfer import Download, RemoteFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# More files than any kernel has; a hub that lists more is broken or hostile.
MAX_ENTRIES = 100_000

# Pages of one tree. Hubs give 1,000 entries in each.
MAX_PAGES = 200

# Bodies in flight. 500 small files on loopback, two busy cores: 2.4 s with 2, 1.6 s with 4, 1.0 s with 8, 1.2 s with 16.
CONNECTIONS = 8

_REDIRECT_FILE = "kernel-status.toml"
_REDIRECT_LIMIT = 64 * 1024
_HASHES = {"sha1": re.compile(r"[0-9a-f]{40}", re.ASCII), "sha256": re.compile(r"[0-9a-f]{64}", re.ASCII)}


def _token() -> str | None:
    """The token that huggingface_hub has: of the environment, or of `hf auth login`."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


@dataclass(frozen=True)
class HuggingFaceSource:
    """The hub at `endpoint`, such as `https://huggingface.co`.

    `user_agent` and `token` (default: huggingface_hub's own) are asked when requests are sent.
    """

    endpoint: str
    user_agent: Callable[[], str]
    token: Callable[[], str | None] | None = None
    patience: Patience = field(default_factory=Patience)
    connections: int = CONNECTIONS
    address: Address = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "endpoint", self.endpoint.rstrip("/"))
        object.__setattr__(self, "address", endpoint_address(self.endpoint))

    @property
    def name(self) -> str:
        return self.endpoint

    @property
    def key(self) -> str:
        return self.address.key

    @property
    def origin(self) -> Origin:
        return Origin.REMOTE

    @property
    def _http(self) -> HttpClient:
        return HttpClient(self.name, self.endpoint, self.user_agent, self.token or _token, self.patience)

    def check(self) -> None:
        """Nothing to ask: the protocol has no versions of its own."""

    def resolve(self, repo: RepoId, pin: Pin) -> str:
        """The commit of a version or revision; a full commit is not asked for.

        A repository without the version may say on `main` where it went: then `Moved`, with the pin that was asked for,
        because a version is a promise about the API that the new place's other branches do not make.
        """
        if isinstance(pin, Revision) and pin.commit:
            return pin.commit
        refs = self.refs(repo)
        if pin.ref in refs:
            return refs[pin.ref]
        if isinstance(pin, Revision):
            try:
                return self._revision(repo, pin)
            except RepositoryNotFound:
                raise
            except KernelNotFound:
                pass  # the error below says which refs there are
        if "main" in refs and (destination := self._redirect(repo, refs["main"])):
            raise Moved(KernelRef(destination.repo, pin))
        kind = "version" if isinstance(pin, Version) else "revision"
        have = sorted(name for name in refs if isinstance(pin, Revision) or name != "main")
        raise KernelNotFound(
            f"{repo} has no {kind} {pin} on {self.name}", hint=f"It has {', '.join(have[:30]) or 'none'}."
        )

    def refs(self, repo: RepoId) -> Mapping[str, str]:
        """Branches and tags with their commits; of a branch and a tag of one name, the branch."""
        target = f"{_api(repo)}/refs"
        value, _ = self._http.get_json(target, absent=RepositoryNotFound)
        found: dict[str, str] = {}
        for kind in ("tags", "branches"):
            rows = value.get(kind) if isinstance(value, dict) else None
            if not isinstance(rows, list):
                raise self._malformed(target, f"expected a list of {kind}")
            for row in rows:
                name = row.get("name") if isinstance(row, dict) else None
                if not isinstance(name, str):
                    raise self._malformed(target, f"expected a name and a targetCommit in {kind}")
                if is_revision(name):
                    found[name] = self._commit(row.get("targetCommit"), target)
        return found

    def listing(self, repo: RepoId, commit: str) -> Listing:
        """The folders under `build`. Raises `Moved` where there are none and the repository says where it went.

        The redirect's own `revision` is followed as it is written; where it has none, `Moved` has no pin and the
        caller keeps the one it was asked for.
        """
        variants: dict[str, Mapping[str, Any]] = {}
        try:
            for entry in self._tree(f"{_api(repo)}/tree/{quote(commit, safe='')}/build?recursive=false&expand=false"):
                if entry.file is None:
                    name = _below(entry.path, "build/")
                    variants[name] = {"oid": entry.oid} if entry.oid else {}
        except EntryNotFound:
            variants = {}
        if not variants and (destination := self._redirect(repo, commit)):
            raise Moved(destination)
        return Listing(variants, {SOURCE: {}, BENCHMARKS: {}})  # whether it has them is asked when they are wanted

    def metadata(self, repo: RepoId, commit: str, variant: str, details: Mapping[str, Any]) -> bytes | None:
        """The file, checked against the hash that the tree has for it."""
        prefix, name = f"build/{variant}/", "metadata.json"
        tree = f"{_api(repo)}/tree/{quote(commit, safe='')}/{quote(prefix[:-1], safe='')}?recursive=false&expand=false"
        file = next((entry.file for entry in self._tree(tree) if entry.path == prefix + name), None)
        if file is None:
            raise InvalidMetadata(f"{variant} has no {name}", hint="Every build variant of a kernel needs one.")
        if file.size > MAX_METADATA:
            raise InvalidMetadata(f"{name} has {file.size:,} bytes; the most is {MAX_METADATA:,}")
        with tempfile.TemporaryDirectory(prefix="kernelhub-metadata-") as folder:
            self._download(repo, commit, prefix, [replace(file, path=name)], Path(folder), NoProgress())
            return Path(folder, name).read_bytes()

    def publisher_trusted(self, repo: RepoId) -> bool | None:
        """The hub's mark for the organisation; False for a user's account, which hubs do not mark."""
        target = f"/api/organizations/{repo.org}/overview"
        try:
            value, _ = self._http.get_json(target)
        except KernelNotFound:
            return False
        mark = value.get("trustedKernelPublisher") if isinstance(value, dict) else None
        if mark is not None and not isinstance(mark, bool):
            raise self._malformed(target, "expected trustedKernelPublisher to be true or false")
        return mark

    def revocations(self, key_id: str) -> bytes | None:
        return None

    def fetch(
        self,
        repo: RepoId,
        commit: str,
        variant: str,
        details: Mapping[str, Any],
        folder: Path,
        progress: Progress,
    ) -> None:
        """Write the variant's files, several at once. Its whole tree is checked before the first is asked for."""
        prefix = f"build/{variant}/"
        tree = f"{_api(repo)}/tree/{quote(commit, safe='')}/{quote(prefix[:-1], safe='')}?recursive=true"
        self._download(repo, commit, prefix, _plan(self._tree(tree), prefix), folder, progress)

    def fetch_part(
        self, repo: RepoId, commit: str, part: str, details: Mapping[str, Any], folder: Path, progress: Progress
    ) -> None:
        """Write the source, all of the repository but its builds where there is a `build.toml`, or its benchmarks."""
        tree = f"{_api(repo)}/tree/{quote(commit, safe='')}"
        if part == SOURCE:
            prefix, entries = "", self._tree(f"{tree}?recursive=true")
            files = _plan((entry for entry in entries if not f"{entry.path}/".startswith("build/")), prefix)
            if all(file.path != "build.toml" for file in files):
                raise KernelNotFound(f"{repo} has no source to build it from: there is no build.toml")
        else:
            prefix = f"{part}/"
            try:
                files = _plan(self._tree(f"{tree}/{part}?recursive=true"), prefix)
            except EntryNotFound:
                raise KernelNotFound(f"{repo} has no {part}") from None
        self._download(repo, commit, prefix, files, folder, progress)

    def _download(
        self, repo: RepoId, commit: str, prefix: str, files: list[RemoteFile], folder: Path, progress: Progress
    ) -> None:
        progress.expect(sum(file.size for file in files))
        http = self._http
        headers, report = http.headers(), _locked(progress.advance)
        base = f"/kernels/{repo}/resolve/{quote(commit, safe='')}/"
        with writing(folder):
            for parent in {(folder / file.path).parent for file in files}:
                parent.mkdir(parents=True, exist_ok=True)
        downloads = [
            Download(http, base + quote(prefix + file.path), headers, file, folder / file.path, report)
            for file in sorted(files, key=lambda file: -file.size)  # the largest decides how long all take
        ]
        http.run_all([download.run for download in downloads], workers=self.connections)

    def locate(self, repo: RepoId, variant: str) -> Path | None:
        return None

    def _revision(self, repo: RepoId, revision: Revision) -> str:
        """What the hub makes of a revision that is no branch or tag: part of a commit, a pull request's ref."""
        target = f"{_api(repo)}/revision/{quote(revision.ref, safe='')}"
        value, _ = self._http.get_json(target)
        return self._commit(value.get("sha") if isinstance(value, dict) else None, target)

    def _redirect(self, repo: RepoId, commit: str) -> KernelRef | None:
        """Where the repository says at this commit that it went, if it does."""
        try:
            answer = self._http.get(f"/kernels/{repo}/resolve/{commit}/{_REDIRECT_FILE}", limit=_REDIRECT_LIMIT)
        except KernelNotFound:
            return None
        return read_redirect(answer.body)

    def _tree(self, target: str) -> Iterator[_Entry]:
        """The entries of a tree, over all pages."""
        http, page, count = self._http, target, 0
        seen: set[str] = set()
        while True:
            seen.add(page)
            try:
                value, next_page = http.get_json(page)
            except EntryNotFound as error:
                if page == target:
                    raise
                raise self._malformed(target, "a page that is not there") from error
            if not isinstance(value, list):
                raise self._malformed(target, f"expected a list, got {type(value).__name__}")
            count += len(value)
            if count > MAX_ENTRIES or (next_page and not value):
                raise self._malformed(target, f"more than {MAX_ENTRIES:,} entries" if value else "an empty page")
            for item in value:
                yield self._entry(item, target)
            if not next_page:
                return
            if next_page in seen or len(seen) >= MAX_PAGES:
                raise self._malformed(target, f"more than {MAX_PAGES} pages, or one of them again")
            page = next_page

    def _entry(self, item: Any, target: str) -> _Entry:
        if not isinstance(item, dict) or not isinstance(item.get("path"), str):
            raise self._malformed(target, "an entry without a path")
        kind, oid, size = item.get("type"), item.get("oid"), item.get("size")
        algorithm = "sha1"
        if isinstance(lfs := item.get("lfs"), dict):
            algorithm, oid, size = "sha256", lfs.get("oid"), lfs.get("size")
        if kind == "directory":
            return _Entry(item["path"], oid if isinstance(oid, str) else "")
        if kind != "file":
            raise self._malformed(target, f"{item['path']!r} is neither a file nor a directory")
        if not isinstance(oid, str) or not _HASHES[algorithm].fullmatch(oid):
            raise self._malformed(target, f"{item['path']!r}: expected a {algorithm} hash, got {oid!r}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise self._malformed(target, f"{item['path']!r}: expected a size, got {size!r}")
        return _Entry(item["path"], oid, RemoteFile(item["path"], size, algorithm, oid))

    def _commit(self, value: Any, target: str) -> str:
        if not isinstance(value, str) or not is_commit(value):
            raise self._malformed(target, f"expected a commit of 40 hex digits, got {value!r:.100}")
        return value

    def _malformed(self, target: str, fact: str) -> InvalidMetadata:
        return InvalidMetadata(f"{self.name}: GET {target}: {fact}", hint="Is the address that of a hub?")


@dataclass(frozen=True)
class _Entry:
    """A row of a tree: a file, or a directory (`file` is None). The file's path is the row's, not a safe one yet."""

    path: str
    oid: str
    file: RemoteFile | None = None


def read_redirect(data: bytes) -> KernelRef | None:
    """Where a `kernel-status.toml` sends its readers; None where it says something else. Raises `InvalidMetadata`."""
    try:
        value = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(f"{_REDIRECT_FILE} is not TOML: {error}") from error
    if value.get("kind") != "redirect":
        return None
    destination, revision = value.get("destination"), value.get("revision")
    try:
        pin = None if revision is None else parse_pin(str(revision))
        return KernelRef(RepoId.parse(str(destination)), pin)
    except InvalidReference as error:
        raise InvalidMetadata(f"{_REDIRECT_FILE}: {error.message}") from error


def _plan(entries: Iterator[_Entry], prefix: str) -> list[RemoteFile]:
    """The files to fetch, with paths relative to the variant. Raises for a tree of which any entry is unfit."""
    files: list[RemoteFile] = []
    violations, tree = [], Tree()
    for entry in entries:
        if entry.file is None and entry.path == prefix[:-1]:
            continue
        path = safe_path(_below(entry.path, prefix))
        if is_bytecode(path):
            violations.append(Violation("bytecode", path))
        if (there := tree.clash(path, folder=entry.file is None)) is not None:
            raise InvalidMetadata(f"{prefix[:-1]}: {clashing(path, there)}")
        if tree.folders > MAX_ENTRIES:
            raise InvalidMetadata(f"{prefix[:-1]}: more than {MAX_ENTRIES:,} folders")
        if entry.file is not None:
            files.append(replace(entry.file, path=path))
    if violations:
        raise IntegrityError(
            f"{prefix[:-1]} contains compiled Python, which nobody can read",
            violations,
            hint="The kernel's publisher has to remove it.",
        )
    return files


def _api(repo: RepoId) -> str:
    return f"/api/kernels/{repo}"


def _below(path: str, prefix: str) -> str:
    if not path.startswith(prefix):
        raise InvalidMetadata(f"the hub lists {path!r} under {prefix[:-1]!r}")
    return path[len(prefix) :]


def _locked(report: Callable[[int], None]) -> Callable[[int], None]:
    """`report`, called by one thread at a time."""
    lock = threading.Lock()

    def locked(size: int) -> None:
        with lock:
            report(size)

    return locked
