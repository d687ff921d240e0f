"""The Hugging Face protocol's client: what it asks, what it checks, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub, Reply, Request, write_kernel

from kernelhub.core.refs import KernelRef, Pin, RepoId, Revision, Version
from kernelhub.core.trust import Origin
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelNotFound,
    RepositoryNotFound,
    StoreError,
)
from kernelhub.hub.patience import Patience
from kernelhub.hub.server import app
from kernelhub.hub.sources import huggingface
from kernelhub.hub.sources.base import Moved, NoProgress, Progress
from kernelhub.hub.sources.huggingface import HuggingFaceSource, read_redirect
from kernelhub.hub.sources.huggingface_cache import HuggingFaceCacheSource

REPO = RepoId("acme", "relu")
V1 = Version(1)
VARIANT = "torch-universal"
TREE = "/tree/"
RESOLVE = "/resolve/"


@pytest.fixture
def source(hub: LoopbackHub, kernels: Path) -> HuggingFaceSource:
    hub.app = app(kernels)
    return HuggingFaceSource(hub.url, lambda: "test-agent", lambda: None, Patience(sleep=lambda _: None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "arrived"
    path.mkdir()
    return path


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetch(source: Any, folder: Path, pin: Pin = V1, progress: Progress | None = None) -> str:
    commit: str = source.resolve(REPO, pin)
    details = source.listing(REPO, commit).variants[VARIANT]
    source.fetch(REPO, commit, VARIANT, details, folder, progress or NoProgress())
    return commit


class Counted:
    """A progress that keeps its sums."""

    def __init__(self) -> None:
        self.expected = self.arrived = 0

    def expect(self, size: int) -> None:
        self.expected += size

    def advance(self, size: int) -> None:
        assert size > 0
        self.arrived += size


# What is asked


def test_a_cold_load_asks_for_the_refs_two_trees_and_each_body(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path
) -> None:
    many = {f"part{number}/code{number}.py": b"# %d" % number for number in range(40)}
    there = write_kernel(kernels, files={**many, "empty.py": b""})
    write_kernel(kernels, variant="torch-cuda", files={"unwanted.py": b"#"})
    commit = fetch(source, folder)
    assert tree_of(folder) == tree_of(there)
    assert {request.method for request in hub.requests} == {"GET"}
    others = [target for target in hub.targets() if RESOLVE not in target]
    assert others == [
        "/api/kernels/acme/relu/refs",
        f"/api/kernels/acme/relu/tree/{commit}/build?recursive=false&expand=false",
        f"/api/kernels/acme/relu/tree/{commit}/build%2Ftorch-universal?recursive=true",
    ]
    bodies = hub.targets(RESOLVE)
    assert len(bodies) == len(set(bodies)) == len(tree_of(there)) - 1  # an empty file's hash says what is in it
    assert all(request.headers["user-agent"] == "test-agent" for request in hub.requests)


def test_a_commit_is_not_asked_for(hub: LoopbackHub, source: HuggingFaceSource) -> None:
    assert source.resolve(REPO, Revision("a" * 40)) == "a" * 40
    assert hub.requests == []


def test_follows_pages(hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path) -> None:
    there = write_kernel(kernels, files={f"{number}.py": b"#" for number in range(17)})
    hub.app = app(kernels, page=5)
    fetch(source, folder)
    assert tree_of(folder) == tree_of(there)
    assert len(hub.targets("universal?recursive=true")) == 5  # 20 files and a folder


def test_large_files_are_checked_by_their_lfs_hash(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path
) -> None:
    large = os.urandom(1_500_000)
    write_kernel(kernels, files={"native.abi3.so": large})
    progress = Counted()
    commit = source.resolve(REPO, Version(1))
    source.fetch(REPO, commit, VARIANT, {}, folder, progress)
    assert (folder / "native.abi3.so").read_bytes() == large
    assert progress.arrived == progress.expected == sum(map(len, tree_of(folder).values()))


def test_sends_the_token_with_every_request(hub: LoopbackHub, kernels: Path, folder: Path) -> None:
    hub.app = app(kernels)
    fetch(HuggingFaceSource(hub.url, lambda: "a", lambda: "secret"), folder)
    assert {request.headers.get("authorization") for request in hub.requests} == {"Bearer secret"}


def test_the_default_token_is_huggingface_hubs(
    hub: LoopbackHub, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.app = app(kernels)
    source = HuggingFaceSource(hub.url, lambda: "a")
    source.refs(REPO)
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    source.refs(REPO)
    assert [request.headers.get("authorization") for request in hub.requests] == [None, "Bearer from-the-environment"]


# What is found


def test_versions_branches_and_parts_of_commits(hub: LoopbackHub, source: HuggingFaceSource) -> None:
    refs = source.refs(REPO)
    assert set(refs) == {"main", "v1"}
    assert source.resolve(REPO, Revision("main")) == source.resolve(REPO, Version(1)) == refs["v1"]
    with pytest.raises(KernelNotFound, match="has no revision abc123"):
        source.resolve(REPO, Revision("abc123"))

    def answer(_: Request, reply: Reply) -> None:
        reply.status = 200
        reply.set_json({"id": str(REPO), "sha": "b" * 40})

    hub.break_with("/revision/abc123", answer)
    assert source.resolve(REPO, Revision("abc123")) == "b" * 40


def test_a_branch_comes_before_a_tag_of_its_name(hub: LoopbackHub, source: HuggingFaceSource) -> None:
    def add_tags(value: Any) -> Any:
        tags = [
            {"name": "v1", "ref": "refs/tags/v1", "targetCommit": "a" * 40},
            {"name": "release", "ref": "refs/tags/release", "targetCommit": "b" * 40},
            {"name": "../evil", "ref": "refs/tags/../evil", "targetCommit": "c" * 40},
        ]
        return {**value, "tags": tags}

    hub.rewrite("/refs", add_tags)
    refs = source.refs(REPO)
    assert set(refs) == {"main", "v1", "release"}
    assert refs["v1"] == refs["main"]


def test_a_missing_version_says_which_there_are(source: HuggingFaceSource) -> None:
    with pytest.raises(KernelNotFound, match=r"acme/relu has no version v7 on http[^\n]*\n  It has v1\.") as caught:
        source.resolve(REPO, Version(7))
    assert not isinstance(caught.value, RepositoryNotFound)


def test_a_missing_repository(source: HuggingFaceSource) -> None:
    for ask in (
        source.refs,
        lambda repo: source.resolve(repo, Version(1)),
        lambda repo: source.listing(repo, "a" * 40),
    ):
        with pytest.raises(RepositoryNotFound):
            ask(RepoId("acme", "nothing"))


def test_a_missing_commit(source: HuggingFaceSource) -> None:
    with pytest.raises(KernelNotFound, match="RevisionNotFound"):
        source.listing(REPO, "a" * 40)


def test_the_listing_has_every_folder(source: HuggingFaceSource, kernels: Path) -> None:
    for name in ("torch-cuda", "not-a-variant", "torch210-cxx11-cpu-x86_64-linux"):
        write_kernel(kernels, variant=name)
    (kernels / "acme/relu/build/a-file.txt").write_text("no folder")
    listing = source.listing(REPO, source.resolve(REPO, Version(1)))
    assert set(listing.variants) == {"torch-cuda", "not-a-variant", "torch210-cxx11-cpu-x86_64-linux", VARIANT}
    assert json.loads(json.dumps(listing.variants)) == listing.variants


@pytest.mark.parametrize("trusted", [True, False])
def test_the_hub_marks_publishers(hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, trusted: bool) -> None:
    hub.app = app(kernels, trusted=trusted)
    assert source.publisher_trusted(REPO) is trusted
    assert hub.targets() == ["/api/organizations/acme/overview"]


def test_publishers_without_a_mark(hub: LoopbackHub, source: HuggingFaceSource) -> None:
    assert source.publisher_trusted(RepoId("somebody", "relu")) is False
    hub.rewrite("/overview", lambda _: {"name": "acme"}, times=1)
    assert source.publisher_trusted(REPO) is None
    hub.rewrite("/overview", lambda _: {"trustedKernelPublisher": "yes"}, times=1)
    with pytest.raises(InvalidMetadata, match="trustedKernelPublisher"):
        source.publisher_trusted(REPO)


def test_names_keys_and_addresses(hub: LoopbackHub) -> None:
    def key(endpoint: str) -> str:
        source = HuggingFaceSource(endpoint, lambda: "a")
        assert source.origin is Origin.REMOTE
        assert source.name == endpoint.rstrip("/")
        return source.key

    assert key("https://huggingface.co") == key("https://huggingface.co/") == "huggingface.co"
    endpoints = [
        "http://huggingface.co",
        "https://huggingface.co/mirror",
        "https://hub.example:8443",
        "https://user:secret@hub.example:8443",
        "http://[::1]:80/../x",
        "https://..",
    ]
    keys = [key(endpoint) for endpoint in endpoints]
    assert len(set(keys)) == len(keys)
    for text in keys:
        assert not set(text) & set('/\\:*?"<>|@'), text
        assert not text.startswith("."), text
        assert "secret" not in text
    for wrong in ("", "huggingface.co", "ftp://hub.example", "/srv/hub"):
        with pytest.raises(InvalidReference, match="not the address of a hub"):
            key(wrong)


# Where a repository went


def _redirect(root: Path, text: str) -> None:
    (root / "acme/relu/kernel-status.toml").write_text(text)


def _moved(ask: Callable[[], object]) -> KernelRef:
    with pytest.raises(Moved) as caught:
        ask()
    return caught.value.destination


@pytest.mark.parametrize(
    ("revision", "pin"), [('revision = "main"', Revision("main")), ('revision = "v3"', Version(3)), ("", None)]
)
def test_a_commit_without_builds_may_redirect(
    source: HuggingFaceSource, kernels: Path, revision: str, pin: Pin | None
) -> None:
    (kernels / "acme/relu/build").rename(kernels / "acme/relu/old")
    _redirect(kernels, f'kind = "redirect"\ndestination = "other/relu2"\n{revision}\n')
    commit = source.resolve(REPO, Revision("main"))
    assert _moved(lambda: source.listing(REPO, commit)) == KernelRef(RepoId("other", "relu2"), pin)


def test_a_missing_version_may_be_elsewhere_and_stays_that_version(source: HuggingFaceSource, kernels: Path) -> None:
    _redirect(kernels, 'kind = "redirect"\ndestination = "other/relu2"\nrevision = "main"\n')
    moved = _moved(lambda: source.resolve(REPO, Version(5)))
    assert moved == KernelRef(RepoId("other", "relu2"), Version(5))


def test_builds_come_before_a_redirect(source: HuggingFaceSource, kernels: Path) -> None:
    _redirect(kernels, 'kind = "redirect"\ndestination = "other/relu2"\n')
    assert set(source.listing(REPO, source.resolve(REPO, Version(1))).variants) == {VARIANT}


def test_no_builds_and_no_redirect(source: HuggingFaceSource, kernels: Path) -> None:
    (kernels / "acme/relu/build").rename(kernels / "acme/relu/old")
    commit = source.resolve(REPO, Revision("main"))
    assert source.listing(REPO, commit).variants == {}


@pytest.mark.parametrize(
    "text",
    [
        "kind = ",
        'kind = "redirect"',
        'kind = "redirect"\ndestination = "../evil"',
        'kind = "redirect"\ndestination = "a/b"\nrevision = "../x"',
        'kind = "redirect"\ndestination = 3',
    ],
)
def test_malformed_redirects(text: str) -> None:
    with pytest.raises(InvalidMetadata, match="kernel-status.toml"):
        read_redirect(text.encode())


def test_other_kinds_of_status_are_no_redirect() -> None:
    assert read_redirect(b'kind = "deprecated"') is None


# Faults on the way


@pytest.mark.parametrize("where", ["/refs", "/build?", "universal?", RESOLVE])
@pytest.mark.parametrize("status", [429, 500])
def test_every_kind_of_request_is_retried(
    hub: LoopbackHub, source: HuggingFaceSource, folder: Path, where: str, status: int
) -> None:
    hub.fail(where, status, times=2, retry_after="1")
    fetch(source, folder)
    assert (folder / "metadata.json").is_file()


def test_the_overview_is_retried(hub: LoopbackHub, source: HuggingFaceSource) -> None:
    hub.fail("/overview", 500, times=2)
    assert source.publisher_trusted(REPO) is False


@pytest.mark.parametrize("where", ["/refs", "/build?", "universal?", RESOLVE])
def test_a_hub_that_keeps_failing_is_named(
    hub: LoopbackHub, source: HuggingFaceSource, folder: Path, where: str
) -> None:
    hub.fail(where, 500)
    with pytest.raises(HubUnavailable) as caught:
        fetch(source, folder)
    assert caught.value.status == 500
    assert source.name in str(caught.value)
    assert where in str(caught.value)


@pytest.mark.parametrize("where", ["/refs", "universal?", RESOLVE])
def test_a_hub_that_stalls(hub: LoopbackHub, kernels: Path, folder: Path, where: str) -> None:
    hub.app = app(kernels)
    hub.stall(where)
    impatient = Patience(read=0.1, total=0.3, backoff=0.01)
    with pytest.raises(HubUnavailable, match="ReadTimeout"):
        fetch(HuggingFaceSource(hub.url, lambda: "a", lambda: None, impatient), folder)


def test_a_cut_body_is_resumed(hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path) -> None:
    large = os.urandom(700_000)
    write_kernel(kernels, files={"large.bin": large})
    hub.cut("large.bin", after=300_000, times=1)
    progress = Counted()
    source.fetch(REPO, source.resolve(REPO, Version(1)), VARIANT, {}, folder, progress)
    assert (folder / "large.bin").read_bytes() == large
    first, second = [request for request in hub.requests if "large.bin" in request.target]
    assert "range" not in first.headers
    start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 300_000
    assert progress.arrived == progress.expected


def _from_the_beginning(reply: Reply, data: bytes) -> None:
    reply.status = 200  # and the content-range stays, which then means nothing
    reply.set_body(data)


def _at_another_place(reply: Reply, data: bytes) -> None:
    reply.headers["content-range"] = f"bytes 5-{len(data) - 1}/{len(data)}"
    reply.set_body(data[5:])


def _with_no_place(reply: Reply, data: bytes) -> None:
    del reply.headers["content-range"]


@pytest.mark.parametrize("resume", [_from_the_beginning, _at_another_place, _with_no_place])
def test_a_hub_that_does_not_resume(
    hub: LoopbackHub,
    source: HuggingFaceSource,
    kernels: Path,
    folder: Path,
    resume: Callable[[Reply, bytes], None],
) -> None:
    """It is noticed before a byte is written: the one retry for wrong bytes is not spent on it."""
    large = os.urandom(700_000)
    write_kernel(kernels, files={"large.bin": large})
    cuts = [200_000, 300_000]

    def answer(request: Request, reply: Reply) -> None:
        if "range" in request.headers:
            resume(reply, large)
        elif cuts:
            reply.cut = cuts.pop()

    hub.break_with("large.bin", answer)
    fetch(source, folder)
    assert (folder / "large.bin").read_bytes() == large


@pytest.mark.parametrize("resume", [_from_the_beginning, _at_another_place])
def test_a_hub_that_never_resumes_and_always_cuts(
    hub: LoopbackHub,
    source: HuggingFaceSource,
    kernels: Path,
    folder: Path,
    resume: Callable[[Reply, bytes], None],
) -> None:
    """Every attempt brings bytes, so no deadline ends this."""
    large = os.urandom(700_000)
    write_kernel(kernels, files={"large.bin": large})

    def answer(request: Request, reply: Reply) -> None:
        assert len(hub.targets("large.bin")) < 30
        if "range" in request.headers:
            resume(reply, large)
        reply.cut = 300_000

    hub.break_with("large.bin", answer)
    with pytest.raises(HubUnavailable, match="does not resume"):
        fetch(source, folder)
    assert len(hub.targets("large.bin")) < 15


@pytest.mark.parametrize("size", [300, 1_200_000])
def test_an_altered_body_is_fetched_again_once(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path, size: int
) -> None:
    data = os.urandom(size)
    write_kernel(kernels, files={"data.bin": data})
    hub.alter("data.bin", times=1)
    progress = Counted()
    fetch(source, folder, progress=progress)
    assert (folder / "data.bin").read_bytes() == data
    assert len(hub.targets("data.bin")) == 2
    assert progress.arrived == progress.expected  # no byte is counted twice


@pytest.mark.parametrize("size", [300, 1_200_000])
def test_a_body_that_stays_altered_is_an_error(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path, size: int
) -> None:
    write_kernel(kernels, files={"data.bin": os.urandom(size)})
    hub.alter("data.bin")
    with pytest.raises(IntegrityError, match="different: data.bin"):
        fetch(source, folder)
    assert len(hub.targets("data.bin")) == 2


def _with_size(change: int) -> Callable[[Any], Any]:
    return lambda rows: [
        {**row, "size": row["size"] + change} if row["path"].endswith("data.bin") else row for row in rows
    ]


@pytest.mark.parametrize("change", [-100, -1, 1, 100_000])
def test_a_listed_size_that_is_a_lie(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path, change: int
) -> None:
    write_kernel(kernels, files={"data.bin": os.urandom(1000)})
    hub.rewrite("universal?", _with_size(change))
    with pytest.raises(IntegrityError, match="different: data.bin"):
        fetch(source, folder)
    assert (folder / "data.bin").stat().st_size <= 1000 + change


def test_an_empty_file_has_the_hash_of_nothing(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path
) -> None:
    write_kernel(kernels, files={"data.bin": b"something"})
    hub.rewrite("universal?", _with_size(-9))
    with pytest.raises(IntegrityError, match="different: data.bin"):
        fetch(source, folder)


@pytest.mark.parametrize("length", ["5", "5000"])
def test_a_content_length_that_is_a_lie(
    hub: LoopbackHub, source: HuggingFaceSource, kernels: Path, folder: Path, length: str
) -> None:
    write_kernel(kernels, files={"data.bin": os.urandom(1000)})
    hub.break_with("data.bin", lambda _, reply: reply.headers.update({"content-length": length}))
    with pytest.raises((HubUnavailable, IntegrityError)):
        fetch(source, folder)


def test_an_etag_that_is_a_path_changes_nothing(
    hub: LoopbackHub, source: HuggingFaceSource, folder: Path, kernels: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    hub.break_with(RESOLVE, lambda _, reply: reply.headers.update({"etag": '"../../x"', "x-linked-etag": '"/abs"'}))
    fetch(source, folder)
    assert tree_of(folder) == tree_of(kernels / "acme/relu/build" / VARIANT)
    assert all(path.is_relative_to(folder) for path in set(tmp_path.rglob("*")) - before)


# What a hub must not list


def _row(path: Any, **values: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": 4, "oid": hashlib.sha1(b"blob 4\0evil").hexdigest(), **values}


HERE = f"build/{VARIANT}/"

HOSTILE = {
    "parent": [_row("../evil")],
    "parent below the variant": [_row(HERE + "../evil")],
    "parent further below": [_row(HERE + "a/../../../../evil")],
    "backslash": [_row("..\\x")],
    "backslash below the variant": [_row(HERE + "..\\x")],
    "absolute": [_row("/tmp/evil")],
    "absolute below the variant": [_row(HERE + "/tmp/evil")],
    "drive": [_row(HERE + "C:evil")],
    "another variant": [_row("build/torch-cuda/evil.py")],
    "the variant itself": [_row(HERE)],
    "a prefix of its name": [_row(f"build/{VARIANT}2/evil.py")],
    "control character": [_row(HERE + "evil\n.py")],
    "reserved": [_row(HERE + "con.py")],
    "directory that leaves": [{"type": "directory", "path": HERE + "../x", "oid": ""}],
    "two cases": [_row(HERE + "Code.py"), _row(HERE + "code.py")],
    "two cases of a folder": [_row(HERE + "A/x.py"), _row(HERE + "a/y.py")],
    "two normal forms": [_row(HERE + "\u00e9.py"), _row(HERE + "e\u0301.py")],
    "twice": [_row(HERE + "x.py"), _row(HERE + "x.py")],
    "file and folder": [_row(HERE + "x"), _row(HERE + "x/y.py")],
    "link": [_row(HERE + "x.py", type="symlink")],
    "no path": [{"type": "file", "size": 4, "oid": "0" * 40}],
    "path of a number": [_row(7)],
    "no hash": [_row(HERE + "x.py", oid=None)],
    "hash that is a path": [_row(HERE + "x.py", oid="../../x")],
    "lfs hash of git's length": [_row(HERE + "x.py", lfs={"oid": "0" * 40, "size": 4})],
    "negative size": [_row(HERE + "x.py", size=-1)],
    "size of text": [_row(HERE + "x.py", size="4")],
    "size that is true": [_row(HERE + "x.py", size=True)],
    "entry that is a list": [["x"]],
}


@pytest.mark.parametrize("rows", HOSTILE.values(), ids=list(HOSTILE))
def test_a_tree_with_one_bad_entry_is_refused_whole(
    hub: LoopbackHub, source: HuggingFaceSource, tmp_path: Path, folder: Path, rows: list[Any]
) -> None:
    before = set(tmp_path.rglob("*"))
    hub.rewrite("universal?", lambda value: [*value, *rows])
    with pytest.raises((InvalidMetadata, IntegrityError)):
        fetch(source, folder)
    assert hub.targets(RESOLVE) == []
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["evil.pyc", "__pycache__/evil.cpython-311.pyc", "a/__PYCACHE__/x", "x.PYO"])
def test_bytecode_is_refused_and_named(hub: LoopbackHub, source: HuggingFaceSource, folder: Path, path: str) -> None:
    hub.rewrite("universal?", lambda value: [*value, _row(HERE + path)])
    with pytest.raises(IntegrityError) as caught:
        fetch(source, folder)
    assert [str(violation) for violation in caught.value.violations] == [f"bytecode: {path}"]
    assert hub.targets(RESOLVE) == []
    assert tree_of(folder) == {}


@pytest.mark.parametrize("commit", ["../../evil", "/abs", "main", "A" * 40, "a" * 41, "", None, 7])
def test_a_commit_is_40_hex_digits(hub: LoopbackHub, source: HuggingFaceSource, commit: Any) -> None:
    def change(value: Any) -> Any:
        return {**value, "branches": [{**row, "targetCommit": commit} for row in value["branches"]]}

    hub.rewrite("/refs", change)
    with pytest.raises(InvalidMetadata, match="40 hex digits"):
        source.resolve(REPO, Version(1))


@pytest.mark.parametrize("value", [[], {}, {"branches": 3}, {"branches": [3], "tags": []}, None, {"branches": [{}]}])
def test_malformed_refs(hub: LoopbackHub, source: HuggingFaceSource, value: Any) -> None:
    hub.rewrite("/refs", lambda _: value)
    with pytest.raises(InvalidMetadata, match="/refs"):
        source.refs(REPO)


@pytest.mark.parametrize("value", [{}, None, [3], [{"type": "directory"}], [{"type": "directory", "path": "other/x"}]])
def test_malformed_listings(hub: LoopbackHub, source: HuggingFaceSource, value: Any) -> None:
    hub.rewrite("/build?", lambda _: value)
    with pytest.raises(InvalidMetadata):
        source.listing(REPO, source.resolve(REPO, Version(1)))


def test_pages_that_never_end(hub: LoopbackHub, source: HuggingFaceSource, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = source.resolve(REPO, Version(1))

    pages = iter(range(1_000_000))
    folder = f"{hub.url}/api/kernels/acme/relu/tree/{commit}/build"

    def again(_: Request, reply: Reply) -> None:
        reply.headers["link"] = f'<{folder}?recursive=false>; rel="next"'

    def another(_: Request, reply: Reply) -> None:
        reply.headers["link"] = f'<{folder}?recursive=false&cursor={next(pages)}>; rel="next"'
        reply.set_json([{"type": "directory", "path": "build/torch-cpu", "oid": ""}])

    def gone(_: Request, reply: Reply) -> None:
        reply.headers["link"] = f'<{hub.url}/api/nothing>; rel="next"'

    hub.break_with("/build?", gone)
    with pytest.raises(InvalidMetadata, match="a page that is not there"):
        source.listing(REPO, commit)
    hub.faults.clear()
    hub.requests.clear()
    hub.break_with("/build?", again)
    with pytest.raises(InvalidMetadata, match="one of them again"):
        source.listing(REPO, commit)
    assert len(hub.targets("/build?")) == 2
    hub.faults.clear()
    hub.break_with("/build?", another)
    with pytest.raises(InvalidMetadata, match="more than 200 pages"):
        source.listing(REPO, commit)
    monkeypatch.setattr("kernelhub.hub.sources.huggingface.MAX_ENTRIES", 20)
    with pytest.raises(InvalidMetadata, match="more than 20 entries"):
        source.listing(REPO, commit)
    hub.faults.clear()

    def empty(request: Request, reply: Reply) -> None:
        again(request, reply)
        reply.set_json([])

    hub.break_with("/build?", empty)
    with pytest.raises(InvalidMetadata, match="an empty page"):
        source.listing(REPO, commit)


def test_the_folders_that_paths_name_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing has a row for each; one that leaves them out could name 500 with each file."""
    path = "build/v/" + "a/" * 9 + "b.py"
    entry = huggingface._Entry(path, "0" * 40, huggingface.RemoteFile(path, 1, "sha1", "0" * 40))
    monkeypatch.setattr(huggingface, "MAX_ENTRIES", 9)
    assert len(huggingface._plan(iter([entry]), "build/v/")) == 1
    monkeypatch.setattr(huggingface, "MAX_ENTRIES", 8)
    with pytest.raises(InvalidMetadata, match="more than 8 folders"):
        huggingface._plan(iter([entry]), "build/v/")


