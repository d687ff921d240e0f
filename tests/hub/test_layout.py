from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from layout_fixtures import AGENT, EPOCH, REPO, Bucket, Web, agent, metadata, repository, s3_bucket, serving, write

from kernelhub.core.canonical import canonical_json, sha256_hex
from kernelhub.core.manifest import ManifestDocument
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.core.trust import Origin
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelHubError,
    KernelNotFound,
    MissingDependency,
    RepositoryNotFound,
    Violation,
    Yanked,
)
from kernelhub.hub.archive import pack
from kernelhub.hub.patience import Patience
from kernelhub.hub.publish import publish, yank
from kernelhub.hub.remote import open_remote
from kernelhub.hub.sources.base import NoProgress, Source
from kernelhub.hub.sources.layout import LayoutSource, blob_path

V1 = Version(1)


@dataclass
class Counted:
    expected: list[int] = field(default_factory=list)
    came: list[int] = field(default_factory=list)

    def expect(self, size: int) -> None:
        self.expected.append(size)

    def advance(self, size: int) -> None:
        self.came.append(size)


@dataclass
class Waits:
    """Stands for time: nobody waits, and how long they would have is written down."""

    waited: list[float] = field(default_factory=list)

    def patience(self, **changes: Any) -> Patience:
        values = {"sleep": self.waited.append, "clock": lambda: 0.0, "now": lambda: 0.0, "random": lambda: 1.0}
        return Patience(**{**values, **changes})


def source(url: str, patience: Patience | None = None) -> LayoutSource:
    found = LayoutSource(url, agent)
    if patience is not None:
        found.__dict__["files"] = open_remote(url, agent, patience)
    return found


def load(hub: Source, folder: Path, progress: Any = None) -> dict[str, bytes]:
    """A cold load: the commit, what is there, one variant's files."""
    commit = hub.resolve(REPO, V1)
    listing = hub.listing(REPO, commit)
    # The store keeps listings as JSON.
    details = json.loads(json.dumps(listing.variants["torch-cpu"]))
    return fetch(hub, details, folder, progress)


def fetch(hub: Source, details: Any, folder: Path, progress: Any = None) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    hub.fetch(REPO, "0" * 40, "torch-cpu", details, folder, progress or NoProgress())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A hub with one kernel of 30 files."""
    publish(repository(tmp_path / "repo", files=27), str(tmp_path / "hub"), REPO, epoch=EPOCH)
    return tmp_path / "hub"


@pytest.fixture
def web(hub: Path) -> Iterator[Web]:
    with serving(hub) as server:
        yield server


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with s3_bucket(monkeypatch) as found:
        yield found


def in_bucket(hub: Path, bucket: Bucket) -> str:
    """The hub's files, copied into a bucket by another client than ours."""
    name, _, prefix = bucket.url.removeprefix("s3://").partition("/")
    for path in hub.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(hub).as_posix()}"
            bucket.client.put_object(Bucket=name, Key=key, Body=path.read_bytes())
    return bucket.url


@pytest.fixture(params=["path", "file", "http", "s3"])
def url(request: pytest.FixtureRequest, hub: Path) -> str:
    if request.param == "path":
        return str(hub)
    if request.param == "file":
        return hub.as_uri()
    if request.param == "http":
        return str(request.getfixturevalue("web").url)
    return in_bucket(hub, request.getfixturevalue("bucket"))


def test_the_same_hub_everywhere(url: str, hub: Path, tmp_path: Path) -> None:
    found, progress = source(url), Counted()
    found.check()
    files = load(found, tmp_path / "out", progress)
    assert len(files) == 30
    assert files["__init__.py"] == b"TEXT = 'one'\n"
    size = found.listing(REPO, found.resolve(REPO, V1)).variants["torch-cpu"]["size"]
    assert progress.expected == [size]
    assert sum(progress.came) == size
    assert found.refs(REPO) == {"v1": found.resolve(REPO, V1)}
    commit = found.resolve(REPO, V1)
    assert found.resolve(REPO, Revision(commit)) == commit
    assert found.origin is (Origin.FOLDER if str(hub) in found.name else Origin.REMOTE)
    assert found.publisher_trusted(REPO) is None
    assert found.locate(REPO, "torch-cpu") is None