def test_a_disk_that_refuses(source: HuggingFaceSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        fetch(source, tmp_path / "file" / "folder")


# What another tool left


def test_the_default_cache_is_huggingface_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert HuggingFaceCacheSource() == HuggingFaceCacheSource(tmp_path)


@pytest.fixture
def cached(hub: LoopbackHub, kernels: Path, tmp_path: Path) -> HuggingFaceCacheSource:
    """A Hugging Face cache with the repository at `main`, filled by huggingface_hub."""
    from huggingface_hub import snapshot_download

    write_kernel(kernels, files={"native.abi3.so": os.urandom(1_100_000)})
    hub.app = app(kernels)
    root = tmp_path / "hf"
    snapshot_download(str(REPO), repo_type="kernel", revision="main", endpoint=hub.url, cache_dir=root)
    hub.reset()
    return HuggingFaceCacheSource(root)


def test_the_cache_serves_without_a_request(
    hub: LoopbackHub, cached: HuggingFaceCacheSource, kernels: Path, folder: Path
) -> None:
    commit = fetch(cached, folder, Revision("main"))
    assert tree_of(folder) == tree_of(kernels / "acme/relu/build" / VARIANT)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert cached.resolve(REPO, Revision(commit)) == commit
    assert cached.refs(REPO) == {"main": commit}
    assert cached.origin is Origin.CACHE
    assert cached.publisher_trusted(REPO) is None
    assert hub.requests == []


def test_a_version_that_the_cache_has_no_ref_of(cached: HuggingFaceCacheSource) -> None:
    assert cached.resolve(REPO, Version(1)) == cached.resolve(REPO, Revision("main"))
    with pytest.raises(KernelNotFound, match="but not v2"):
        cached.resolve(REPO, Version(2))


def test_what_the_cache_does_not_have(cached: HuggingFaceCacheSource) -> None:
    with pytest.raises(RepositoryNotFound):
        cached.resolve(RepoId("acme", "other"), Version(1))
    with pytest.raises(KernelNotFound):
        cached.resolve(REPO, Revision("b" * 40))
    with pytest.raises(KernelNotFound):
        cached.listing(REPO, "b" * 40)


def _in_cache(cached: HuggingFaceCacheSource, name: str) -> Path:
    (path,) = cached.root.glob(f"*/snapshots/*/build/{VARIANT}/{name}")
    return path


@pytest.mark.parametrize("name", ["__init__.py", "native.abi3.so"])
def test_an_altered_file_in_the_cache(cached: HuggingFaceCacheSource, folder: Path, name: str) -> None:
    blob = _in_cache(cached, name).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=f"different: {name}"):
        fetch(cached, folder, Revision("main"))


def _link_to_file(cached: HuggingFaceCacheSource, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    path = _in_cache(cached, "__init__.py")
    path.unlink()
    path.symlink_to(tmp_path / "secret")


def _link_to_folder(cached: HuggingFaceCacheSource, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (_in_cache(cached, "__init__.py").parent / "sub").symlink_to(tmp_path / "secrets")


def _bytecode(cached: HuggingFaceCacheSource, tmp_path: Path) -> None:
    (_in_cache(cached, "__init__.py").parent / "x.pyc").write_bytes(b"")


def _dangling(cached: HuggingFaceCacheSource, tmp_path: Path) -> None:
    _in_cache(cached, "__init__.py").resolve().unlink()


def _circle(cached: HuggingFaceCacheSource, tmp_path: Path) -> None:
    path = _in_cache(cached, "__init__.py")
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("damage", [_link_to_file, _link_to_folder, _bytecode, _dangling, _circle])
def test_a_cache_that_leads_elsewhere(
    cached: HuggingFaceCacheSource,
    tmp_path: Path,
    folder: Path,
    damage: Callable[[HuggingFaceCacheSource, Path], None],
) -> None:
    damage(cached, tmp_path)
    with pytest.raises(IntegrityError):
        fetch(cached, folder, Revision("main"))
    assert tree_of(folder) == {}


def test_a_ref_in_the_cache_that_is_a_path(cached: HuggingFaceCacheSource) -> None:
    (cached.root / "kernels--acme--relu/refs/main").write_text("../../evil")
    with pytest.raises(InvalidMetadata, match="40 hex digits"):
        cached.resolve(REPO, Revision("main"))