def test_what_is_not_there(url: str) -> None:
    found = source(url)
    with pytest.raises(KernelNotFound, match="not v2\n  It has v1") as caught:
        found.resolve(REPO, Version(2))
    assert not isinstance(caught.value, RepositoryNotFound)
    with pytest.raises(KernelNotFound, match="v1") as caught:
        found.resolve(REPO, Revision("0" * 40))
    assert not isinstance(caught.value, RepositoryNotFound)
    for job in (lambda: found.resolve(RepoId("org", "other"), V1), lambda: found.refs(RepoId("org", "other"))):
        with pytest.raises(RepositoryNotFound, match="org/other"):
            job()


def test_a_yanked_version_is_refused_with_its_reason(hub: Path) -> None:
    found = source(str(hub))
    commit = found.resolve(REPO, V1)
    yank(str(hub), REPO, "v1", "wrong results\non odd widths")
    with pytest.raises(Yanked, match="withdrawn.*wrong results on odd widths") as caught:
        found.resolve(REPO, V1)
    assert isinstance(caught.value, KernelNotFound)
    assert (caught.value.commit, caught.value.reason) == (commit, "wrong results on odd widths")
    assert found.resolve(REPO, Revision(commit)) == commit
    assert found.refs(REPO) == {"v1": commit}
    assert found.ref(REPO, "v1").yanked == "wrong results on odd widths"


def test_a_cold_load_asks_three_times(web: Web, tmp_path: Path) -> None:
    found = source(web.url)
    load(found, tmp_path / "out")
    commit = found.resolve(REPO, V1)
    archive = found.listing(REPO, commit).variants["torch-cpu"]["archive"]
    assert [path for path, _ in web.requests[:3]] == [
        "/org/relu/refs/v1",
        f"/org/relu/commits/{commit}.json",
        f"/{blob_path(archive)}",
    ]
    assert len(web.requests) == 5  # the two of the lines above
    assert {sent for _, sent in web.requests} == {AGENT}
    found.check()
    assert web.requests[5:] == [("/hub.json", AGENT)]
    assert web.encodings == {"identity"}, "what is unpacked on the way has no bound"


def test_the_user_agent_is_asked_each_time(web: Web) -> None:
    agents = iter(["kernelhub/1", "kernelhub/1; torch/2"])
    found = LayoutSource(web.url, lambda: next(agents))
    found.ref(REPO, "v1")
    found.ref(REPO, "v1")
    assert [sent for _, sent in web.requests] == ["kernelhub/1", "kernelhub/1; torch/2"]


def test_a_folder_needs_no_fsspec(hub: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from kernelhub.core.refs import RepoId, Version
from kernelhub.hub.sources.base import NoProgress
from kernelhub.hub.sources.layout import LayoutSource
LayoutSource("https://kernels.example.org", lambda: "").key, LayoutSource("s3://bucket", lambda: "").origin
source, repo = LayoutSource({str(hub)!r}, lambda: ""), RepoId("org", "relu")
commit = source.resolve(repo, Version(1))
details = source.listing(repo, commit).variants["torch-cpu"]
assert "zstandard" not in sys.modules
source.fetch(repo, commit, "torch-cpu", details, Path({str(tmp_path)!r}), NoProgress())
heavy = {{"fsspec", "aiohttp", "asyncio", "torch", "huggingface_hub", "filelock"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "metadata.json").is_file()


def test_names_and_keys(tmp_path: Path) -> None:
    urls = [
        str(tmp_path),
        "https://user:secret@kernels.example.org/hub/",
        "https://kernels.example.org/hub2",
        "s3://bucket/kernels",
        "https://" + "long." * 60 + "org",
        "https://kernels.example.org/???",
    ]
    found = [source(url) for url in urls]
    assert len({item.key for item in found}) == len(urls)
    for item in found:
        assert item.key.replace("-", "").isalnum()
        assert len(item.key) < 64
        assert "secret" not in item.name + item.key
    assert source(str(tmp_path)).key == source(tmp_path.as_uri()).key == source(f"{tmp_path}/").key
    assert source("https://kernels.example.org/hub").name == found[1].name


@pytest.mark.parametrize(
    "url", ["", "  ", "file://elsewhere/hub", "gopher-nope://x/y", "http://[", "file://[", "http://x:99999"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidReference):
        source(url).resolve(REPO, V1)


@pytest.mark.parametrize(("url", "module", "extra"), [("https://h", "aiohttp", "http"), ("s3://b", "s3fs", "s3")])
def test_a_missing_package_is_named(url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError(f"Install {module} to access {protocol}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingDependency, match=rf"pip install 'kernelhub\[{extra}\]'"):
        source(url).resolve(REPO, V1)


def test_a_path_that_is_no_hub(tmp_path: Path) -> None:
    for job in (LayoutSource.check, lambda item: item.resolve(REPO, V1), lambda item: item.refs(REPO)):
        with pytest.raises(HubUnavailable, match="nowhere is not a folder"):
            job(source(str(tmp_path / "nowhere")))
        with pytest.raises(HubUnavailable, match="not a hub: it has no hub.json"):
            job(source(str(tmp_path)))
    (tmp_path / "hub.json").write_text('{"layout": 7}')
    with pytest.raises(InvalidMetadata, match="layout: expected 1, got 7"):
        source(str(tmp_path)).check()


def test_a_web_host_that_is_no_hub(tmp_path: Path) -> None:
    with serving(tmp_path) as web:
        with pytest.raises(HubUnavailable, match="not a hub"):
            source(web.url).resolve(REPO, V1)
        web.bodies |= {"v1": b"<html>Welcome</html>", "hub.json": b"<html>Welcome</html>"}
        with pytest.raises(InvalidMetadata, match="the ref is malformed"):
            source(web.url).resolve(REPO, V1)
        with pytest.raises(InvalidMetadata, match=r"hub.json is not JSON"):
            source(web.url).check()


def test_a_web_host_that_lists_nothing(web: Web) -> None:
    found = source(web.url)
    for status in (404, 404, 404, 404):
        web.answers.setdefault("", []).append((status, {}))
    with pytest.raises(RepositoryNotFound, match="shows no versions"):
        found.refs(REPO)
    with pytest.raises(RepositoryNotFound, match="does not have org/relu@v2"):
        found.resolve(REPO, Version(2))


def test_a_listing_may_link_anywhere(web: Web, hub: Path) -> None:
    commit = source(str(hub)).resolve(REPO, V1)
    page = """<a href="v1">v1</a> <a href='../../evil'>x</a> <A HREF="http://elsewhere/v9">x</A> <a href="%2e%2e">y</a>
    <a href="/org/relu/refs/v1">v1</a> <a href="a/b">z</a> <a href="../">up</a> <a href="?sort=1">s</a>
    <a href="http://[">no address</a>"""
    web.bodies[""] = page.encode()
    assert source(web.url).refs(REPO) == {"v1": commit}
    assert {path for path, _ in web.requests} == {"/org/relu/refs/", "/org/relu/refs/v1"}


# What hosts do


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "xn--a"])
def test_a_host_that_redirects_to_what_is_no_name(web: Web, hub: Path, host: str) -> None:
    web.answers["v1"] = [(302, {"Location": f"http://{host}/"})] * 9
    with pytest.raises(HubUnavailable):
        source(web.url, Waits().patience()).resolve(REPO, V1)


def test_a_host_is_asked_again_as_it_wishes(web: Web, hub: Path) -> None:
    waits = Waits()
    web.answers["v1"] = [
        (503, {}),
        (429, {"Retry-After": "7"}),
        (500, {"Retry-After": "Thu, 01 Jan 1970 00:00:11 GMT"}),
        (408, {}),
    ]
    found = source(web.url, waits.patience())
    assert found.resolve(REPO, V1) == source(str(hub)).resolve(REPO, V1)
    assert waits.waited == [0.5, 7.5, 11.5, 4.0]
    assert len(web.requests) == 5


def test_a_host_that_goes_on_failing_is_named(web: Web) -> None:
    waits = Waits()
    web.answers["v1"] = [(503, {})] * 9
    with pytest.raises(HubUnavailable, match=r"GET org/relu/refs/v1: 503") as caught:
        source(web.url, waits.patience()).resolve(REPO, V1)
    assert (caught.value.hub, caught.value.request, caught.value.status) == (web.url, "GET org/relu/refs/v1", 503)
    assert len(web.requests) == 5
    assert len(waits.waited) == 4


def test_a_host_that_asks_to_wait_for_long_is_not_waited_for(web: Web) -> None:
    waits = Waits()
    web.answers["v1"] = [(429, {"Retry-After": "3600"})]
    with pytest.raises(HubUnavailable, match="it asks to wait 3600 s") as caught:
        source(web.url, waits.patience()).resolve(REPO, V1)
    assert caught.value.status == 429
    assert waits.waited == []


@pytest.mark.parametrize("status", [400, 401, 403, 418])
def test_a_refusal_is_told_at_once(web: Web, status: int) -> None:
    web.answers["v1"] = [(status, {})]
    with pytest.raises(HubUnavailable, match=str(status)) as caught:
        source(web.url).resolve(REPO, V1)
    assert caught.value.status == status
    assert len(web.requests) == 1


def test_a_cut_is_made_good(web: Web, hub: Path, tmp_path: Path) -> None:
    waits, progress = Waits(), Counted()
    found = source(web.url, waits.patience())
    details = found.listing(REPO, found.resolve(REPO, V1)).variants["torch-cpu"]
    web.cuts[details["archive"]] = 2
    files = fetch(found, details, tmp_path / "out", progress)
    assert len(files) == 30
    assert sum(progress.came) == details["size"]
    assert len(waits.waited) == 2


def test_a_body_that_stalls_is_begun_again(web: Web, hub: Path, tmp_path: Path) -> None:
    waits, progress = Waits(), Counted()
    found = source(web.url, waits.patience(read=0.2))
    details = found.listing(REPO, found.resolve(REPO, V1)).variants["torch-cpu"]
    web.cuts[details["archive"]] = 2
    web.stalled_within = {details["archive"]}
    assert len(fetch(found, details, tmp_path / "out", progress)) == 30
    assert sum(progress.came) == details["size"], "what comes twice counts once"
    assert len(waits.waited) == 2


def test_a_body_without_end_is_not_read_on(web: Web, tmp_path: Path) -> None:
    found, progress = source(web.url), Counted()
    details = found.listing(REPO, found.resolve(REPO, V1)).variants["torch-cpu"]
    web.bodies[details["archive"]] = bytes(64 << 20)
    with pytest.raises(IntegrityError, match="has more than"):
        fetch(found, details, tmp_path / "out", progress)
    assert sum(progress.came) <= details["size"] + 1
    assert not web.sent


def test_a_host_that_stalls_is_given_up(web: Web) -> None:
    waits = Waits()
    web.stalled = {"v1"}
    with pytest.raises(HubUnavailable, match="GET org/relu/refs/v1") as caught:
        source(web.url, waits.patience(read=0.1, attempts=2)).resolve(REPO, V1)
    assert caught.value.status is None
    assert len(waits.waited) == 1


def test_a_host_that_is_not_there() -> None:
    waits = Waits()
    with pytest.raises(HubUnavailable, match="GET org/relu/refs/v1"):
        source("http://127.0.0.1:1", waits.patience(attempts=2)).resolve(REPO, V1)
    assert len(waits.waited) == 1


def test_an_answer_without_end_is_not_read(web: Web) -> None:
    web.bodies["v1"] = b"0" * (1 << 20)
    with pytest.raises(InvalidMetadata, match="more than 65,536 bytes"):
        source(web.url).resolve(REPO, V1)


@pytest.mark.parametrize("status", [403, None])
def test_a_store_that_refuses_or_is_not_there(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.exceptions import ClientError, EndpointConnectionError

    async def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if status is None:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")  # neither an OSError nor one of ours
        answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise PermissionError("Access Denied") from ClientError(answer, "GetObject")

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    with pytest.raises(HubUnavailable, match=r"s3://bucket is not available: GET org/relu/refs/v1") as caught:
        source("s3://bucket").resolve(REPO, V1)
    assert (caught.value.status, caught.value.request) == (status, "GET org/relu/refs/v1")


def test_a_large_archive_comes_in_parts(
    hub: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernelhub.hub import remote
    from kernelhub.hub.sources import layout

    monkeypatch.setattr(remote, "_PART", 100)
    monkeypatch.setattr(layout, "_IN_MEMORY", 50)
    assert len(load(source(in_bucket(hub, bucket)), tmp_path / "out")) == 30


# What hubs say and what they have


def manifest_of(hub: Path) -> tuple[Path, dict[str, Any]]:
    path = hub / f"{REPO}/commits" / f"{source(str(hub)).resolve(REPO, V1)}.json"
    return path, json.loads(path.read_bytes())


def republish(hub: Path, **changes: Any) -> None:
    """A manifest with changed keys of its variant, whose commit is right."""
    _, raw = manifest_of(hub)
    raw["manifest"]["variants"]["torch-cpu"] |= changes
    commit = sha256_hex(canonical_json(raw["manifest"]))[:40]
    write(hub, {f"{REPO}/commits/{commit}.json": json.dumps(raw).encode(), f"{REPO}/refs/v1": commit.encode()})


def add_blob(hub: Path, data: bytes) -> dict[str, Any]:
    write(hub, {blob_path(sha256_hex(data)): data})
    return {"archive": sha256_hex(data), "size": len(data)}


def refused(hub: Path, tmp_path: Path, error: type[KernelHubError], match: str) -> KernelHubError:
    """The error of loading from the hub; nothing may be left but in the folder that is thrown away."""
    out = tmp_path / "store" / "staging"
    with pytest.raises(error, match=match) as caught:
        load(source(str(hub)), out)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["staging"] if out.exists() else True
    return caught.value


def test_an_altered_manifest_is_refused(hub: Path, tmp_path: Path) -> None:
    path, raw = manifest_of(hub)
    raw["manifest"]["variants"]["torch-cpu"]["size"] += 1
    path.write_text(json.dumps(raw))
    refused(hub, tmp_path, IntegrityError, "other contents")
    with pytest.raises(IntegrityError, match="other contents"):
        source(str(hub)).resolve(REPO, Revision(path.stem))


def test_a_manifest_of_another_repository_is_refused(hub: Path) -> None:
    path, _ = manifest_of(hub)
    other = RepoId("org", "other")
    write(hub, {f"{other}/refs/v1": path.stem.encode(), f"{other}/commits/{path.name}": path.read_bytes()})
    found = source(str(hub))
    with pytest.raises(IntegrityError, match="answers for org/relu"):
        found.listing(other, found.resolve(other, V1))
    with pytest.raises(IntegrityError, match="answers for org/relu"):
        found.resolve(other, Revision(path.stem))


def test_signatures_may_be_added(hub: Path, tmp_path: Path) -> None:
    path, raw = manifest_of(hub)
    raw["signatures"].append({"key": "k", "ed25519": "AAAA"})
    path.write_text(json.dumps(raw, indent=8))
    assert ManifestDocument.parse(path.read_bytes()).signatures
    assert len(load(source(str(hub)), tmp_path / "out")) == 30


@pytest.mark.parametrize("ref", [b"../../etc/passwd", b"/etc/passwd", b"main\n", b"", b"x" * (1 << 20)])
def test_a_ref_that_is_no_commit_is_refused(hub: Path, tmp_path: Path, ref: bytes) -> None:
    (hub / f"{REPO}/refs/v1").write_bytes(ref)
    refused(hub, tmp_path, InvalidMetadata, "ref")


@pytest.mark.parametrize("commit", ["../../x", "v1", "A" * 40, ""])
def test_a_commit_that_is_a_path_is_refused(hub: Path, commit: str) -> None:
    with pytest.raises(InvalidReference, match="not a commit"):
        source(str(hub)).listing(REPO, commit)


def test_a_copy_that_is_not_whole_says_what_is_missing(hub: Path, tmp_path: Path) -> None:
    for path in (hub / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    refused(hub, tmp_path, HubUnavailable, "blobs/sha256/.*not a whole copy")
    manifest_of(hub)[0].unlink()
    refused(hub, tmp_path, HubUnavailable, r"lacks org/relu/commits/.*not a whole copy")


def archive_path(hub: Path) -> Path:
    return hub / blob_path(manifest_of(hub)[1]["manifest"]["variants"]["torch-cpu"]["archive"])


def test_an_altered_archive_of_the_same_size_is_refused(hub: Path, tmp_path: Path) -> None:
    path = archive_path(hub)
    path.write_bytes(pack({"__init__.py": b"evil", "metadata.json": metadata()}).ljust(path.stat().st_size, b"\0"))
    error = refused(hub, tmp_path, IntegrityError, "not what its manifest names")
    assert "blobs/sha256/" in str(error)
    assert not list((tmp_path / "store/staging").iterdir())


@pytest.mark.parametrize("change", [-1, 1, 100_000])
def test_an_archive_of_another_size_is_refused(url: str, hub: Path, tmp_path: Path, change: int) -> None:
    found = source(url)
    details = dict(found.listing(REPO, found.resolve(REPO, V1)).variants["torch-cpu"])
    details["size"] += change
    progress = Counted()
    with pytest.raises(IntegrityError, match="the archive"):
        fetch(found, details, tmp_path / "out", progress)
    assert sum(progress.came) <= details["size"] + 1
    assert not list((tmp_path / "out").iterdir())


def test_metadata_is_that_of_the_manifest_byte_for_byte(hub: Path, tmp_path: Path) -> None:
    _, raw = manifest_of(hub)
    text = raw["manifest"]["variants"]["torch-cpu"]["metadata"]
    republish(hub, metadata=text + "\n")
    error = refused(hub, tmp_path, IntegrityError, "not the one in the manifest")
    assert isinstance(error, IntegrityError)
    assert error.violations == (Violation("different", "metadata.json"),)
    republish(hub, metadata=text, **add_blob(hub, pack({"__init__.py": b""})))
    refused(hub, tmp_path / "again", IntegrityError, "no metadata.json")


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("../../evil.py", tarfile.REGTYPE, "not a path inside"),
        ("/tmp/evil.py", tarfile.REGTYPE, "not a path inside"),
        ("link", tarfile.SYMTYPE, "no regular file"),
        ("link", tarfile.LNKTYPE, "no regular file"),
        ("__init__.pyc", tarfile.REGTYPE, "bytecode: __init__.pyc"),
    ],
)
def test_a_hostile_archive_ends_in_an_error(hub: Path, tmp_path: Path, name: str, kind: bytes, match: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as writer:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        writer.addfile(info)
    republish(hub, **add_blob(hub, zstandard.compress(file.getvalue())))
    refused(hub, tmp_path, KernelHubError, match)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "details", [{}, {"archive": "../x", "size": 1, "metadata": ""}, {"archive": "ab" * 32}, {"size": -1}]
)
def test_details_from_elsewhere_are_not_believed(hub: Path, tmp_path: Path, details: Any) -> None:
    with pytest.raises(InvalidMetadata, match="torch-cpu"):
        fetch(source(str(hub)), details, tmp_path / "out")


def test_a_folder_that_may_not_be_read(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kernelhub.hub.opening._without_waiting", refuse)  # whoever runs the tests may read everything
    with pytest.raises(HubUnavailable, match="cannot read .*refs/v1: Permission denied"):
        source(str(hub)).resolve(REPO, V1)


def test_many_threads_share_a_source(web: Web, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    found = source(web.url)
    job: Callable[[int], int] = lambda number: len(load(found, tmp_path / str(number)))  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(8))) == [30] * 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_a_folder_is_not_waited_for(hub: Path) -> None:
    """Whoever can write to a shared folder could stop everybody who reads it."""
    path = hub / "org/relu/refs/v1"
    path.unlink()
    os.mkfifo(path)
    raised: list[Exception] = []

    def ask() -> None:
        try:
            LayoutSource(str(hub), agent).resolve(REPO, Version(1))
        except HubUnavailable as error:
            raised.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(30)
    assert "it is no file" in str(raised)


@pytest.mark.parametrize("way", [["http"], ["http", "https"]])
@pytest.mark.parametrize("status", [200, 404])
def test_no_answer_is_believed_that_came_over_a_way_which_anyone_can_alter(
    monkeypatch: pytest.MonkeyPatch, way: list[str], status: int
) -> None:
    *history, last = [SimpleNamespace(url=SimpleNamespace(scheme=scheme)) for scheme in ("https", *way)]
    answer = SimpleNamespace(url=last.url, history=history, status=status, headers={}, close=lambda: None)

    class Session:
        async def get(self, url: str, **options: Any) -> Any:
            return answer

    async def set_session() -> Session:
        return Session()

    import fsspec.asyn

    system = SimpleNamespace(loop=fsspec.asyn.get_loop(), kwargs={}, set_session=set_session, encode_url=str)
    monkeypatch.setattr("kernelhub.hub.remote.WebFiles._filesystem", lambda self: system)
    with pytest.raises(HubUnavailable, match="redirects to http:, which anyone can alter"):
        open_remote("https://hub.example", agent).read("hub.json", 1000)
